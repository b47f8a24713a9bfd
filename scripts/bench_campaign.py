#!/usr/bin/env python3
"""Every way to decode, side by side, over the workloads of `campaign.cells`; what this machine can run of it.

scripts/bench_campaign.py --budget-minutes 4
scripts/bench_campaign.py --cells 'latency,long' --repeats 5
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from campaign import campaign, rows
from campaign.cells import choose
from campaign.providers import providers
from campaign.serving import LatencyObjective
from campaign.tables import campaign_tables
from kvoffload.cli.terminal import script

RESULTS = Path(__file__).parent / "results"


def main(
    cells: Annotated[str, typer.Option(help="names or groups, comma-separated, with wildcards; default: all")] = "*",
    only: Annotated[str, typer.Option("--providers", help="comma-separated; default: all")] = "",
    budget_minutes: Annotated[float | None, typer.Option(min=0.1, help="most informative cells first")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of each provider in each cell")] = 1,
    ttft_objective_s: Annotated[float, typer.Option(min=0, help="of goodput")] = 10.0,
    tpot_objective_s: Annotated[float, typer.Option(min=0, help="of goodput")] = 0.5,
    fresh: Annotated[bool, typer.Option(help="measure again what this commit has measured before")] = False,
    csv_path: Annotated[Path, typer.Option("--csv", help="rows are added to this file")] = RESULTS / "campaign.csv",
    dry_run: Annotated[bool, typer.Option(help="list the cells")] = False,
) -> None:
    """Compare all providers."""
    patterns, is_emulated = [part.strip() for part in cells.split(",")], not torch.cuda.is_available()
    chosen = choose(patterns, is_emulated=is_emulated)
    known = providers()
    names = [name.strip() for name in only.split(",") if name.strip()] or list(known)
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"unknown providers {', '.join(unknown)}; known: {', '.join(known)}")
    if idle := [pattern for pattern in patterns if not choose([pattern], is_emulated=is_emulated)]:
        raise typer.BadParameter(f"no cell of this machine matches {', '.join(map(repr, idle))}; --dry-run lists them")
    console = Console(stderr=True)
    if dry_run:
        for cell in chosen:
            print(f"{cell.name:36}  {cell.group:10}  {cell.question}")
        return
    settings = campaign.Settings(
        budget_s=None if budget_minutes is None else 60 * budget_minutes,
        repeats=repeats,
        objective=LatencyObjective(ttft_objective_s, tpot_objective_s),
        resumes=not fresh,
    )
    campaign.run(chosen, [known[name] for name in names], csv_path, settings, console.print)
    found = [row for row in rows.load(csv_path) if row["x"] in {cell.name for cell in chosen}]
    wide = Console() if sys.stdout.isatty() else Console(width=120)
    for table in campaign_tables(found):
        wide.print(table)


if __name__ == "__main__":
    script(main)()
