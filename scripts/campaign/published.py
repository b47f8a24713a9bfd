"""What docs/performance.md says of the rows in `scripts/results/`: tables in Markdown, and the data of its figure.

Owns the selection and the wording. Does not own the rows (`rows`) or their places there (`scripts/report.py`).
The headline is the share of the bound that this machine allows; a speed-up stands only beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from campaign import ablation
from campaign.campaign import SPEED, summary
from campaign.rows import Row, is_gpu
from kvoffload.bench.lab import FORM_MODES, MODES

NO_GPU = "No GPU figure has been measured yet."
DASH = "–"
_PROVIDERS = (
    *("on_device", "sub_batches", "hf_offloaded", "whole_layer_both_ways"),
    *("full_transfer", "sequential", "kvpr", "planned"),
)


class Bar(NamedTuple):
    """One bar of the figure."""

    group: str  # preset and device
    mode: str
    fraction_of_bound: float


def performance(decode: Sequence[Row]) -> str:
    """The performance section: the share of the bound first, then every mode of every preset."""
    if not decode:
        return NO_GPU
    lines = [] if any(is_gpu(row) for row in decode) else [NO_GPU, ""]
    for (preset, device), found in _groups(decode, lambda row: (row["x"], row["device"])).items():
        modes = _figures(found)
        shown = [mode for mode in (*MODES, *FORM_MODES) if mode in modes]
        if "planned" in modes:
            lines += [_headline(preset, modes), ""]
        lines += [_caption(preset, device, found), ""]
        lines += ["| mode | step | bound | share of the bound | against full transfer | link busy |", _rule(6)]
        for mode in shown:
            one = modes[mode]
            lines.append(
                f"| {mode} | {_ms(one['decode_step'])} | {_ms(one['bound_step'])} | {one['fraction_of_bound']:.3f} "
                f"| {_times(one.get('speedup_vs_full_transfer'))} | {one['link_utilization']:.3f} |"
            )
        lines.append("")
    return "\n".join(lines).strip()


def _headline(preset: str, modes: dict[str, dict[str, float]]) -> str:
    planned = modes["planned"]
    return (
        f"**{preset}: {planned['fraction_of_bound']:.2f} of the bound** of the cost model at rates measured around the "
        f"run, {_times(planned.get('speedup_vs_full_transfer'))} full transfer."
    )


def comparison(campaign: Sequence[Row]) -> str:
    """New tokens per second of every provider in every cell, and why the others are missing."""
    if not campaign:
        return "Not measured yet."
    lines: list[str] = []
    for device, found in _groups(campaign, lambda row: row["device"]).items():
        table = summary(found)
        names = [name for name in _PROVIDERS if any(SPEED in cell.get(name, {}) for cell in table.values())]
        lines += [f"New tokens per second on {device}, {_link_kind(found)}, {_source(found)}:", ""]
        lines += [f"| cell | {' | '.join(names)} | planned, share of the bound |", _rule(len(names) + 2)]
        has_dash = False
        for cell, providers in table.items():
            speeds = {name: providers[name][SPEED] for name in names if SPEED in providers.get(name, {})}
            best = max(speeds, key=lambda name: speeds[name], default=None)
            shown = [_mark(name == best, f"{speeds[name]:.2f}") if name in speeds else DASH for name in names]
            has_dash = has_dash or DASH in shown
            bound = providers.get("planned", {}).get("fraction_of_bound")
            lines.append(f"| {cell} | {' | '.join(shown)} | {'' if bound is None else f'{bound:.3f}'} |")
        lines.append("")
        if has_dash:
            lines.append("A dash is a cell that this provider cannot run; the rows in `campaign.csv` say why.")
        lines += [_in_parts(table), ""]
    return "\n".join(lines).strip()


def _in_parts(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The cells where offloading is the wrong answer; empty where no row shows one."""
    worse = [
        cell
        for cell, providers in table.items()
        if providers.get("sub_batches", {}).get(SPEED, 0.0) > providers.get("planned", {}).get(SPEED, 0.0)
    ]
    if not worse:
        return ""
    return f"In {', '.join(worse)} a part of the batch fits on the device: decode it in parts, do not offload."


def parts(found: Sequence[Row]) -> str:
    """What each part of the runtime is worth, and the factors over transformers' traffic."""
    if not found:
        return "Not measured yet."
    lines: list[str] = []
    for (device, preset), rows in _groups(found, lambda row: (row["device"], _preset(row))).items():
        here = _of_newest_commit(rows)
        settings = list(dict.fromkeys(row["x"] for row in here))
        figures = {setting: _figures(row for row in here if row["x"] == setting) for setting in settings}
        first = figures[settings[0]]
        names = [name for name in first if not name.startswith("factor: ")]
        lines += [f"Decode step over that with everything on, {preset} on {device}, {_source(here)}:", ""]
        lines += [f"| variant | {' | '.join(settings)} |", _rule(len(settings) + 1)]
        for name in names:
            shown = [_ratio(figures[setting].get(name)) for setting in settings]
            lines.append(f"| {name} | {' | '.join(shown)} |")
        factors = {name: first[f"factor: {name}"]["speedup"] for name in ablation.FACTORS if f"factor: {name}" in first}
        if factors:
            product = 1.0
            for factor in factors.values():
                product *= factor
            text = " × ".join(f"{name} {factor:.2f}" for name, factor in factors.items())
            lines += ["", f"The gain over the traffic of transformers' offloaded cache: {text} = {product:.2f}."]
        lines.append("")
    return "\n".join(lines).strip()


def bars(decode: Sequence[Row]) -> list[Bar]:
    """The share of the bound of every mode, GPU rows first."""
    found = [
        Bar(f"{row['x']}, {_link_kind([row])}\n{row['device']}", row["provider"], float(row["p50"]))
        for row in sorted(decode, key=lambda row: not is_gpu(row))
        if row["metric"] == "fraction_of_bound" and row["provider"] in MODES
    ]
    return found


def _figures(found: Iterable[Row]) -> dict[str, dict[str, float]]:
    """provider -> metric -> median."""
    table: dict[str, dict[str, float]] = {}
    for row in found:
        if row["p50"]:
            table.setdefault(row["provider"], {})[row["metric"]] = float(row["p50"])
    return table


def _groups(found: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in found:
        groups.setdefault(key(row), []).append(row)
    return groups


def _caption(preset: str, device: str, found: Sequence[Row]) -> str:
    return f"{preset} on {device}, link {found[0]['link']}, {_source(found)}:"


def _preset(row: Row) -> str:
    return str(json.loads(row["config_json"])["preset"])


def _of_newest_commit(found: Sequence[Row]) -> list[Row]:
    """Those of the commit that was measured last: variants of two commits do not compare."""
    newest = max(enumerate(found), key=lambda item: (item[1]["date"], item[0]))[1]["commit"]
    return [row for row in found if row["commit"] == newest]


def _source(found: Sequence[Row]) -> str:
    """Versions and commits as the rows have them, "-dirty" included."""
    versions, commits = (sorted({row[name] for row in found}) for name in ("versions", "commit"))
    return f"{'; '.join(versions)}, commit {', '.join(commits)}"


def _link_kind(found: Sequence[Row]) -> str:
    return "own link" if is_gpu(found[0]) else "emulated link"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _ratio(figures: dict[str, float] | None) -> str:
    return f"{figures['step_over_everything_on']:.2f}" if figures else ""


def _mark(is_best: bool, text: str) -> str:
    return f"**{text}**" if is_best else text
