"""The options of a plan: each way in which a cached block serves a step, one row of a table.

Owns what a block of each option costs, by resource and by tier of memory, and what a step costs besides; the program
(`program`) knows no option by name. Options follow from the rows of `forms`, each in every tier.

    resources   h2d, d2h   the link, by direction          device   compute on the device
                host       work on the host's cores        dram     the host's memory
                issue      Python and launches
    tiers       device, host: where a block is stored

Source: KVPR (arXiv 2411.17089, section 3) for transfer against recomputation; residency and the other terms are ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kvoffload.config import Schedule
from kvoffload.planning.forms import FORMS, KINDS
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.placement import PLAIN, FormName, Kind, Tier

Resource = Literal["h2d", "d2h", "device", "host", "dram", "issue"]
RESOURCES: tuple[Resource, ...] = ("h2d", "d2h", "device", "host", "dram", "issue")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way in which a cached block serves a step."""

    name: str
    form: FormName
    tier: Tier  # where it is stored
    seconds: Mapping[Resource, float]  # of a block in one layer
    bytes: Mapping[Tier, int]  # of a block in one layer
    link_bytes: int = 0  # of these, what crosses the link at every step
    chunk_s: float = 0.0  # to issue a chunk of such blocks, begun or full
    is_recomputed: bool = False
    restore_s: float | None = None  # of the device's seconds, for bringing K and V back; None: read as it is
    loss: float = 0.0  # of precision, `StoredForm.loss`
    is_free: bool = False  # chosen anew at every step; the others are fixed once a block is stored


class Table(NamedTuple):
    """The options of one planning problem, and what holds besides."""

    options: tuple[Option, ...]
    num_layers: int  # L: offloaded ones
    num_blocks: int  # s: of one layer, each in one option
    chunk_blocks: int
    fixed_s: Mapping[Resource, float]  # of a step, whatever is chosen
    capacity: Mapping[Tier, int]  # bytes of blocks of a layer beside everything else; negative: not even that fits
    stored: tuple[int, ...]  # blocks of each option that are stored already: lower bounds
    split: float | None  # the share of recomputed blocks among those on the host; None: free
    schedule: Schedule
    attention_s: float  # of all blocks and layers, for schedules that wait for it
    limits: tuple[int, ...] = ()  # blocks of each option that there may be at most; (): all of them

    @property
    def most(self) -> tuple[int, ...]:
        """Upper bounds of the blocks of each option."""
        return self.limits or (self.num_blocks,) * len(self.options)

    def with_options(self, used: Sequence[int]) -> Table:
        """The same with some of its options alone."""
        return self._replace(
            options=tuple(self.options[idx] for idx in used),
            stored=tuple(self.stored[idx] for idx in used),
            limits=tuple(self.most[idx] for idx in used),
        )

    def with_room(self, tier: Tier) -> Table:
        """The same with room for every block in a tier, whatever its option."""
        most = max(option.bytes.get(tier, 0) for option in self.options)
        return self._replace(capacity={**self.capacity, tier: self.num_blocks * most})


def table_of(inputs: PlanInputs) -> Table:
    """The table of one instance."""
    rates, tokens = inputs.rates, inputs.block_tokens
    link = rates.h2d_bytes_per_s
    ring_s = inputs.ring_bytes / link[PLAIN]  # how far the link can run ahead between steps
    options = tuple(_option(inputs, name, form, tier) for name, (form, tier) in _in_order(inputs.bytes_per_token))
    found = Table(
        options=options,
        num_layers=inputs.num_offloaded_layers,
        num_blocks=inputs.num_blocks,
        chunk_blocks=inputs.chunk_blocks,
        fixed_s={
            # streamed weights cross once for all micro-batches; the gap, where the ring does not cover it
            "h2d": rates.weights_s(inputs.weight_bytes_per_step) + max(0.0, rates.gap_s - ring_s),
            "device": inputs.num_layers * rates.dense_s + rates.head_s,  # N * t_dense + t_head
            "issue": inputs.num_layers * inputs.num_micro_batches * rates.host_s_per_layer,  # N * o_layer
        },
        capacity={
            "device": _room_bytes(inputs) // max(1, inputs.num_offloaded_layers),
            "host": inputs.host_bytes // max(1, inputs.num_offloaded_layers),
        },
        stored=tuple(inputs.stored.get(option.name, 0) for option in options),
        limits=tuple(
            inputs.num_blocks if _may_grow(inputs, option) else inputs.stored.get(option.name, 0) for option in options
        ),
        split=inputs.split,
        schedule=inputs.schedule,
        attention_s=inputs.num_offloaded_layers * inputs.num_blocks * tokens * rates.attention_s_per_token,
    )
    return found if inputs.num_offloaded_layers else found.with_room("device").with_room("host")


def _room_bytes(inputs: PlanInputs) -> int:
    """On the device, for the blocks that there are."""
    return inputs.device_bytes - inputs.fixed_device_bytes - inputs.reserved_bytes


def _may_grow(inputs: PlanInputs, option: Option) -> bool:
    """Whether there may be more blocks of an option than are stored already."""
    if option.is_recomputed and inputs.split == 0:
        return False
    form = FORMS[option.form]
    # room for a packed block would be lost where it turns out that it cannot be packed
    is_plain = form.needs_rates or (form.is_encoded and inputs.is_plain_on_device)
    return option.tier != "device" or not is_plain


def _in_order(forms: Collection[FormName]) -> list[tuple[str, Kind]]:
    """The options of these forms, by tier; on the host those that are restored first, and plain K and V last."""
    found = [(name, kind) for name, kind in KINDS.items() if kind.form in forms]
    return sorted(found, key=lambda item: (item[1].tier == "host", item[1] == Kind(PLAIN, "host")))


def _option(inputs: PlanInputs, name: str, form: FormName, tier: Tier) -> Option:
    """Blocks of a form in a tier: read by attention, brought back first where that is needed, and over the link."""
    rates, tokens = inputs.rates, inputs.block_tokens
    num_bytes = tokens * inputs.bytes_per_token[form]
    attend_s = tokens * rates.attention_s_per_token  # gamma_a
    work_s = tokens * rates.restore_s_per_token.get(form, 0.0)  # gamma_r
    is_read = FORMS[form].is_read_as_stored and (inputs.is_segmented or not FORMS[form].is_encoded)
    crosses, copy_bytes = tier == "host", tokens * inputs.shadow_bytes_per_token
    seconds: dict[Resource, float] = {"device": (0.0 if form == PLAIN else work_s) + attend_s}
    if crosses:
        seconds["h2d"] = num_bytes / rates.h2d_bytes_per_s[form]
    return Option(
        name=name,
        form=form,
        tier=tier,
        seconds=seconds,
        bytes={tier: num_bytes} | ({"device": copy_bytes} if crosses and copy_bytes else {}),
        link_bytes=num_bytes if crosses else 0,
        chunk_s=inputs.num_micro_batches * rates.host_s_per_chunk if crosses else 0.0,  # o_chunk
        restore_s=None if is_read else work_s,
        loss=FORMS[form].loss,
        is_recomputed=FORMS[form].is_recomputed,
    )
