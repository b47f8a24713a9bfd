"""Copy curves of the link between host and device, through the same backend the runtime uses.

Owns the H2D and D2H measurements. Does not own the link: an emulated link has no speed to measure, its curve is
built from what it was given (`given_curve`), with provenance "assumed".

Timeline of one point (one direction, one size):

    host buffer of several times the size, touched and pinned where the backend can      not timed
    burst(n):  clock | queue n copies back to back from rotating sources | wait | clock   n copies, one wait

What makes it valid: copies are queued back to back, as the engine queues chunks, so the cost of starting a copy
overlaps with the copy before it exactly as far as it does at work; sources rotate through a buffer larger than a CPU
cache, so they come from memory; the medians of at least three trials agree (see `trials`).
"""

from __future__ import annotations

import logging
import time
from typing import Literal, NamedTuple

import torch

from kvoffload.backend import Backend
from kvoffload.profiler.trials import better, time_trials
from kvoffload.types import Curve, Point

logger = logging.getLogger(__name__)

SIZES_BYTES = tuple(2**exponent for exponent in range(12, 27, 2))  # 4 KiB .. 64 MiB
GIVEN_SIZES_BYTES = (*SIZES_BYTES, 2**30)
MAX_COPY_S = 0.05  # sizes that take longer are left out: the rate is flat long before
TRIAL_S = 0.01  # long against the one wake-up at its end
ROTATION_BYTES = 256 * 2**20


class LinkCurves(NamedTuple):
    """Seconds of a copy over its bytes, both directions."""

    h2d: Curve
    d2h: Curve
    pinned: bool  # whether the host memory was pinned
    noisy: tuple[str, ...]  # points whose trials disagree, as text


def measure_link(
    backend: Backend, *, sizes_bytes: tuple[int, ...] = SIZES_BYTES, budget_s: float = 3.0, rotation_bytes: int = 0
) -> LinkCurves:
    """Measure both directions one after the other.

    Args:
        backend: the backend to copy with; its host buffers are given back, its queues are left empty.
        sizes_bytes: ascending sizes of one copy; those over `MAX_COPY_S` are skipped, never the first.
        budget_s: wall-clock seconds for everything.
        rotation_bytes: host memory the copies rotate through; 0 chooses.
    """
    began = time.perf_counter()
    largest = max(sizes_bytes)
    rotation = max(largest, rotation_bytes or min(ROTATION_BYTES, 4 * largest))
    host = backend.allocate_host(rotation)
    device_memory = backend.allocate_device(largest)
    try:
        host.tensor.zero_()
        device_memory.zero_()
        backend.synchronize()
        noisy: list[str] = []
        directions: tuple[Literal["h2d", "d2h"], ...] = ("h2d", "d2h")
        curves = {}
        for idx, direction in enumerate(directions):
            deadline = began + budget_s * (idx + 1) / len(directions)
            points = _points(backend, direction, host.tensor, device_memory, sizes_bytes, deadline, noisy)
            curves[direction] = Curve(unit="bytes", points=points)
    finally:
        backend.synchronize()
        backend.release_host(host)
    return LinkCurves(curves["h2d"], curves["d2h"], host.pinned_bytes > 0, tuple(noisy))


def given_curve(bytes_per_s: float, latency_s: float) -> Curve:
    """The curve of a link whose speed is a given: `latency_s + bytes / bytes_per_s`."""
    points = tuple(Point((float(size),), latency_s + size / bytes_per_s, 0.0) for size in GIVEN_SIZES_BYTES)
    return Curve(unit="bytes", points=points, provenance="assumed")


def _points(
    backend: Backend,
    direction: Literal["h2d", "d2h"],
    host: torch.Tensor,
    device_memory: torch.Tensor,
    sizes_bytes: tuple[int, ...],
    deadline: float,
    noisy: list[str],
) -> tuple[Point, ...]:
    points: list[Point] = []
    for size in sizes_bytes:
        if points:
            expected_s = points[-1].seconds * size / points[-1].x[0]
            if expected_s > MAX_COPY_S or time.perf_counter() + 5 * expected_s > deadline:
                break
        num_sources = host.numel() // size
        next_source = 0

        def burst(n: int, size: int = size, num_sources: int = num_sources) -> float:
            nonlocal next_source
            on_device = device_memory[:size]
            began = time.perf_counter()
            for _ in range(n):
                on_host = host[next_source * size : (next_source + 1) * size]
                next_source = (next_source + 1) % num_sources
                if direction == "h2d":
                    backend.copy_to_device(on_device, on_host, ())
                else:
                    backend.copy_to_host(on_host, on_device, ())
            backend.synchronize()
            return time.perf_counter() - began

        budget_s = max(0.0, deadline - time.perf_counter()) / 2 / len(sizes_bytes)
        trials = time_trials(burst, trial_s=TRIAL_S, budget_s=budget_s)
        if not trials.is_valid:
            trials = better(trials, time_trials(burst, trial_s=TRIAL_S, budget_s=budget_s))
        points.append(Point((float(size),), trials.seconds, trials.spread_fraction))
        logger.debug("%s %d bytes: %.3g s, spread %.2f", direction, size, trials.seconds, trials.spread_fraction)
        if not trials.is_valid:
            noisy.append(f"{direction} {size} bytes (spread {trials.spread_fraction:.2f})")
    return tuple(points)
