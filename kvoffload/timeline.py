"""What ran when: stretches of the link and of compute in decode steps, planned or measured. Plain data.

Owns the lanes, the cut into decode steps, and the rest of a step that is nobody's. Does not own the clock: a
simulation (`simulation`) gives planned times, a backend that records (`Backend.start_recording`) measured ones.

    h2d, d2h    copies over the link, of the cache
    weights     copies to the device of decoder layers' weights, over the same link as h2d
    recompute   K and V from activations
    attention   over chunks, the tail and the new tokens; the model's own function where that runs instead
    dense       the rest: projections, MLP, head, sampling; measured, it is what the other lanes of compute leave of a
                step, so host time and launch gaps are in it
    draft, verification   of a round of verified drafts: tokens drafted on what is on the device, then the pass over
                the link that checks them; the lanes of compute are within
    wait        compute waits: measured, for the link; planned, for the link or for the host to issue something
    prefill, step, end   moments without length: a forward of the prompt begins, a decode step, nothing follows
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

Lane = Literal[
    "h2d",
    "d2h",
    "weights",
    "recompute",
    "attention",
    "dense",
    "draft",
    "verification",
    "wait",
    "prefill",
    "step",
    "end",
]
# in the order people read them
LANES: tuple[Lane, ...] = ("h2d", "weights", "draft", "verification", "recompute", "attention", "dense", "wait", "d2h")
COMPUTE: frozenset[Lane] = frozenset({"recompute", "attention", "dense", "wait"})
_MARKS: frozenset[Lane] = frozenset({"prefill", "step", "end"})


class Span(NamedTuple):
    """One stretch of one lane, in seconds since a start that all lanes share."""

    lane: Lane
    start_s: float
    end_s: float
    num_bytes: int = 0  # copied

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


class Timeline(NamedTuple):
    """Stretches in the order of their start, and the decode steps they belong to."""

    spans: tuple[Span, ...]
    steps_s: tuple[float, ...]  # the start of each decode step, and the end of the last one

    @property
    def num_steps(self) -> int:
        """Decode steps."""
        return max(0, len(self.steps_s) - 1)

    def lane(self, lane: Lane) -> tuple[Span, ...]:
        """The stretches of one lane."""
        return tuple(span for span in self.spans if span.lane == lane)

    def busy_s(self, lane: Lane) -> float:
        """Seconds in which something of that lane was in progress."""
        return sum(span.seconds for span in self.lane(lane))

    def steps(self, first: int, count: int = 1) -> Timeline:
        """Some decode steps only, starting at 0 seconds; stretches that cross their limits are cut.

        Raises:
            IndexError: it does not have these steps.
        """
        if first < 0 or count < 1 or first + count > self.num_steps:
            raise IndexError(
                f"first={first}, count={count}: this timeline has {self.num_steps} steps, numbered from 0; ask for "
                "fewer, or record a longer generate()"
            )
        marks = self.steps_s[first : first + count + 1]
        return self.between(marks[0], marks[-1])._replace(steps_s=tuple(mark - marks[0] for mark in marks))

    def between(self, start_s: float, end_s: float) -> Timeline:
        """A window of it, starting at 0 seconds; stretches that cross its limits are cut, their bytes in proportion."""
        kept = []
        for span in self.spans:
            low, high = max(span.start_s, start_s), min(span.end_s, end_s)
            if low < high:
                share = (high - low) / span.seconds
                kept.append(Span(span.lane, low - start_s, high - start_s, round(share * span.num_bytes)))
        steps = tuple(mark - start_s for mark in self.steps_s if start_s <= mark <= end_s)
        return Timeline(tuple(kept), steps)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"spans": [span._asdict() for span in self.spans], "steps_s": list(self.steps_s)}


def assemble(recorded: Iterable[Span]) -> Timeline:
    """What a recorder noted, in order; the rest of each decode step becomes "dense" where nobody noted that.

    Args:
        recorded: in any order; "step" moments say where steps begin, the next moment of any kind where the last one
            ends. If a prefill comes between steps, those after it count.
    """
    ordered = sorted(recorded, key=lambda span: (span.start_s, span.end_s))
    spans = [span for span in ordered if span.lane not in _MARKS]
    marks = [span for span in ordered if span.lane in _MARKS]
    steps = _last_steps(marks)
    if steps and not any(span.lane == "dense" for span in spans):
        spans += _rest([span for span in spans if span.lane in COMPUTE], steps[0], steps[-1])
        spans.sort(key=lambda span: (span.start_s, span.end_s))
    return Timeline(tuple(spans), tuple(steps))


def _last_steps(marks: list[Span]) -> list[float]:
    """When the steps that last followed each other without a break begin, and when the last of them ends."""
    steps: list[float] = []
    is_broken = True
    for mark in marks:
        if mark.lane == "step" and is_broken:
            steps = []
        if mark.lane == "step" or not is_broken:
            steps.append(mark.start_s)
        is_broken = mark.lane != "step"
    return steps


def _rest(busy: list[Span], start_s: float, end_s: float) -> list[Span]:
    """What is left between two moments beside stretches that are in order and do not overlap."""
    found, free_s = [], start_s
    for span in busy:
        if span.end_s <= start_s or span.start_s >= end_s:
            continue
        if span.start_s > free_s:
            found.append(Span("dense", free_s, span.start_s))
        free_s = max(free_s, span.end_s)
    if free_s < end_s:
        found.append(Span("dense", free_s, end_s))
    return found
