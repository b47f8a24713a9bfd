#!/usr/bin/env python3
"""The table of docs/weights.md: OPT-30B, whose weights fit neither card, as `kvoffload.plan` predicts it.

scripts/plan_weights.py            print it
scripts/plan_weights.py --write    put it between the markers of docs/weights.md
scripts/plan_weights.py --check    fail if it differs from what stands there
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from will_it_help import models

from campaign.markers import write_or_check
from kvoffload.advise.advice import task_of
from kvoffload.advise.comparison import WayFigures, compare_ways
from kvoffload.advise.streaming import quantised_way
from kvoffload.config import OffloadConfig
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.planning.workload import Workload

PAGE = Path(__file__).parents[1] / "docs" / "weights.md"
CARDS = {"A100 40GB, PCIe 4": "a100-40gb-pcie4", "T4 16GB, PCIe 3": "t4-16gb-pcie3"}
BATCHES = (64, 128, 256)
PROMPT_TOKENS, NEW_TOKENS = 512, 32  # of the published figure
HEAD = (
    "| Card | batch | layers that stay | prefill | step | planned | full transfer | paper's schedule | planned over "
    "these | 4-bit weights |\n|---|---|---|---|---|---|---|---|---|---|"
)


def table() -> str:
    """As Markdown; rates are new tokens of all sequences a second, over prefill and decoding."""
    return "\n".join([HEAD, *_rows()])


def _rows() -> Iterator[str]:
    for card, preset in CARDS.items():
        for idx, batch in enumerate(BATCHES):
            workload = Workload(batch=batch, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
            config = OffloadConfig(speculate="off")
            task = task_of(models()["OPT-30B"], workload, HardwareProfile.preset(preset), config)
            ways = {row.name: row for row in compare_ways(task)}
            planned, full, paper = ways["offload"], ways["full_transfer"], ways["kvpr"]
            kept = task.kept_layers(batch)
            gains = ", ".join(
                f"{planned.tokens_per_s / one.tokens_per_s:.2f}x" for one in (full, paper) if not one.problem
            )
            quantised = quantised_way(task)
            fitting = "does not fit" if quantised is None else f"{quantised.tokens_per_s:.0f}/s"
            yield (
                f"| {card if idx == 0 else ''} | {batch} | {kept} of {task.shape.num_layers} "
                f"| {planned.prefill_s:.0f} s in {task.prefill_passes()} | {planned.step_s:.2f} s "
                f"| **{planned.tokens_per_s:.1f}/s** | {_rate(full)} | {_rate(paper)} "
                f"| {gains} | {fitting} |"
            )


def _rate(way: WayFigures) -> str:
    return "does not fit" if way.problem else f"{way.tokens_per_s:.1f}/s"


def main(
    write: Annotated[bool, typer.Option("--write", help="Put the table into the file.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail if the file says something else.")] = False,
    file: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Which has the markers.")] = PAGE,
) -> None:
    """Print, write or check the table."""
    if not write and not check:
        print(table())
        return
    write_or_check(file, "plan-weights", table(), check=not write, command="scripts/plan_weights.py --write")


if __name__ == "__main__":
    typer.run(main)
