"""A cell small enough to be measured in a test, rows of it, and a cell that stands alone. Not a test module."""

from __future__ import annotations

import dataclasses
from typing import Any

from campaign import rows
from campaign.cells import CELLS, Cell
from kvoffload.bench.presets import Preset

TINY = Preset(
    architecture="opt",
    hidden=64,
    heads=4,
    kv_heads=4,
    ffn=64,
    layers=4,
    batch=3,
    cached_tokens=256,
    vocab=128,
    h2d_gb_per_s=0.05,
)


def tiny_cell(name: str = "tiny", room_sequences: float | None = 2.6, **changes: Any) -> Cell:
    return Cell(
        name=name,
        group="cpu",
        rank=0,
        question="",
        preset=dataclasses.replace(TINY, batch=1) if "prompt_lookup_tokens" in changes else TINY,
        new_tokens=6,
        room_sequences=room_sequences,
        **changes,
    )


def row_of(provider: str, metric: str, value: float, config: dict[str, Any] | None = None, date: str = "") -> rows.Row:
    made = rows.row("campaign", provider, metric, "", "tiny", [value], config or {}, "emulated 1 GB/s")
    return made | ({"date": date} if date else {})


class CellAlone:
    """As much of a bed as a command needs."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell


def gpu_bed() -> Any:
    return CellAlone(CELLS["opt-6.7b 64x512+32"])
