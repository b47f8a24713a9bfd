"""Everything `kvoffload plan` prints of a task: its ways, what still fits, and a sweep over sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvoffload.advise.capacity import Limits, limits
from kvoffload.advise.comparison import WayFigures, compare_ways
from kvoffload.advise.economics import Economics
from kvoffload.advise.precisions import Precision, precisions
from kvoffload.advise.sweep import BestAtSize, Grid, sweep
from kvoffload.advise.task import Task


class Overview(NamedTuple):
    """Everything that is foreseen of one task."""

    rows: tuple[WayFigures, ...]
    limits: Limits
    cells: tuple[BestAtSize, ...]
    precisions: tuple[Precision, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "forecast": [row._asdict() for row in self.rows],
            "limits": self.limits._asdict(),
            "sweep": [cell._asdict() for cell in self.cells],
            "precisions": [one._asdict() for one in self.precisions],
        }


def overview(task: Task, money: Economics, over: Grid) -> Overview:
    """The ways of `task`, its limits, a sweep over `over`, and what fewer bytes of K and V would give."""
    return Overview(compare_ways(task, money), limits(task), sweep(task, over.batches, over.prompts), precisions(task))
