#!/usr/bin/env python3
"""Decode at a shape, in several modes, through the public API; the benchmark itself is `kvoffload.bench`.

scripts/bench_decode.py --preset cpu-mha --json -
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from campaign import rows
from kvoffload import bench
from kvoffload.cli.options import a_file_to_write
from kvoffload.cli.terminal import script


def main(
    preset: Annotated[str, typer.Option(help=f"one of {', '.join(bench.PRESETS)}")] = "cpu-mha",
    modes: Annotated[str, typer.Option(help="comma-separated")] = ",".join(bench.MODES),
    new_tokens: Annotated[int, typer.Option(min=5, help="tokens; two steps are not counted")] = 12,
    sweep: Annotated[bool, typer.Option(help="also every split in blocks")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="passes over all rows, pooled")] = 1,
    profile: Annotated[str, typer.Option(help="hardware profile: auto, a preset or a file")] = "auto",
    json_path: Annotated[
        Path | None,
        typer.Option("--json", callback=a_file_to_write, help="write rows as JSON to a file, - for standard output"),
    ] = None,
    csv_path: Annotated[str, typer.Option("--csv", help="add rows to this CSV file")] = "",
) -> None:
    """Decode speed of one shape in several modes."""
    if preset not in bench.PRESETS:
        raise typer.BadParameter(f"unknown preset {preset!r}; known: {', '.join(bench.PRESETS)}")
    chosen = modes.split(",")
    known = [*bench.MODES, *bench.WHOLE_LAYER_MODES, *bench.FORM_MODES]
    if unknown := [mode for mode in chosen if mode not in known]:
        raise typer.BadParameter(f"unknown modes {unknown}; known: {', '.join(known)}")
    if csv_path:
        rows.check(Path(csv_path))
    console = Console(stderr=True)

    def on_row(row: dict[str, Any]) -> None:
        console.print(
            f"{row['mode']}: {row['decode_step_s_p50'] * 1e3:.1f} ms, {row['fraction_of_bound']:.3f} of the bound"
        )
        if csv_path:
            save_csv(preset, [row], Path(csv_path))

    result = bench.run(preset, chosen, new_tokens, profile=profile, sweep=sweep, rounds=rounds, on_row=on_row)
    if str(json_path) == "-":
        json.dump(result, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        Console().print(bench.table(result))
        if json_path:
            json_path.write_text(json.dumps(result, indent=1) + "\n")
    if csv_path:
        save_csv(preset, result["rows"], Path(csv_path))  # now each beside full transfer


def save_csv(preset: str, found: list[dict[str, Any]], path: Path) -> None:
    """Add rows of a preset, as `bench.run` makes them, to a CSV file."""
    new = []
    for row in found:
        config = {"preset": preset}
        add = [("decode_step", "s", row["decode_step_s"])]
        shares = ("fraction_of_bound", "link_utilization", "split_fraction")
        add += [(name, "fraction", [row[name]]) for name in shares]
        add += [("device_kv_peak_decode", "bytes", [row["device_kv_peak_decode_bytes"]])]
        add += [("bound_step", "s", [row["bound_step_s"]])]
        if row["speedup_vs_full_transfer"] is not None:
            add += [("speedup_vs_full_transfer", "ratio", [row["speedup_vs_full_transfer"]])]
        for metric, unit, samples in add:
            new.append(
                rows.row(
                    *("decode", row["mode"], metric, unit, preset, samples, config, row["link"]),
                    device=row["device"],
                )
            )
    rows.save(path, new)


if __name__ == "__main__":
    script(main)()
