#!/usr/bin/env python3
"""Host time of the decode path, in microseconds per chunk, layer and step, over a device that costs nothing.

scripts/bench_host_time.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from campaign import host_time, rows
from kvoffload.cli.terminal import script

RESULTS = Path(__file__).parent / "results"
LINK = "none (copies are counted)"


def main(
    rounds: Annotated[int, typer.Option(min=1, help="rounds; of each figure the least counts")] = host_time.ROUNDS,
    csv_path: Annotated[Path, typer.Option("--csv", help="rows are added to this file")] = RESULTS / "host_time.csv",
) -> None:
    """What Python and PyTorch take for each chunk, layer and step."""
    rows.check(csv_path)
    torch.set_num_threads(1)
    found = host_time.measure(rounds)
    figures = {
        "kv chunk": (found.kv_chunk_us, found.kv_chunk_calls),
        "activation chunk": (found.activation_chunk_us, found.activation_chunk_calls),
        "layer": (found.layer_us, {}),
        "step": (found.step_us, {}),
    }
    table = Table(title="host time", title_justify="left")
    for name in ("of a", "µs", "calls of the driver"):
        table.add_column(name, justify="left" if name != "µs" else "right")
    made = []
    for name, (microseconds, calls) in figures.items():
        note = ", ".join(f"{number:g} {call}" for call, number in sorted(calls.items()))
        table.add_row(name, f"{microseconds:.1f}", note)
        made.append(
            rows.row("host_time", "kvoffload", "host_time", "us", name, [microseconds], {"of": name}, LINK, note=note)
        )
    rows.save(csv_path, made)
    (Console() if sys.stdout.isatty() else Console(width=120)).print(table)


if __name__ == "__main__":
    script(main)()
