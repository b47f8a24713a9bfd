"""Repeated timings of one thing: the median, and how far the trials lie apart.

Owns the protocol every measuring file shares. Does not own a clock: the caller's `burst` does the work `n` times
and says how long that took (wall clock on a CPU or for a link, CUDA events on a GPU).

    burst(least)      warm-up: page faults, library initialisation, clocks; thrown away
    burst(least)      estimate, from which n follows so that one trial is long against the clock's resolution
    burst(n) x 3..51  trials, as many as the time allows

Trials are as short as the clock permits: when the system gives a core to other work for some milliseconds, many short
trials have a few that are far off, which a median does not see, where a few long ones would all be somewhat off.

A measurement is valid when its median is certain enough: the spread of the trials, (p80 - p20) / p50, over the square
root of their number is at most `MAX_UNCERTAINTY_FRACTION`, and there are three of them. One that is not gets
another round, best some time later, when whatever disturbed it is over; `better` keeps one of the two. What stays noisy
is used (a median is still the best guess) and named to the user.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

MAX_UNCERTAINTY_FRACTION = 0.1
MIN_TRIALS = 3
MAX_TRIALS = 51


class Trials(NamedTuple):
    """The result of one measurement."""

    seconds: float  # median duration of one repetition
    spread_fraction: float  # (p80 - p20) / p50
    num_trials: int

    @property
    def is_valid(self) -> bool:
        """Whether the median is certain enough."""
        return self.num_trials >= MIN_TRIALS and self.uncertainty_fraction <= MAX_UNCERTAINTY_FRACTION

    @property
    def uncertainty_fraction(self) -> float:
        """How far the median may be off: about the standard error of a median."""
        return self.spread_fraction / math.sqrt(max(1, self.num_trials))


def time_trials(
    burst: Callable[[int], float],
    *,
    trial_s: float = 2e-3,
    budget_s: float = 0.15,
    max_burst: int = 256,
    least_burst: int = 1,
) -> Trials:
    """Time `burst` as the module docstring describes.

    Args:
        burst: does the work the given number of times, returns the seconds it took.
        trial_s: least length of one trial.
        budget_s: time for all trials; `MIN_TRIALS` are made whatever they take.
        max_burst: most repetitions in one trial.
        least_burst: fewest of them: where the clock is that of a device, and each repetition has to be launched.
    """
    burst(least_burst)
    estimate_s = max(burst(least_burst) / least_burst, 1e-9)
    n = max(least_burst, min(max_burst, round(trial_s / estimate_s)))
    samples: list[float] = []
    left_s = budget_s
    while len(samples) < MAX_TRIALS:
        took_s = burst(n)
        samples.append(took_s / n)
        left_s -= took_s
        if left_s < took_s and len(samples) >= MIN_TRIALS:
            break
    return summarize(samples)


def least_calls(least_burst: int = 1) -> int:
    """Repetitions that `time_trials` makes at the least."""
    return (2 + MIN_TRIALS) * least_burst


def better(one: Trials, other: Trials) -> Trials:
    """The one to trust of two rounds of the same work: a disturbance only ever adds time, so the faster."""
    return min(one, other, key=lambda trials: trials.seconds)


def summarize(samples: list[float]) -> Trials:
    """Median and spread of the durations of single repetitions, in seconds."""
    ordered = sorted(samples)
    median = statistics.median(ordered)
    last = len(ordered) - 1
    p20, p80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return Trials(median, (p80 - p20) / median, len(ordered))
