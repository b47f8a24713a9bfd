#!/usr/bin/env python3
"""How much of the link the transfer engine uses: full transfer at several chunk sizes and rings, beside plain copies.

scripts/bench_transfer.py --preset opt-6.7b
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from campaign import rows
from kvoffload.bench import PRESETS, Lab, core_for_the_link
from kvoffload.bench.decode import steps
from kvoffload.cli.terminal import script
from kvoffload.profiler.stored import load_or_measure

RESULTS = Path(__file__).parent / "results"


def main(
    preset: Annotated[str, typer.Option(help=f"one of {', '.join(PRESETS)}")] = "",
    new_tokens: Annotated[int, typer.Option(min=5, help="tokens; two steps are not counted")] = 10,
    csv_path: Annotated[Path, typer.Option("--csv", help="rows are added to this file")] = RESULTS / "transfer.csv",
) -> None:
    """The achieved share of the link."""
    preset = preset or ("opt-6.7b" if torch.cuda.is_available() else "cpu-small")
    if preset not in PRESETS:
        raise typer.BadParameter(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    rows.check(csv_path)
    with core_for_the_link():
        found, table = measure(preset, new_tokens)
    rows.save(csv_path, found)
    (Console() if sys.stdout.isatty() else Console(width=120)).print(table)


def measure(preset: str, new_tokens: int) -> tuple[list[rows.Row], Table]:
    """Every chunk size with four slots, then other rings at the first size."""
    lab, profile = Lab(PRESETS[preset]), load_or_measure()
    table = Table(title=f"{preset}, link {lab.link_name}", title_justify="left")
    for name in ("chunk tokens", "slots", "GB/s while copying", "of plain copies", "link busy"):
        table.add_column(name, justify="right")
    found: list[rows.Row] = []
    base = lab.chunk_blocks
    for chunk_blocks, slots in [(base * n, 4) for n in (1, 2, 4)] + [(base, n) for n in (2, 8)]:
        config = lab.config("full_transfer", profile, chunk_blocks=chunk_blocks, slots=slots)
        stats = steps(lab, config, new_tokens)
        assert stats.h2d_gb_per_s is not None
        assert stats.link_utilization is not None
        tokens, share = chunk_blocks * lab.block_tokens, stats.h2d_gb_per_s * 1e9 / lab.bytes_per_s
        x, options = f"{preset}, {tokens} tokens, {slots} slots", {"preset": preset, "tokens": tokens, "slots": slots}
        for metric, unit, value in (
            ("h2d", "GB/s", stats.h2d_gb_per_s),
            ("share_of_plain_copies", "fraction", share),
            ("link_utilization", "fraction", stats.link_utilization),
        ):
            found.append(rows.row("transfer", "full_transfer", metric, unit, x, [value], options, lab.link_name))
        table.add_row(
            str(tokens), str(slots), f"{stats.h2d_gb_per_s:.3f}", f"{share:.3f}", f"{stats.link_utilization:.3f}"
        )
    return found, table


if __name__ == "__main__":
    script(main)()
