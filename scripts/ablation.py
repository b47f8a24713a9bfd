#!/usr/bin/env python3
"""What each part of the runtime is worth on this machine; the variants are those of `campaign.ablation`.

scripts/ablation.py --quick
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from campaign import ablation, rows
from kvoffload.bench import PRESETS
from kvoffload.cli.terminal import script

RESULTS = Path(__file__).parent / "results"


def main(
    preset: Annotated[str, typer.Option(help="a shape of bench_decode.py")] = ablation.default_preset(),
    new_tokens: Annotated[int, typer.Option(min=5, help="tokens; two steps are not counted")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="passes over all variants, pooled")] = 2,
    quick: Annotated[bool, typer.Option(help="all variants in one setting, four in its neighbours, one pass")] = False,
    csv_path: Annotated[Path, typer.Option("--csv", help="rows are added to this file")] = RESULTS / "ablation.csv",
) -> None:
    """Everything on, then one part off at a time."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    console = Console(stderr=True)
    rows.check(csv_path)
    found, tables = ablation.run(
        preset, new_tokens=new_tokens, rounds=1 if quick else rounds, quick=quick, tell=console.print
    )
    rows.save(csv_path, found)
    wide = Console() if sys.stdout.isatty() else Console(width=120)
    for table in tables:
        wide.print(table)


if __name__ == "__main__":
    script(main)()
