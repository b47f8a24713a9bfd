"""Kernels compile for GPUs that are not here: the interpreter accepts what the compiler does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("capability", [80, *(pytest.param(more, marks=pytest.mark.slow) for more in (89, 90))])
def test_every_kernel_compiles_once_for_all_lengths(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(script.parents[1])}
    result = subprocess.run(
        [sys.executable, str(script), str(capability)], env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == {
        "_segment_kernel",
        "_merge_kernel",
        "_finish_kernel",
        "_rope_kernel",
        "_linear_rope_kernel",
    }
    limit = {80: 163, 89: 99, 90: 227}[capability] * 1024  # of one program
    for row in rows:
        assert row["shared_bytes"] <= limit, row
        assert row["variants"] == 1, row
