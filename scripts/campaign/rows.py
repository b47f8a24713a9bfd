"""Result rows: `scripts/results/<bench>.csv`, one row per measured number.

Owns the columns and the reading and writing of the files. Does not own what is measured. A rerun of one provider at
one x replaces all of its rows there.

A row with the metric "skipped" stands for something that was not measured; its `note` says why. `p20`, `p50` and
`p80` are of `repeats` samples, so p20 and p80 are the spread.
"""

from __future__ import annotations

import csv
import datetime
import functools
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from kvoffload.bench.lab import device_and_threads
from kvoffload.errors import ConfigError

SCHEMA = "2"
COLUMNS = (
    *("bench", "provider", "metric", "unit", "x", "p20", "p50", "p80", "repeats", "note", "config_json"),
    *("device", "link", "versions", "commit", "date", "schema"),
)
SUBJECT = ("bench", "provider", "x", "config_json", "device")  # and whether the link is emulated
SKIPPED = "skipped"
WRITTEN = ("scripts/results", "docs/performance.md", "docs/figures", "docs/models.md")  # by benchmarks and their pages
Row = dict[str, str]


def row(
    bench: str,
    provider: str,
    metric: str,
    unit: str,
    x: Any,
    samples: Sequence[float],
    config: dict[str, Any],
    link: str,
    note: str = "",
    device: str | None = None,
) -> Row:
    """One row from its samples; without samples the three percentiles are empty. `device` is this one by default."""
    percentiles = [f"{float(np.percentile(samples, q)):.6g}" for q in (20, 50, 80)] if samples else [""] * 3
    values = [bench, provider, metric, unit, str(x), *percentiles, str(len(samples)), note]
    values += [config_text(config), device or device_and_threads(), link, versions(), commit()]
    values += [datetime.date.today().isoformat(), SCHEMA]
    return dict(zip(COLUMNS, values, strict=True))


def config_text(config: dict[str, Any]) -> str:
    """A configuration as rows hold it."""
    return json.dumps(config, sort_keys=True)


def skipped(bench: str, provider: str, x: Any, config: dict[str, Any], link: str, why: str) -> Row:
    """A row for what could not be measured."""
    return row(bench, provider, SKIPPED, "", x, [], config, link, why)


def load(path: Path) -> list[Row]:
    """All rows of a file; none if there is no file.

    Raises:
        ConfigError: the file is of another schema, and names its version; or it is no text.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            found = list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{path} holds no rows: {error}") from error
        columns = tuple(reader.fieldnames or ())
    schemas = {one.get("schema") or "1" for one in found} or {SCHEMA if columns == COLUMNS else "1"}
    if columns != COLUMNS or schemas != {SCHEMA}:
        raise ConfigError(
            f"{path} holds rows of schema {', '.join(sorted(schemas))}, this release reads and writes schema {SCHEMA}: "
            "move the file away, or write to another one"
        )
    return found


def check(path: Path, option: str = "--csv") -> None:
    """Whether rows can be added to a file, before they are measured; its folder is made if there is none.

    Args:
        path: the file.
        option: of the script that names it.

    Raises:
        ConfigError: the file is of another schema, or cannot be replaced.
    """
    try:
        load(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"cannot add rows to {path}: {error.strerror}; choose another file with {option}") from error


def save(path: Path, new: Sequence[Row]) -> None:
    """Add rows to a file, in place of all rows of the same subjects.

    Raises:
        ConfigError: the file is of another schema; nothing is written.
    """
    replaced = {_subject(one) for one in new}
    kept = [one for one in load(path) if _subject(one) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")  # an interruption leaves the old file
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *new])
    os.replace(partial, path)


def done(rows: Iterable[Row]) -> set[tuple[str, ...]]:
    """(bench, provider, x, config) of what these versions at this commit have measured on this device.

    What was skipped is not: its reason may be gone.
    """
    here = (device_and_threads(), versions(), commit())
    measured = (one for one in rows if one["metric"] != SKIPPED)
    found = (one for one in measured if (one["device"], one["versions"], one["commit"]) == here)
    return {(one["bench"], one["provider"], one["x"], one["config_json"]) for one in found}


def is_gpu(one: Row) -> bool:
    """Whether a row was measured on a GPU's own link."""
    return not one["link"].startswith("emulated") and " thread" not in one["device"]


def _subject(one: Row) -> tuple[str, ...]:
    return (*(one[name] for name in SUBJECT), str(one["link"].startswith("emulated")))


def versions() -> str:
    """Of what decides how fast a row is, and what it says."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


@functools.cache
def commit() -> str:
    """The commit of this source tree; "unknown" where it is none. `$KVOFFLOAD_COMMIT` names that of a copy without git.

    With changes to tracked files "-dirty-" and a hash of them, so that rows of other changes are other rows. What a
    benchmark writes itself is no change: `WRITTEN`.
    """
    return os.environ.get("KVOFFLOAD_COMMIT") or _commit_of(Path(__file__).parent)


def _commit_of(folder: Path) -> str:
    name = _git(folder, "describe", "--always").decode().strip()
    if not name:
        return "unknown"
    changes = _git(folder, "diff", "HEAD", "--", ":(top)", *(f":(top,exclude){path}" for path in WRITTEN))
    return f"{name}-dirty-{hashlib.sha256(changes).hexdigest()[:6]}" if changes else name


def _git(folder: Path, *args: str) -> bytes:
    try:
        return subprocess.run(["git", *args], capture_output=True, cwd=folder, check=False).stdout
    except OSError:  # no git
        return b""
