#!/usr/bin/env python3
"""Write the tables of docs/performance.md, and its figure, from the rows in scripts/results/.

scripts/report.py            write
scripts/report.py --check    fail where the page or the figure disagrees with the rows
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated

import typer

from campaign import published, rows
from kvoffload.cli.terminal import script
from kvoffload.errors import ConfigError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"
PAGE, FIGURE = "docs/performance.md", "docs/figures/share_of_bound.svg"


def main(
    check: Annotated[bool, typer.Option("--check", help="change nothing, fail where something is out of date")] = False,
    results: Annotated[Path, typer.Option(exists=True, file_okay=False, help="folder with the rows")] = RESULTS,
    root: Annotated[Path, typer.Option(exists=True, file_okay=False, help="folder of docs/")] = ROOT,
) -> None:
    """Tables and pictures from rows."""
    found = {name: rows.load(results / f"{name}.csv") for name in ("decode", "campaign", "ablation")}
    if not any(found.values()):
        raise ConfigError(
            f"no rows in {results}: the page's tables would be empty; --results names the folder with them"
        )
    sections = {
        "performance": published.performance(found["decode"]),
        "comparison": published.comparison(found["campaign"]),
        "parts": published.parts(found["ablation"]),
    }
    page, figure = root / PAGE, root / FIGURE
    if not page.is_file():
        raise ConfigError(f"there is no {page}: --root names the folder of docs/")
    before = page.read_text(encoding="utf-8")
    after = before
    for name, text in sections.items():
        after = replaced(after, name, text)
    bars = published.bars(found["decode"])
    key = hashlib.sha256(repr(bars).encode()).hexdigest()[:16]
    stale = [PAGE] if after != before else []
    stale += [] if figure.exists() and f"rows {key}" in figure.read_text(encoding="utf-8") else [FIGURE]
    if check:
        if stale:
            typer.echo(f"{', '.join(stale)} disagree with scripts/results: run scripts/report.py", err=True)
            raise typer.Exit(1)
        return
    page.write_text(after, encoding="utf-8")
    if FIGURE in stale:
        draw(bars, figure, f"rows {key}")
    typer.echo(f"written: {', '.join(stale) or 'nothing, all is up to date'}")


def replaced(text: str, name: str, section: str) -> str:
    """`text` with another section between the markers of that name."""
    begin, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise typer.BadParameter(f"{PAGE} needs {begin} and {end} once")
    return pattern.sub(lambda _: f"{begin}\n{section}\n{end}", text)


def draw(bars: list[published.Bar], path: Path, key: str) -> None:
    """The share of the bound, one group of bars for each preset."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "kvoffload", "svg.fonttype": "none", "font.family": "sans-serif"})
    groups = list(dict.fromkeys(bar.group for bar in bars))
    modes = list(dict.fromkeys(bar.mode for bar in bars))
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(modes))
    for idx, mode in enumerate(modes):
        at = {bar.group: bar.fraction_of_bound for bar in bars if bar.mode == mode}
        shown = [group for group in groups if group in at]
        positions = [groups.index(group) + (idx - (len(modes) - 1) / 2) * width for group in shown]
        drawn = axes.bar(positions, [at[group] for group in shown], width * 0.9, label=mode)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("share of the mode's own bound")
    axes.set_ylim(0, 1.15)
    axes.legend(ncols=len(modes) or 1, fontsize=8, loc="upper center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None, "Description": key})


if __name__ == "__main__":
    script(main)()
