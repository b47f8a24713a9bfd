#!/usr/bin/env python3
"""Predicted against measured steps of random work on this machine's emulated link.

scripts/eval_predictions.py --number 30
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from campaign import predictions, rows
from kvoffload.bench import core_for_the_link
from kvoffload.cli.terminal import script
from kvoffload.profiler.stored import load_or_measure

RESULTS = Path(__file__).parent / "results"


def main(
    number: Annotated[int, typer.Option(min=1, help="combinations")] = 30,
    seed: Annotated[int, typer.Option(help="of the drawing")] = 0,
    new_tokens: Annotated[int, typer.Option(min=5, help="tokens; two steps are not counted")] = 12,
    csv_path: Annotated[Path, typer.Option("--csv", help="rows are added to this file")] = RESULTS / "predictions.csv",
) -> None:
    """How far the cost model is from the engine."""
    console = Console(stderr=True)
    table = Table(title="predicted against measured steps", title_justify="left")
    for name in ("combination", "link over device", "predicted ms", "measured ms", "error", "allowed"):
        table.add_column(name, justify="left" if name == "combination" else "right", no_wrap=True)
    outside = 0
    rows.check(csv_path)
    with core_for_the_link():
        profile = load_or_measure("cpu")
        for one in track(predictions.draw(number, seed), console=console, description="combinations"):
            checked = predictions.check(one, profile, new_tokens)
            rows.save(csv_path, predictions.rows_of(checked))
            outside += not checked.is_within
            table.add_row(
                str(one),
                f"{checked.link_over_device:.2f}",
                f"{checked.predicted_s * 1e3:.1f}",
                f"{checked.measured_s * 1e3:.1f}",
                f"{checked.error:+.3f}",
                f"{predictions.MAX_ERROR[checked.is_link_bound]:.2f}" + ("" if checked.is_within else " exceeded"),
            )
    (Console() if sys.stdout.isatty() else Console(width=130)).print(table)
    print(f"{number - outside} of {number} within the allowed error")


if __name__ == "__main__":
    script(main)()
