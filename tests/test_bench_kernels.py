"""The kernel benchmark runs, and its rows say what they claim."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The rows of a quick run on the CPU, as JSON and as CSV."""
    path = tmp_path_factory.mktemp("bench") / "kernels.csv"
    command = [
        sys.executable,
        "scripts/bench_kernels.py",
        "--quick",
        "--device",
        "cpu",
        "--json",
        "-",
        "--csv",
        str(path),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    with path.open(newline="") as file:
        return json.loads(result.stdout), list(csv.DictReader(file))


def test_every_number_stands_beside_its_bound(rows: Any) -> None:
    found = {(row["metric"], row["provider"]) for row in rows[0]}
    assert {provider for metric, provider in found if metric == "attention_kv"} == {
        "ours",
        "sdpa",
        "sdpa_token_major",
        "copy",
        *("int8", "int4", "int2"),  # of forms; only bfloat16 is packed
    }
    assert {provider for metric, provider in found if metric == "recompute"} == {"mm_rope", "mm"}


def test_rows_have_units_shapes_and_positive_numbers(rows: Any) -> None:
    for row in rows[0]:
        assert row["unit"] == {"attention_kv": "GB/s", "recompute": "TFLOP/s"}[row["metric"]]
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert json.loads(row["config_json"])["dtype"] == "float32"
    assert [row["p50"] for row in rows[1]] == [row["p50"] for row in rows[0]]
