"""Rows of the sweep over model types, one row per type: `scripts/results/sweep.csv`.

Owns the columns and what a report is in them. Does not own how types are judged (`sweep`), nor the page that is
made of the rows (`sweep_page`).

A mode's column holds one outcome where all splits have the same, else one for each: "transfer:equal recompute:wrong".
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from campaign.rows import Row, commit, versions
from campaign.sweep import CellVerdict, Report
from campaign.sweep_cells import MODES, SPLITS
from kvoffload.errors import ConfigError

SCHEMA = "1"
COLUMNS = (
    *("model_type", "model_class", "cache_layers", "form", *MODES, "whole_layer", "unpaced", "plain"),
    *("host_bytes", "recomputed_tokens", "distinct_tokens", "reach", "error", "warnings", "reasons"),
    *("seconds", "versions", "commit", "date", "schema"),
)
FORMS = ("recomputable", "transferred", "idle", "refused", "short", "not run")
SHORT = ("wrong", "error", "inexact")


def row_of(report: Report) -> Row:
    """A report as a row."""
    verdicts = report.verdicts
    by_mode = {mode: {way: v for (m, way), v in verdicts.items() if m == mode and way in SPLITS} for mode in MODES}
    others = {way: verdicts.get(("greedy", way)) for way in ("whole_layer", "unpaced")}
    values = {
        "model_type": report.model_type,
        "model_class": report.model_class,
        "cache_layers": report.cache_layers,
        "form": form_of(report),
        **{mode: _outcomes(found) for mode, found in by_mode.items()},
        **{way: verdict.outcome if verdict else "" for way, verdict in others.items()},
        "plain": report.plain,
        "host_bytes": str(max((v.h2d_bytes for v in verdicts.values()), default=0)),
        "recomputed_tokens": str(max((v.recomputed_tokens for v in verdicts.values()), default=0)),
        "distinct_tokens": str(report.distinct),
        "reach": f"{report.reach:.2g}",
        "error": f"{max((v.error for v in verdicts.values()), default=0.0):.2g}",
        "warnings": json.dumps(list(dict.fromkeys(text for v in verdicts.values() for text in v.warnings))),
        "reasons": json.dumps(_reasons(verdicts)),
        "seconds": f"{report.seconds:.1f}",
        "versions": versions(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "schema": SCHEMA,
    }
    return {name: values[name] for name in COLUMNS}


def form_of(report: Report) -> str:
    """How its cache is held: one of `FORMS`; "short" where something went wrong.

    "idle" is equal without a byte from the host: the model caches nothing.
    """
    found = report.verdicts
    outcomes = {verdict.outcome for verdict in found.values()}
    if report.plain or not outcomes - {"plain"}:
        return "not run"
    if outcomes & set(SHORT):
        return "short"
    if "equal" not in outcomes:
        return "refused"
    if not any(verdict.h2d_bytes for verdict in found.values()):
        return "idle"
    return "recomputable" if any(verdict.recomputed_tokens for verdict in found.values()) else "transferred"


def shortcomings(row: Row) -> str:
    """What is wrong with a type, in one line; empty where nothing is."""
    columns = [name for name in (*MODES, "whole_layer", "unpaced") if any(word in row[name] for word in SHORT)]
    reasons = [reason for reason in json.loads(row["reasons"]) if reason.startswith(SHORT)]
    return "; ".join([*(f"{name}: {row[name]}" for name in columns), *reasons])


def _outcomes(found: dict[str, CellVerdict]) -> str:
    outcomes = {way: verdict.outcome for way, verdict in found.items()}
    if len(set(outcomes.values())) <= 1:
        return next(iter(outcomes.values()), "")
    return " ".join(f"{way}:{outcome}" for way, outcome in outcomes.items())


def _reasons(verdicts: Mapping[tuple[str, str], CellVerdict]) -> dict[str, str]:
    """Each reason, and the modes and ways that gave it."""
    cells: dict[str, list[str]] = {}
    for (mode, way), verdict in verdicts.items():
        if verdict.reason:
            cells.setdefault(f"{verdict.outcome}: {verdict.reason}", []).append(f"{mode}/{way}")
    rest = [f"{mode}/{way}" for (mode, way), verdict in verdicts.items() if verdict.outcome != "plain"]
    return {reason: "all" if where == rest else _shortened(where) for reason, where in cells.items()}


def _shortened(cells: list[str]) -> str:
    """Cells in words: a mode alone where all its splits are meant."""
    for mode in MODES:
        every = [f"{mode}/{way}" for way in SPLITS]
        if set(every) <= set(cells):
            cells = [mode, *(cell for cell in cells if cell not in every)]
    return " ".join(cells)


# ---- files -----------------------------------------------------------------------------------------------------------


def load(path: Path) -> list[Row]:
    """All rows of a file; none if there is no file.

    Raises:
        ConfigError: it holds something else.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            found = list(reader)
            columns = tuple(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} holds no rows of a sweep: {error}") from error
    if columns != COLUMNS or {one["schema"] for one in found} - {SCHEMA}:
        raise ConfigError(
            f"{path} holds other rows than those of a sweep of schema {SCHEMA}: move it away, or write to another file "
            "with --csv"
        )
    return found


def check(path: Path) -> None:
    """Whether rows can be added to a file, before they are made; its folder is made if there is none.

    Raises:
        ConfigError: it holds something else, or cannot be replaced.
    """
    load(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"cannot add rows to {path}: {error.strerror}; choose another file with --csv") from error


def save(path: Path, new: Iterable[Row]) -> None:
    """Add rows to a file, in place of those of the same types; sorted by type."""
    found = {one["model_type"]: one for one in (*load(path), *new)}
    partial = path.with_suffix(".partial")  # an interruption leaves the old file
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found[kind] for kind in sorted(found))
    os.replace(partial, path)


def done(found: Sequence[Row]) -> set[str]:
    """Types that these versions at this commit have judged."""
    here = (versions(), commit())
    return {one["model_type"] for one in found if (one["versions"], one["commit"]) == here}
