"""Result rows: `scripts/results/<bench>.csv`, one row per measured number, keyed so that a rerun replaces.

Columns: bench, provider, metric, unit, x, p20, p50, p80, config_json, device, link, versions, commit, date.
"""

from __future__ import annotations

import csv
import datetime
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from kvoffload.bench import device_name

RESULTS = Path(__file__).parent / "results"
COLUMNS = [
    "bench",
    "provider",
    "metric",
    "unit",
    "x",
    "p20",
    "p50",
    "p80",
    "config_json",
    "device",
    "link",
    "versions",
    "commit",
    "date",
]
KEY = ["bench", "provider", "metric", "x", "config_json", "device", "link"]


def row(
    bench: str,
    provider: str,
    metric: str,
    unit: str,
    x: Any,
    samples: Sequence[float],
    config: dict[str, Any],
    link: str,
) -> dict[str, Any]:
    """One row from its samples."""
    p20, p50, p80 = (float(np.percentile(samples, q)) for q in (20, 50, 80))
    return {
        "bench": bench,
        "provider": provider,
        "metric": metric,
        "unit": unit,
        "x": x,
        "p20": f"{p20:.6g}",
        "p50": f"{p50:.6g}",
        "p80": f"{p80:.6g}",
        "config_json": json.dumps(config, sort_keys=True),
        "device": device_name(),
        "link": link,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def save(path: Path, new: list[dict[str, Any]]) -> None:
    """Add rows to a file; a row with the same key replaces the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    keys = {tuple(str(r[k]) for k in KEY) for r in new}
    kept = [r for r in old if tuple(r[k] for k in KEY) not in keys]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(kept + new)


def _commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return result.stdout.strip() or "unknown"
