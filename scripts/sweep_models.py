#!/usr/bin/env python3
"""Every text model type of the installed transformers, tiny: plain and offloaded generation side by side.

scripts/sweep_models.py                       all types, rows into scripts/results/sweep.csv
scripts/sweep_models.py --types llama,doge    some of them
scripts/sweep_models.py --docs [--check]      write docs/models.md from the rows, or fail where it disagrees
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from campaign import sweep_cells, sweep_page, sweep_rows, sweep_run
from campaign.rows import Row
from campaign.tiny_models import model_types
from kvoffload.cli.terminal import script
from kvoffload.errors import ConfigError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results" / "sweep.csv"
PAGE = ROOT / "docs" / "models.md"


def main(
    types: Annotated[str, typer.Option(help="model types, comma-separated; default: all")] = "",
    quick: Annotated[bool, typer.Option(help="one type of each kind, in a few modes")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="types at once")] = 1,
    limit_s: Annotated[float, typer.Option(min=1, help="seconds that one type may take")] = sweep_run.LIMIT_S,
    resume: Annotated[bool, typer.Option(help="leave out what this commit has judged with these releases")] = False,
    csv_path: Annotated[Path, typer.Option("--csv", help="rows of the same types are replaced")] = RESULTS,
    docs: Annotated[bool, typer.Option("--docs", help="write the page from the rows")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="with --docs: change nothing, fail where it disagrees")
    ] = False,
    page_path: Annotated[Path, typer.Option("--page", help="the page")] = PAGE,
) -> None:
    """Judge model types, or write what came of it."""
    if docs:
        write(page_path, sweep_rows.load(csv_path), csv_path, check=check)
        return
    known = model_types()
    names = [name.strip() for name in types.split(",") if name.strip()] or list(sweep_cells.QUICK if quick else known)
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"--types: this transformers has no text model type {', '.join(unknown)}")
    sweep_rows.check(csv_path)
    done = sweep_rows.done(sweep_rows.load(csv_path)) if resume else set()
    waiting = [name for name in names if name not in done]
    console, forms = Console(stderr=True), Counter[str]()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("types", total=len(waiting))

        def on_row(row: Row) -> None:
            sweep_rows.save(csv_path, [row])
            forms[row["form"]] += 1
            if row["form"] == "short":
                progress.console.print(f"{row['model_type']}: {sweep_rows.shortcomings(row)}", markup=False)
            progress.update(task, advance=1, description=row["model_type"])

        cells = sweep_cells.QUICK_CELLS if quick else sweep_cells.CELLS
        sweep_run.run(waiting, on_row, cells=cells, jobs=jobs, limit_s=limit_s)
    print(", ".join(f"{count} {form}" for form, count in forms.most_common()) or "nothing to do")


def write(path: Path, found: list[Row], source: Path, *, check: bool) -> None:
    """The page from the rows, or whether it is up to date."""
    if not found:
        raise ConfigError(f"no rows in {source}: run scripts/sweep_models.py first, or name them with --csv")
    text = sweep_page.page(found)
    if check:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            typer.echo(f"{path.name} disagrees with {source.name}: run scripts/sweep_models.py --docs", err=True)
            raise typer.Exit(1)
        return
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    script(main)()
