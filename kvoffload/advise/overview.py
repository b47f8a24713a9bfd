"""Everything `kvoffload plan` prints of a task: its ways, what still fits, and a sweep over sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvoffload.advise.capacity import Limits, limits
from kvoffload.advise.comparison import WayFigures, compare_ways
from kvoffload.advise.economics import Economics
from kvoffload.advise.precisions import Precision, precisions
from kvoffload.advise.streaming import WIDTHS, quantised_way
from kvoffload.advise.sweep import BestAtSize, Grid, sweep
from kvoffload.advise.task import Alternative, Task


class Overview(NamedTuple):
    """Everything that is foreseen of one task."""

    rows: tuple[WayFigures, ...]
    limits: Limits
    cells: tuple[BestAtSize, ...]
    precisions: tuple[Precision, ...] = ()
    quantised: tuple[tuple[int, Alternative], ...] = ()  # by bits of weights narrower than the model's: the best way

    def to_json(self) -> dict[str, Any]:
        """Plain data; figures of what cannot be done are None."""
        limits = self.limits._asdict()
        limits["on_device_by_bits"] = [one._asdict() for one in self.limits.on_device_by_bits]
        return {
            "forecast": [_row_json(row) for row in self.rows],
            "limits": limits,
            "sweep": [_cell_json(cell) for cell in self.cells],
            "precisions": [one._asdict() for one in self.precisions],
            "quantised": [{"weight_bits": bits} | one._asdict() for bits, one in self.quantised],
        }


def overview(task: Task, money: Economics, over: Grid) -> Overview:
    """The ways of `task`, its limits, a sweep over `over`, and what fewer bytes of K and V would give."""
    return Overview(
        compare_ways(task, money),
        limits(task),
        sweep(task, over.batches, over.prompts),
        precisions(task),
        tuple((name, one) for name, bits in WIDTHS if (one := quantised_way(task, bits)) is not None),
    )


def _row_json(row: WayFigures) -> dict[str, Any]:
    data = row._asdict()
    return dict.fromkeys(data) | {"name": row.name, "problem": row.problem} if row.problem else data


def _cell_json(cell: BestAtSize) -> dict[str, Any]:
    data = cell._asdict()
    figures = ("tpot_s", "tokens_per_s", "offload_tokens_per_s")
    return data | dict.fromkeys(figures) if cell.name is None else data
