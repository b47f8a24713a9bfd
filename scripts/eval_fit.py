#!/usr/bin/env python3
"""How far the fitted formula lies from operations measured by others, each predicted without the rows it is judged by.

scripts/eval_fit.py            tables
scripts/eval_fit.py --json     every row
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import llmcompass

CLASSES = ("A100", "MI210", "softmax", "layernorm", "gelu")


def main(as_json: Annotated[bool, typer.Option("--json", help="print every row as JSON")] = False) -> None:
    """Errors of the fit beside those of the datasheet's roofline."""
    began = time.perf_counter()
    groups = {
        f"{kind} products, leave one out": llmcompass.leave_one_out(llmcompass.products(kind), kind)
        for kind in CLASSES[:2]
    }
    for kind in CLASSES[2:]:
        groups[f"A100 {kind}, leave one out"] = llmcompass.leave_one_out(llmcompass.passes(kind))
    groups["4x A100 all-reduce, leave one out"] = llmcompass.left_out_all_reduces()
    for phase in ("prefill", "decode"):
        groups[f"GPT-3 layer on 4x A100, {phase}"] = llmcompass.layer(phase)
    took_s = time.perf_counter() - began
    if as_json:
        print(json.dumps({name: [row._asdict() for row in rows] for name, rows in groups.items()}, indent=1))
        return
    table = Table("predicted", "mean error", "worst", "within 80 % interval", "datasheet's mean error", "worst")
    for name, rows in groups.items():
        errors, datasheet = [row.error for row in rows], [row.roofline_error for row in rows]
        judged = [row for row in rows if row.low_s == row.low_s]  # not NaN
        table.add_row(
            name,
            _percent(llmcompass.mean(errors)),
            _percent(max(errors, key=abs)),
            f"{sum(row.is_inside for row in judged)} of {len(judged)}" if judged else "",
            _percent(llmcompass.mean(datasheet)),
            _percent(max(datasheet, key=abs)),
        )
    console = Console()
    console.print(table)
    layers = Table("operation of one layer", "measured us", "predicted us", "error", "datasheet's error")
    for name, rows in list(groups.items())[-2:]:
        for row in rows:
            layers.add_row(
                f"{name.rpartition(' ')[2]} {row.name}",
                f"{row.measured_s * 1e6:.1f}",
                f"{row.predicted_s * 1e6:.1f}",
                _percent(row.error),
                _percent(row.roofline_error),
            )
    console.print(layers)
    console.print(f"evaluated in {took_s:.1f} s")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    typer.run(main)
