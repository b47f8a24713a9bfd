#!/usr/bin/env python3
"""Decode with weights streamed from the host, beside the same without overlap or recomputation, in paired rounds.

scripts/bench_weights.py --quick
scripts/bench_weights.py --cells 'opt all,prefill' --rounds 5
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from campaign import rows, weights
from campaign.weight_cells import choose
from kvoffload.cli.terminal import script

RESULTS = Path(__file__).parent / "results"


def main(
    cells: Annotated[str, typer.Option(help="names or parts of them, comma-separated; default: all")] = "*",
    rounds: Annotated[int, typer.Option(min=1, help="passes over all providers of a cell, each paired")] = 5,
    new_tokens: Annotated[
        int, typer.Option(min=weights.LEAST_NEW_TOKENS, help="of each sequence; two steps are not counted")
    ] = 16,
    quick: Annotated[bool, typer.Option(help="tiny models, two rounds: whether it runs at all")] = False,
    results: Annotated[Path, typer.Option(file_okay=False, help="rows are added to weights.csv there")] = RESULTS,
    dry_run: Annotated[bool, typer.Option(help="list the cells")] = False,
) -> None:
    """Streamed weights in all ways."""
    patterns, is_emulated = [part.strip() for part in cells.split(",")], not torch.cuda.is_available()
    if idle := [pattern for pattern in patterns if not choose([pattern], is_emulated=is_emulated)]:
        raise typer.BadParameter(f"no cell of this machine matches {', '.join(map(repr, idle))}; --dry-run lists them")
    chosen = choose(patterns, is_emulated=is_emulated)
    if dry_run:
        for cell in chosen:
            print(f"{cell.name:34}  {cell.question}")
        return
    csv_path, tables = results / "weights.csv", []
    rows.check(csv_path, "--results")

    def on_cell(found: weights.Found) -> None:
        rows.save(csv_path, found.rows())
        tables.append(weights.table(found))

    weights.run(
        chosen,
        new_tokens=min(8, new_tokens) if quick else new_tokens,
        rounds=min(2, rounds) if quick else rounds,
        quick=quick,
        tell=Console(stderr=True).print,
        on_cell=on_cell,
    )
    wide = Console() if sys.stdout.isatty() else Console(width=180)
    for table in tables:
        wide.print(table)


if __name__ == "__main__":
    script(main)()
