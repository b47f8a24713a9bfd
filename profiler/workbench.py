"""What operations of one device are timed with: operands that are never in a cache, a clock, and further rounds.

Owns the pool of operands and the clock. Does not own the operations (`compute`, `host_memory`) nor the protocol of the
trials (`trials`).

Timeline of one point:

    operands are views into one pool of random numbers larger than the caches            not timed
    burst(n):  clock | the operation n times, each on other operands of the pool | clock

The clock is `backend.clock`'s: the wall clock on a CPU, a pair of CUDA events behind a delay on a GPU. What makes it
valid:

- on a GPU all n were queued, eight of them at the least, before the first ran, so no launch is timed;
- decoding reads every weight and every cached token once per step, so an operand still in a cache from the trial
  before would promise a rate that no step sees: hence the rotation;
- numbers are random, since zeros draw less power and clock higher;
- every point is timed in two rounds some seconds apart, of which the undisturbed one counts, and again while its
  trials disagree (see `trials`) and there is time.

The generator is our own: the user's random numbers are the same with and without a measurement.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from kvoffload.backend import DeviceClock
from kvoffload.machine.quantities import Curve, Point
from kvoffload.profiler.trials import Trials, better, least_calls, time_trials

logger = logging.getLogger(__name__)

TRIAL_S = {"cpu": 2e-5, "cuda": 1e-3}  # CUDA events need longer stretches than the wall clock
MAX_BURST = {"cpu": 512, "cuda": 128}  # a GPU's queue holds about a thousand launches, an operation takes one to five
MAX_ROUNDS = 4


class Timed(NamedTuple):
    """One point and how to time it again."""

    x: tuple[float, ...]
    what: str
    work: Callable[[], object]
    trials: Trials

    @property
    def seconds(self) -> float:
        """Median duration of the operation."""
        return self.trials.seconds


class Workbench:
    """The pool of operands and the clock of one device.

    Args:
        device: where operations run.
        dtype: of the operands.
        pool_bytes: size of the pool; on a GPU at most a quarter of what is free, since a model may be there already.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, pool_bytes: int) -> None:
        self.device = device
        generator = torch.Generator(device=device)
        generator.manual_seed(0)
        if device.type == "cuda":
            pool_bytes = min(pool_bytes, torch.cuda.mem_get_info(device)[0] // 4)
        seed = torch.randn(2**18, generator=generator, device=device, dtype=torch.float32).to(dtype)
        self.pool = seed.repeat(max(1, pool_bytes // dtype.itemsize // seed.numel()))
        self._offset = 0
        self.clock = DeviceClock(device)
        self.num_calls = least_calls(self.clock.least_calls)  # of the operation, to time one point
        self.after_point: Callable[[], None] = lambda: None

    def take(self, *shape: int) -> torch.Tensor:
        """The next operand of the pool, contiguous."""
        num = 1
        for size in shape:
            num *= size
        if self._offset + num > self.pool.numel():
            self._offset = 0
        view = self.pool[self._offset : self._offset + num].view(shape)
        self._offset += num
        return view

    def seconds(self, work: Callable[[], object], n: int) -> float:
        """Duration of `n` calls of `work` on the device."""
        return self.clock.time(work, n).seconds

    def time(self, x: tuple[float, ...], what: str, work: Callable[[], object], budget_s: float) -> Timed:
        """Time `work` at the size `x`."""
        trial_s = TRIAL_S[self.device.type]
        trials = time_trials(
            lambda n: self.seconds(work, n),
            trial_s=trial_s,
            budget_s=budget_s,
            max_burst=MAX_BURST[self.device.type],
            least_burst=self.clock.least_calls,
        )
        logger.debug("%s: %.3g s, spread %.2f", what, trials.seconds, trials.spread_fraction)
        self.after_point()
        return Timed(x, what, work, trials)

    def repeat(self, timed: list[Timed], deadline: float) -> None:
        """Another round of all points, in place, then of those whose trials disagree, while there is time."""
        pending = list(range(len(timed)))
        for _ in range(MAX_ROUNDS - 1):
            for idx in pending:
                old = timed[idx]
                if time.perf_counter() + (3 + self.num_calls) * old.seconds < deadline:
                    again = self.time(old.x, old.what, old.work, 0.05)
                    timed[idx] = old._replace(trials=better(old.trials, again.trials))
            pending = [idx for idx in pending if not timed[idx].trials.is_valid]


def curve_of(unit: str, timed: list[Timed]) -> Curve:
    """The points as a curve."""
    points = tuple(Point(one.x, one.trials.seconds, one.trials.spread_fraction) for one in timed)
    return Curve(unit=unit, points=points)


def noisy_of(timed: list[Timed]) -> tuple[str, ...]:
    """The points whose trials disagree, as text."""
    return tuple(f"{one.what} (spread {one.trials.spread_fraction:.2f})" for one in timed if not one.trials.is_valid)
