#!/usr/bin/env python3
"""A chat that doubles at each turn, beside a fresh cache of the same text: steps of both, and what was predicted.

scripts/bench_growing_chat.py --preset cpu-mha
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import kvoffload
from campaign import rows
from kvoffload import hf
from kvoffload.bench import PRESETS, Lab, core_for_the_link
from kvoffload.cli.terminal import script
from kvoffload.profiler.stored import load_or_measure

RESULTS = Path(__file__).parent / "results"
TURNS = (64, 128, 256, 512, 1024)  # tokens of each sequence when its answer begins
UNEVEN_STEPS = 2


def main(
    preset: Annotated[str, typer.Option(help=f"one of {', '.join(PRESETS)}")] = "cpu-mha",
    new_tokens: Annotated[int, typer.Option(min=8, help="tokens of each answer")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="chats; the samples of all count")] = 3,
    resident_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="of the longest cache that the device has room for; 0: the least")
    ] = 0.0,
    csv_path: Annotated[Path, typer.Option("--csv", help="rows are added to this file")] = RESULTS / "growing_chat.csv",
) -> None:
    """Steps of a chat and of fresh caches."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    rows.check(csv_path)
    with core_for_the_link():
        found, table = measure(preset, new_tokens, rounds, resident_fraction)
    rows.save(csv_path, found)
    (Console() if sys.stdout.isatty() else Console(width=120)).print(table)


def measure(preset: str, new_tokens: int, rounds: int, resident_fraction: float) -> tuple[list[rows.Row], Table]:
    """Every turn of some chats, each followed by the same with a fresh cache."""
    lab, profile = Lab(PRESETS[preset]), load_or_measure()
    room = lab.preset.layers * lab.preset.batch * TURNS[-1] * lab.shape.kv_row_bytes * resident_fraction
    options: dict[str, Any] = {"block_tokens": "auto", "chunk_blocks": "auto"}
    options["device_gib"] = room / 2**30 if room else "min"
    config = lab.config("planned", profile, **options)
    steps: dict[tuple[str, int], list[float]] = {}
    errors: dict[tuple[str, int], list[float]] = {}
    with kvoffload.offload(lab.model, config) as session:
        for chat_idx in range(rounds + 1):  # the first one warms up
            torch.manual_seed(chat_idx)
            chat, text = session.new_cache(), torch.empty(lab.preset.batch, 0, dtype=torch.long, device=lab.device)
            for length in TURNS:
                said = torch.randint(3, lab.preset.vocab, (text.shape[0], length - text.shape[1]), device=lab.device)
                text, answers = torch.cat([text, said], 1), {}
                for name, cache in (("chat", chat), ("fresh", session.new_cache())):
                    answers[name] = _answer(lab.model, text, new_tokens, cache)
                    stats = session.stats
                    assert stats is not None
                    taken = stats.decode_step_s[UNEVEN_STEPS:]
                    if chat_idx:
                        steps.setdefault((name, length), []).extend(taken)
                        if stats.predicted_step_s:
                            error = statistics.median(taken) / stats.predicted_step_s - 1
                            errors.setdefault((name, length), []).append(error)
                    if name == "fresh":
                        cache.close()
                text = answers["chat"]
            chat.close()
    return _rows(lab, preset, resident_fraction, steps, errors)


def _answer(model: Any, text: torch.Tensor, new_tokens: int, cache: hf.OffloadedHFCache) -> torch.Tensor:
    mask, given = torch.ones_like(text), {hf.generation_name(): cache}
    answer: torch.Tensor = model.generate(
        text, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **given
    )
    return answer


def _rows(
    lab: Lab,
    preset: str,
    resident_fraction: float,
    steps: dict[tuple[str, int], list[float]],
    errors: dict[tuple[str, int], list[float]],
) -> tuple[list[rows.Row], Table]:
    table = Table(title=f"{preset}, link {lab.link_name}", title_justify="left")
    for name in ("tokens", "chat ms", "fresh ms", "chat / fresh", "chat's error", "fresh's error"):
        table.add_column(name, justify="right")
    found: list[rows.Row] = []
    options = {"preset": preset, "resident_fraction": resident_fraction}
    for length in TURNS:
        p50 = {name: statistics.median(steps[name, length]) for name in ("chat", "fresh")}
        for name in ("chat", "fresh"):
            how = {"of": name, "tokens": length, **options}
            for metric, unit, samples in (
                ("decode_step", "s", steps[name, length]),
                ("prediction_error", "fraction", errors.get((name, length), [])),
            ):
                found.append(rows.row("growing_chat", name, metric, unit, length, samples, how, lab.link_name))
        shown = [f"{statistics.median(errors[name, length]):+.3f}" for name in ("chat", "fresh")]
        milliseconds = [f"{1e3 * p50[name]:.1f}" for name in ("chat", "fresh")]
        table.add_row(str(length), *milliseconds, f"{p50['chat'] / p50['fresh']:.3f}", *shown)
    return found, table


if __name__ == "__main__":
    script(main)()
