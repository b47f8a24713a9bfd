"""Which of many stretches are timed, so that timing costs little and totals stay right.

Owns the choice and the weights. A timed stretch stands for itself and for those before it that were not: the total is
the sum of times, each multiplied by its weight (inverse probability weighting; Horvitz and Thompson 1952). Gaps are
random, as what a decode step does repeats itself with every layer.
"""

from __future__ import annotations

import random

ALL_AT_FIRST = 64  # timed without exception: short runs lose nothing
MEAN_GAP = 8


class Sampler:
    """Chooses among the stretches of one kind."""

    def __init__(self) -> None:
        self._random = random.Random(0)  # of its own: the user's generator is left alone
        self._num_timed = 0
        self._gap = 1  # until the next one that is timed
        self._since = 0.0  # weight of those since the last that was

    def weight(self, amount: float = 1.0, *, at_once: bool = False) -> float:
        """How much the stretch that begins now stands for; 0: it is not timed.

        Args:
            amount: what is done in it, in any unit, above 0.
            at_once: time it in any case.

        Returns:
            All that was done since the last timed stretch, this one included, as a multiple of this one.
        """
        self._since += amount
        self._gap -= 1
        if self._gap > 0 and not at_once:
            return 0.0
        self._num_timed += 1
        self._gap = 1 if self._num_timed < ALL_AT_FIRST else self._random.randrange(1, 2 * MEAN_GAP)
        weight, self._since = self._since / amount, 0.0
        return weight
