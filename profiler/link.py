"""Copies over the link between host and device, through the same backend the runtime uses.

Owns the measurement of H2D, D2H and both at once, from memory the backend allocates (pinned where it can) and from
pageable memory. Does not own the link: the speed of an emulated one is a given, whose curve (`given_curve`) has
provenance "assumed"; what copies over it achieve is measured here as any other. Latency and bandwidth are those of the
line through a curve (`Curve.line`).

Timeline of one point (one way, one size):

    host buffer of several times the size, touched, and pinned where the backend can      not timed
    burst(n):  queue n copies back to back from rotating sources, as the backend times them   n copies, one wait

and for both at once a copy in each direction is queued in turn; its seconds are those until both have arrived. From
pageable memory a CUDA copy holds the host until it is staged, so that both directions take turns: as they would in the
runtime, whose copies are queued by one thread as well.

What makes it valid: a backend with a clock of its own has them all queued before the first begins, so that no launch is
timed (`backend.clock`); copies are queued back to back, as the engine queues chunks, so the cost of starting a copy
overlaps with the copy before it exactly as far as it does at work; sources rotate through a buffer larger than a CPU
cache, so they come from memory; the medians of at least three trials agree (see `trials`).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch

from kvoffload.backend import Backend
from kvoffload.backend.base import HostBuffer
from kvoffload.backend.clock import LEAST_CALLS
from kvoffload.machine.quantities import SIZES_BYTES, Curve, Point
from kvoffload.profiler.trials import better, least_calls, time_trials

logger = logging.getLogger(__name__)

Direction = Literal["h2d", "d2h", "both"]
ALL_SIZES_BYTES = (*SIZES_BYTES, 2**28, 2**30)
MAX_COPY_S = 0.05  # sizes that take longer are left out: the rate is flat long before
TRIAL_S = 0.01  # long against the one wake-up at its end
ROTATION_BYTES = 256 * 2**20


class LinkCurves(NamedTuple):
    """Seconds of a copy over its bytes: each direction alone, and both at once."""

    h2d: Curve
    d2h: Curve
    both: Curve  # x = bytes in either direction
    pinned: bool  # whether the host memory was pinned
    noisy: tuple[str, ...]  # points whose trials disagree, as text

    def named(self, ending: str) -> dict[str, Curve]:
        """The three curves as a profile names them, e.g. "h2d_pageable"."""
        return {f"{way}{ending}": getattr(self, way) for way in get_args(Direction)}


def measure_link(
    backend: Backend,
    *,
    sizes_bytes: tuple[int, ...] = SIZES_BYTES,
    budget_s: float = 3.0,
    max_copy_s: float = MAX_COPY_S,
    rotation_bytes: int = 0,
    pageable: bool = False,
    progress: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LinkCurves:
    """Measure one direction, the other, and both at once.

    Args:
        backend: the backend to copy with; its host buffers are given back, its queues are left empty.
        sizes_bytes: ascending sizes of one copy.
        budget_s: wall-clock seconds for everything.
        max_copy_s: sizes that take longer are left out, never the first.
        rotation_bytes: host memory the copies rotate through; 0 chooses.
        pageable: copy from plain host memory instead of what the backend allocates.
        progress: called with the share done.
        clock: seconds.
    """
    began = clock()
    largest = max(sizes_bytes)
    rotation = max(2 * largest, rotation_bytes or min(ROTATION_BYTES, 4 * largest))  # 2: one for each direction
    host = HostBuffer(_pageable(rotation), 0) if pageable else backend.allocate_host(rotation)
    noisy: list[str] = []
    curves: dict[Direction, Curve] = {}
    ways: tuple[Direction, ...] = get_args(Direction)
    try:
        device_memory = backend.allocate_device(2 * largest)
        host.tensor.zero_()
        device_memory.zero_()
        backend.synchronize()
        for idx, way in enumerate(ways):
            copier = _Copier(backend, way, host.tensor, device_memory, clock, is_pageable=not host.pinned_bytes)
            deadline = began + budget_s * (idx + 1) / len(ways)
            ending = " pageable" if pageable else ""
            points = _points(copier, f"{way}{ending}", sizes_bytes, deadline, max_copy_s, noisy)
            curves[way] = Curve(unit="bytes", points=points)
            if progress is not None:
                progress((idx + 1) / len(ways))
    finally:
        backend.synchronize()
        if not pageable:
            backend.release_host(host)
    return LinkCurves(curves["h2d"], curves["d2h"], curves["both"], host.pinned_bytes > 0, tuple(noisy))


class _Copier:
    """Bursts of copies one way: sources and destinations on the host rotate, in two halves if both ways are used."""

    def __init__(
        self,
        backend: Backend,
        way: Direction,
        host: torch.Tensor,
        device_memory: torch.Tensor,
        clock: Callable[[], float],
        *,
        is_pageable: bool = False,
    ) -> None:
        self.backend, self.way, self.clock, self.is_pageable = backend, way, clock, is_pageable
        middle = host.numel() // 2
        self.sources, self.destinations = (host[:middle], host[middle:]) if way == "both" else (host, host)
        self.landing, self.leaving = device_memory.chunk(2)
        self._next = 0

    def burst(self, size: int, n: int) -> float:
        """Seconds until `n` copies of `size` bytes (of that many in either direction) have arrived."""

        def queue() -> None:
            self._next = (self._next + 1) % (self.sources.numel() // size)
            part = slice(self._next * size, (self._next + 1) * size)
            if self.way != "d2h":
                self.backend.copy_to_device(self.landing[:size], self.sources[part], ())
            if self.way != "h2d":
                self.backend.copy_to_host(self.destinations[part], self.leaving[:size], ())

        ways: dict[Direction, tuple[Literal["h2d", "d2h"], ...]] = {
            "h2d": ("h2d",),
            "d2h": ("d2h",),
            "both": ("h2d", "d2h"),
        }
        found = self.backend.time_copies(queue, n, ways[self.way], is_pageable=self.is_pageable, clock=self.clock)
        return found.seconds


def _points(
    copier: _Copier, what: str, sizes_bytes: tuple[int, ...], deadline: float, max_copy_s: float, noisy: list[str]
) -> tuple[Point, ...]:
    points: list[Point] = []
    least = LEAST_CALLS if copier.backend.has_clock and not copier.is_pageable else 1
    num_copies = least_calls(least)
    for idx, size in enumerate(sizes_bytes):
        if points:
            expected_s = points[-1].seconds * size / points[-1].x[0]
            if expected_s > max_copy_s or copier.clock() + num_copies * expected_s > deadline:
                break
        budget_s = max(0.0, deadline - copier.clock()) / 2 / (len(sizes_bytes) - idx)

        def burst(n: int, size: int = size) -> float:
            return copier.burst(size, n)

        timed = functools.partial(time_trials, burst, trial_s=TRIAL_S, budget_s=budget_s, least_burst=least)
        trials = timed()
        if not trials.is_valid and copier.clock() + num_copies * trials.seconds < deadline:
            trials = better(trials, timed())
        points.append(Point((float(size),), trials.seconds, trials.spread_fraction))
        logger.debug("%s %d bytes: %.3g s, spread %.2f", what, size, trials.seconds, trials.spread_fraction)
        if not trials.is_valid:
            noisy.append(f"{what} {size} bytes (spread {trials.spread_fraction:.2f})")
    return tuple(points)


def _pageable(num_bytes: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.empty(num_bytes, dtype=torch.uint8)
