"""What a plan says about the blocks of every layer: the form of the next ones, and whether they stay on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Form = Literal["kv", "activation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The plan as cache layers follow it, in the order of the tokens: resident blocks first, the others on the host."""

    block_tokens: int
    chunk_blocks: int
    resident_kv_blocks: int = 0
    resident_activation_blocks: int = 0
    activation_share: float = 0.0  # of the offloaded blocks
    may_change: bool = False  # a re-plan may ask for activations later
    max_tokens: int | None = None  # of the whole generation, if known
    lives_on: bool = False  # further turns may follow: it is a user's cache
    prompt_tokens: int = 0  # tokens whose rows are still copies of each other, with beams

    @property
    def needs_activations(self) -> bool:
        """Whether activations of new tokens must be kept until their block has a form."""
        return self.activation_share > 0 or self.resident_activation_blocks > 0 or self.may_change


class BlockKind(NamedTuple):
    """What a block is: its form, and whether it stays on the device."""

    form: Form
    is_resident: bool


class BlockRun(NamedTuple):
    """Consecutive blocks of one kind."""

    form: Form
    is_resident: bool
    num_blocks: int


def reserved_blocks(num_blocks: int, share: float) -> tuple[int, int]:
    """Activation and kv blocks to make room for where `share` of `num_blocks` will be activations.

    Forms follow the share to within a block while a layer grows, so a mixed layer has one to spare of each.
    """
    x, spare = round(share * num_blocks), int(0 < share < 1)
    return min(num_blocks, x + spare), min(num_blocks, num_blocks - x + spare)


def next_runs(
    placement: Placement,
    count: int,
    *,
    num_blocks: int,
    stored_kv_blocks: int,
    stored_activation_blocks: int,
    can_recompute: bool,
    has_resident_room: bool = True,
    first: BlockKind | None = None,
) -> list[BlockRun]:
    """Kinds of the next `count` blocks of a layer, in order.

    Args:
        placement: the plan.
        count: how many.
        num_blocks: blocks the layer has.
        stored_kv_blocks: of these on the host as kv; `stored_activation_blocks` likewise.
        can_recompute: whether activations are there to be stored, with all that recomputing them takes.
        has_resident_room: whether the memory for resident blocks can still be used.
        first: what the first one was before a crop made it partial.
    """
    # Resident blocks are the first ones, also where room for them comes back after others went to the host.
    has_resident_room = has_resident_room and not stored_kv_blocks and not stored_activation_blocks
    if first is not None and first.form == "activation" and not can_recompute:
        first, has_resident_room = BlockKind("kv", False), False
    if first is not None and first.is_resident and not has_resident_room:
        first = BlockKind(first.form, False)
    r = placement.resident_kv_blocks if has_resident_room else 0
    r_x = placement.resident_activation_blocks if has_resident_room and can_recompute else 0
    kinds = [] if first is None else [first]
    while len(kinds) < count and num_blocks + len(kinds) < r:
        kinds.append(BlockKind("kv", True))
    while len(kinds) < count and num_blocks + len(kinds) < r + r_x:
        kinds.append(BlockKind("activation", True))
    left = count - len(kinds)
    share = placement.activation_share if can_recompute else 0.0
    wanted = round(share * (stored_activation_blocks + stored_kv_blocks + left))
    as_activations = min(left, max(0, wanted - stored_activation_blocks))
    kinds += [BlockKind("activation", False)] * as_activations + [BlockKind("kv", False)] * (left - as_activations)
    runs: list[BlockRun] = []
    for kind in kinds:
        if runs and runs[-1][:2] == kind:
            runs[-1] = runs[-1]._replace(num_blocks=runs[-1].num_blocks + 1)
        else:
            runs.append(BlockRun(*kind, 1))
    return runs
