"""Where the cached blocks live, and what is expected of it: the answer to a planning problem. Plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvoffload.config import Schedule
from kvoffload.planning.forms import FORMS, KINDS
from kvoffload.planning.placement import PLAIN, FormName, Kind, Tier

Objective = Literal["latency", "throughput"]
Constraint = Literal["link", "device", "host", "device_memory", "host_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where the cached blocks of every offloaded layer live, and what the cost model expects of it."""

    num_layers: int
    num_offloaded_layers: int
    block_tokens: int
    chunk_blocks: int
    num_slots: int
    blocks: Mapping[str, int]  # of one layer, by the name of the option (`options`)
    bytes_per_token: Mapping[FormName, int]  # whole batch, one layer
    predicted_step_s: float
    full_transfer_step_s: float  # the same model's prediction with x = r_x = 0
    binding_constraint: Constraint
    schedule: Schedule = "pipelined"
    weight_bytes_per_step: int = 0  # of streamed layers, over the link
    weight_device_bytes: int = 0  # of decoder layers that stay, and slabs for those that are streamed
    num_micro_batches: int = 1
    objective: Objective = "latency"
    is_segmented: bool = False
    device_bytes: int = 0  # predicted use
    host_bytes: int = 0  # predicted use
    recommendation: str = ""  # what a person should do, with the reason; empty inside the runtime
    version: int = 0

    @property
    def num_blocks(self) -> int:
        """All cached blocks of one layer."""
        return sum(self.blocks.values())

    def count(self, *, tier: Tier | None = None, form: FormName | None = None, recomputed: bool | None = None) -> int:
        """Blocks of one layer that are in a tier, of a form, or recomputed."""
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
