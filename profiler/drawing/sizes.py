"""The ways to do a workload at its own size and at others around it.

Owns which sizes are looked at. Does not own the ways (`kvoffload/advise/comparison.py`) nor how they are drawn
(`sizes_charts`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from kvoffload.advise.comparison import WayFigures, compare_ways
from kvoffload.advise.task import Task
from kvoffload.advise.ways import Way, best_of

SIZE_FACTORS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # of the workload's batch and prompt
NEAR = 1.15  # sizes nearer to another than that are left out


class SizePoint(NamedTuple):
    """All ways to do the work at one size."""

    batch: int
    prompt_tokens: int
    rows: tuple[WayFigures, ...]
    whole_bytes: int  # weights and the whole cache on the device
    usable_bytes: int  # of the device, beside what the prefill needs and what is kept free; 0: not even the weights fit

    def row(self, name: Way) -> WayFigures | None:
        """One way, None where it cannot be done."""
        return next((row for row in self.rows if row.name == name and not row.problem), None)

    def problem(self, name: Way) -> str:
        """Why a way does not fit; "" where it fits, or where there is no need of it."""
        if name == "sub_batches" and self.row("on_device") is not None:
            return ""  # the whole batch fits
        return next((row.problem for row in self.rows if row.name == name), "")


def sized(task: Task, batch: int, prompt_tokens: int) -> SizePoint:
    """`task` with so many sequences and prompts that long."""
    sized = task._replace(workload=replace(task.workload, batch=batch, prompt_tokens=prompt_tokens))
    whole_bytes = task.shape.weight_bytes + sized.resident_bytes(batch)
    free_bytes = sized.free_bytes(sized.workload.rows)
    usable_bytes = task.shape.weight_bytes + free_bytes if free_bytes > 0 else 0
    return SizePoint(batch, prompt_tokens, compare_ways(sized), whole_bytes, usable_bytes)


def sizes_around(size: int, most: int | None = None) -> list[int]:
    """Sizes on both sides of one, itself among them.

    Args:
        size: the workload's own.
        most: what the model takes, if that is known: the largest, unless the workload's own is larger already.
    """
    wanted = {max(1, math.ceil(factor * size)) for factor in SIZE_FACTORS}
    if size < 16:  # too few below: go further up instead
        wanted |= {size * 2**exponent for exponent in range(7)}
    if most is not None and max(wanted) > most:
        end = max(most, size)
        wanted = {one for one in wanted if one * NEAR < end} | {size}
        if end > size * NEAR:
            wanted.add(end)
    return sorted(wanted)


def best_row(point: SizePoint) -> WayFigures | None:
    """The best way at a size, None where nothing works."""
    possible = {row.name: row for row in point.rows if not row.problem}
    best = best_of({name: row.total_s for name, row in possible.items()})
    return None if best is None else possible[best]
