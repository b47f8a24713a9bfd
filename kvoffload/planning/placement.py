"""What a plan says about the blocks of every layer: the form of the next ones, and whether they stay on the device."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FormName = str  # a file of `kvoffload/store/forms/`
Tier = Literal["device", "host"]
Part = Literal["kv", "activation"]  # what a forward brings of a token, of which blocks are made
TIERS: tuple[Tier, ...] = ("device", "host")
PLAIN: FormName = "kv"  # what every block can be stored as: K and V as attention reads them


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The plan as cache layers follow it: the next blocks are resident until there are as many, then on the host."""

    block_tokens: int
    chunk_blocks: int
    resident: Mapping[FormName, int] = field(default_factory=dict)  # blocks, in this order
    ahead_tokens: int = 0  # that the tail has room for beyond a block
    window_blocks: int = 0  # of those on the host, that also have an exact copy on the device
    shadow_blocks: int = 0  # of the others, that have a copy for drafts; 0: the window has the newest
    shadow_form: FormName = PLAIN  # of these
    shares: Mapping[FormName, float] = field(default_factory=dict)  # of the blocks on the host; the others are PLAIN
    may_become: tuple[FormName, ...] = ()  # forms that a plan made later may ask for
    max_tokens: int | None = None  # of the whole generation, if known
    lives_on: bool = False  # further turns may follow: it is a user's cache
    prompt_tokens: int = 0  # tokens whose rows are still copies of each other, with beams

    @property
    def forms(self) -> frozenset[FormName]:
        """Those that new blocks may get, so that what they are made of must be kept until then."""
        chosen = [form for counts in (self.resident, self.shares) for form, n in counts.items() if n]
        return frozenset((PLAIN, *chosen, *self.may_become))

    @property
    def keeps_activations(self) -> bool:
        """Whether a block may be made of activations."""
        return "activation" in self.forms

    @property
    def num_resident(self) -> int:
        """Blocks on the device."""
        return sum(self.resident.values())


class Kind(NamedTuple):
    """What a block is."""

    form: FormName
    tier: Tier


class BlockRun(NamedTuple):
    """Consecutive blocks of one kind."""

    form: FormName
    tier: Tier
    num_blocks: int


def reserved_blocks(num_blocks: int, shares: Mapping[FormName, float]) -> dict[FormName, int]:
    """Blocks of each form to make room for where `shares` of `num_blocks` will have these, and the others PLAIN.

    Forms follow their shares to within a block while a layer grows, so a mixed layer has one to spare of each.
    """
    counts = {form: round(share * num_blocks) for form, share in shares.items() if share}
    spare = int(any(share < 1 for share in shares.values() if share))
    found = {form: min(num_blocks, count + spare) for form, count in counts.items()}
    found[PLAIN] = min(num_blocks, max(0, num_blocks - sum(counts.values()) + spare))
    return found


def next_runs(
    placement: Placement,
    count: int,
    *,
    on_device: Mapping[FormName, int],
    on_host: Mapping[FormName, int],
    possible: Container[FormName],
    resident_room: Mapping[FormName, int],
    first: Kind | None = None,
) -> list[BlockRun]:
    """Kinds of the next `count` blocks of a layer, in order.

    Args:
        placement: the plan.
        count: how many.
        on_device: blocks the layer has on the device, by form.
        on_host: the same on the host.
        possible: forms that these blocks can be stored in; PLAIN always.
        resident_room: how many more blocks there is memory for on the device, by form.
        first: what the first one was before a crop made it partial.
    """
    if first is not None and first.form not in possible:
        first = Kind(PLAIN, "host")
    if first is not None and first.tier == "device" and not resident_room.get(first.form):
        first = Kind(first.form, "host")
    kinds = [] if first is None else [first]
    for form, resident in placement.resident.items():
        if form in possible:
            missing = min(resident - on_device.get(form, 0), resident_room.get(form, 0))
            missing -= first == Kind(form, "device")
            kinds += [Kind(form, "device")] * min(count - len(kinds), max(0, missing))
    left = count - len(kinds)
    total = sum(on_host.values()) + left
    for form, share in placement.shares.items():
        if form in possible:
            wanted = min(left, max(0, round(share * total) - on_host.get(form, 0)))
            kinds += [Kind(form, "host")] * wanted
            left -= wanted
    # what rounding left belongs to K and V, or where these have no share to the last form that has one
    others = [form for form, share in placement.shares.items() if share and form in possible]
    is_shared_out = sum(placement.shares.get(form, 0.0) for form in others) > 1 - 1e-9
    return runs_of([*kinds, *[Kind(others[-1] if is_shared_out else PLAIN, "host")] * left])


def runs_of(kinds: Iterable[Kind]) -> list[BlockRun]:
    """Consecutive blocks of one kind together."""
    runs: list[BlockRun] = []
    for kind in kinds:
        if runs and runs[-1][:2] == kind:
            runs[-1] = runs[-1]._replace(num_blocks=runs[-1].num_blocks + 1)
        else:
            runs.append(BlockRun(*kind, 1))
    return runs
