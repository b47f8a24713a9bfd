"""Where the cached blocks live, and what is expected of it: the answer to a planning problem. Plain data."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvoffload.config import Schedule
from kvoffload.planning.forms import FORMS, KINDS
from kvoffload.planning.placement import PLAIN, FormName, Kind, Tier
from kvoffload.planning.verdicts import beside_full_transfer, beside_plain
from kvoffload.units import counted, duration, gb

Objective = Literal["latency", "throughput"]
Constraint = Literal["link", "device", "host", "device_memory", "host_memory"]
LINE_WIDTH = 79  # of what is printed
_QUANTITY = re.compile(r"(\d) (?=(?:[mun]?s|[kMGTPE]?i?B)\b)")


def paragraphs(*texts: str) -> str:
    """Texts as they are printed: each wrapped, with its further lines indented; a number stays with its unit."""
    wrapped = (
        textwrap.fill(
            _QUANTITY.sub("\\1\N{NO-BREAK SPACE}", text),
            LINE_WIDTH,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for text in texts
    )
    return "\n".join(wrapped).replace("\N{NO-BREAK SPACE}", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where the cached blocks of every offloaded layer live, and what the cost model expects of it.

    `print(plan)` says it in words, with what to do where that is known. Counts of blocks are those of one layer;
    seconds are predicted, of one decode step of the whole batch, and 0 where the link has no known speed.

    Attributes:
        num_layers: of the model.
        num_offloaded_layers: those whose cache grows without bound and is offloaded.
        block_tokens: tokens of a block, the unit of storage.
        chunk_blocks: blocks of a chunk, the unit of transfer and recomputation.
        num_slots: staging buffers on the device, one chunk each.
        blocks: by the name of the option, such as "resident_kv" (on the device) or "activation" (on the host,
            recomputed).
        bytes_per_token: by form, of the whole batch in one layer.
        predicted_step_s: with this plan.
        full_transfer_step_s: the same model's prediction with every block as K and V, and as many on the device as fit.
        binding_constraint: what the step waits for: "link", "device", "host", or "host_memory".
        schedule: "pipelined", or "kvpr" for the paper's.
        weight_bytes_per_step: of streamed layers, over the link.
        weight_device_bytes: of decoder layers that stay on the device, and slabs for those that are streamed.
        num_micro_batches: that share one pass over streamed weights.
        objective: "latency" or "throughput".
        is_segmented: attention takes chunks as they arrive, without a layer's K and V put together.
        device_bytes: predicted use, weights not counted.
        host_bytes: predicted use, weights not counted.
        recommendation: what to do, with the reason; empty in a session.
        version: how often it was made anew for one cache.
        plain_step_s: without offloading, where weights and cache fit on the device; 0: they do not, or nothing is
            predicted.
    """

    num_layers: int
    num_offloaded_layers: int
    block_tokens: int
    chunk_blocks: int
    num_slots: int
    blocks: Mapping[str, int]
    bytes_per_token: Mapping[FormName, int]
    predicted_step_s: float
    full_transfer_step_s: float
    binding_constraint: Constraint
    schedule: Schedule = "pipelined"
    weight_bytes_per_step: int = 0
    weight_device_bytes: int = 0
    num_micro_batches: int = 1
    objective: Objective = "latency"
    is_segmented: bool = False
    device_bytes: int = 0
    host_bytes: int = 0
    recommendation: str = ""
    version: int = 0
    plain_step_s: float = 0.0

    @property
    def num_blocks(self) -> int:
        """All cached blocks of one layer."""
        return sum(self.blocks.values())

    def count(self, *, tier: Tier | None = None, form: FormName | None = None, recomputed: bool | None = None) -> int:
        """Blocks of one layer that are in a tier, of a form, or recomputed.

        Args:
            tier: "device" or "host"; None: either.
            form: such as "kv" or "activation"; None: any.
            recomputed: whether K and V are recomputed from them in every step; None: either.
        """
        return sum(
            n
            for option, n in self.blocks.items()
            if tier in (None, KINDS[option].tier)
            and form in (None, KINDS[option].form)
            and recomputed in (None, FORMS[KINDS[option].form].is_recomputed)
        )

    @property
    def placed(self) -> dict[Kind, int]:
        """Blocks of one layer by what they are; in the order of the options."""
        found: dict[Kind, int] = {}
        for option, n in self.blocks.items():
            found[KINDS[option]] = found.get(KINDS[option], 0) + n
        return found

    @property
    def resident_kv_blocks(self) -> int:
        """On the device as K/V."""
        return self.blocks.get("resident_kv", 0)

    @property
    def resident_activation_blocks(self) -> int:
        """On the device as activations, recomputed in every step."""
        return self.blocks.get("resident_activation", 0)

    @property
    def kv_blocks(self) -> int:
        """Transferred as K/V."""
        return self.blocks.get("kv", 0)

    @property
    def activation_blocks(self) -> int:
        """Transferred as activations and recomputed."""
        return self.blocks.get("activation", 0)

    @property
    def shares(self) -> dict[FormName, float]:
        """Of the blocks on the host, 0..1, by form; what is missing to 1 is PLAIN."""
        on_host = self.count(tier="host")
        counts = {kind.form: n for kind, n in self.placed.items() if kind.tier == "host" and kind.form != PLAIN}
        return {form: n / on_host if on_host else 0.0 for form, n in counts.items()}

    @property
    def split_fraction(self) -> float:
        """Share of the blocks on the host that are recomputed, 0..1."""
        on_host = self.count(tier="host")
        return self.count(tier="host", recomputed=True) / on_host if on_host else 0.0

    @property
    def link_bytes_per_step(self) -> int:
        """Bytes from host to device in one decode step."""
        per_layer = self.block_tokens * sum(
            n * self.bytes_per_token[kind.form] for kind, n in self.placed.items() if kind.tier == "host"
        )
        return self.num_offloaded_layers * per_layer + self.weight_bytes_per_step

    @property
    def in_words(self) -> str:
        """In which form offloaded tokens cross the link, and what stays on the device."""
        resident = self.count(tier="device")
        stay = "stays" if resident == 1 else "stay"
        return f"{self._crossing}; {resident} of {counted(self.num_blocks, 'block')} {stay} on the device"

    @property
    def _crossing(self) -> str:
        shares = {form: share for form, share in self.shares.items() if share}
        if not self.count(tier="host"):
            return "nothing crosses the link"
        if not shares:
            return "offloaded tokens cross as K/V, none is recomputed"
        if not self.count(tier="host", form=PLAIN) and len(shares) == 1:
            form = FORMS[next(iter(shares))]
            return f"offloaded tokens cross as {form.label}" + (", all are recomputed" if form.is_recomputed else "")
        parts = [
            f"{share:.2g} of the offloaded tokens cross as {FORMS[form].label}"
            + (" and are recomputed" if FORMS[form].is_recomputed else "")
            for form, share in shares.items()
        ]
        return ", ".join([*parts, "the rest as K/V"])

    @property
    def is_full_transfer(self) -> bool:
        """Whether every block crosses the link as K and V in every step."""
        return self.count(tier="host", form=PLAIN) == self.num_blocks

    @property
    def _verdict(self) -> str:
        step_s, full_s = self.predicted_step_s, self.full_transfer_step_s
        if not step_s:
            return "none, the link has no known speed, or nothing was to be predicted"
        found = [beside_plain(step_s, self.plain_step_s)] if self.plain_step_s else []
        if self.is_full_transfer:
            found.append("this is full transfer itself")
        elif full_s:
            found.append(beside_full_transfer(step_s, full_s))
        return "; ".join(found)

    def __str__(self) -> str:
        weights = ""
        if self.weight_bytes_per_step:
            weights = (
                f"; weights of layers take {gb(self.weight_device_bytes)} on the device, and "
                f"{gb(self.weight_bytes_per_step)} cross the link in every forward"
            )
        step = "not predicted"
        if self.predicted_step_s:
            limit = self.binding_constraint.replace("_", " ")
            step = f"{duration(self.predicted_step_s)} predicted, limited by the {limit}"
        return paragraphs(
            f"plan: {self.in_words} (blocks of {counted(self.block_tokens, 'token')}, "
            f"{counted(self.num_offloaded_layers, 'layer')} of {self.num_layers} offloaded)",
            f"step: {step}; {gb(self.link_bytes_per_step)} to the device",
            f"memory: {gb(self.device_bytes)} on the device, {gb(self.host_bytes)} on the host{weights}",
            f"verdict: {self.recommendation or self._verdict}",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the derived values included."""
        data = dataclasses.asdict(self)
        for name in ("resident_kv_blocks", "resident_activation_blocks", "kv_blocks", "activation_blocks"):
            data[name] = getattr(self, name)
        del data["bytes_per_token"]
        data |= {f"{form}_bytes_per_token": size for form, size in self.bytes_per_token.items()}
        data["split_fraction"] = self.split_fraction
        data["link_bytes_per_step"] = self.link_bytes_per_step
        return data
