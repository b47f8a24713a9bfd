"""How long each part of a measurement may take, and how far along it is.

Owns the two budgets and the shares of the progress. Does not measure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from kvoffload.machine.quantities import SIZES_BYTES
from kvoffload.profiler.link import ALL_SIZES_BYTES, MAX_COPY_S

Thoroughness = Literal["quick", "full"]
Progress = Callable[[str, float], None]  # what is being measured, share done 0..1


class Budget(NamedTuple):
    """Wall-clock seconds of each part, and what they allow."""

    link_s: float
    pageable_s: float  # 0: left out
    emulated_s: float
    compute_s: float
    decoding_s: float
    host_memory_s: float
    stretch_s: float  # of energy, six of them; 0: left out
    host_s: float  # of either half
    sizes_bytes: tuple[int, ...]
    max_copy_s: float


BUDGETS: dict[Thoroughness, Budget] = {
    "quick": Budget(
        link_s=2.5,
        pageable_s=0.0,
        emulated_s=1.0,
        compute_s=5.0,
        decoding_s=1.2,
        host_memory_s=1.2,
        stretch_s=0.0,
        host_s=0.3,
        sizes_bytes=SIZES_BYTES,
        max_copy_s=MAX_COPY_S,
    ),
    "full": Budget(
        link_s=9.0,
        pageable_s=9.0,
        emulated_s=3.0,
        compute_s=12.0,
        decoding_s=3.0,
        host_memory_s=4.0,
        stretch_s=1.0,
        host_s=0.5,
        sizes_bytes=ALL_SIZES_BYTES,
        max_copy_s=0.5,
    ),
}


class ProgressParts:
    """Progress over parts of different length, told as their begin."""

    def __init__(self, tell: Progress, lengths_s: dict[str, float]) -> None:
        self._tell, self._lengths_s = tell, lengths_s
        self._total_s = sum(lengths_s.values())
        self._what, self._before_s = "", 0.0

    def begin(self, what: str) -> None:
        """The part before is over, or was left out."""
        names = list(self._lengths_s)
        self._what, self._before_s = what, sum(self._lengths_s[name] for name in names[: names.index(what)])
        if self._lengths_s[what]:
            self.within(0.0)

    def within(self, share: float) -> None:
        """So much of the part is done."""
        self._tell(self._what, (self._before_s + share * self._lengths_s[self._what]) / self._total_s)

    def done(self) -> None:
        """All parts are."""
        self._tell("done", 1.0)


def lengths(budget: Budget, *, has_link: bool, is_paced: bool, has_meter: bool) -> dict[str, float]:
    """Seconds that each part will take, in their order.

    Args:
        budget: of them.
        has_link: whether there is a link to measure.
        is_paced: whether there is an emulated one with a speed.
        has_meter: whether energy can be measured.
    """
    return {
        "link": budget.link_s if has_link else budget.emulated_s if is_paced else 0.0,
        "link, pageable memory": budget.pageable_s if has_link else 0.0,
        "matrix products and attention": budget.compute_s,
        "forms of fewer bytes": budget.decoding_s,
        "host memory": budget.host_memory_s,
        "energy": 6 * budget.stretch_s if has_meter else 0.0,  # three for products, three for copies
        "host": 2 * budget.host_s,
    }
