"""Kernels compile for GPUs that are not here, and fit them: the interpreter accepts what the compiler does not.

With another release of triton first on PYTHONPATH the same tests speak of that one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KERNELS = {"_segment_kernel", "_merge_kernel", "_finish_kernel", "_rope_kernel", "_linear_rope_kernel"}
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # of one program


def _compiled(folder: Path, capability: int, *options: str) -> list[dict[str, Any]]:
    """What tests/compile_kernels.py prints."""
    pytest.importorskip("triton.backends.nvidia")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(script.parents[1])]).strip(os.pathsep)
    result = subprocess.run(
        [sys.executable, str(script), str(capability), *options],
        env=env | {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def _fits(row: dict[str, Any], capability: int) -> bool:
    """Whether a kernel fits the device's shared memory without spilling registers.

    Attention in float32 may spill: its products are no tensor core's, and no tile is smaller than 16 by 16.
    """
    may_spill = "torch.float32" in row["what"] and row["kernel"] == "_segment_kernel"
    return row["shared_bytes"] <= SHARED_KIB[capability] * 1024 and (may_spill or row["stack_bytes"] == 0)


@pytest.mark.parametrize("capability", [80, *(pytest.param(more, marks=pytest.mark.slow) for more in (90, 120))])
def test_every_kernel_compiles_once_for_all_lengths(capability: int, tmp_path: Path) -> None:
    rows = _compiled(tmp_path, capability)
    assert {row["kernel"] for row in rows} == KERNELS
    assert [row for row in rows if row["variants"] != 1] == []
    assert [row for row in rows if not _fits(row, capability)] == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_every_head_size_dtype_and_option_fits_every_device(capability: int, tmp_path: Path) -> None:
    rows = _compiled(tmp_path, capability, "--all")
    assert {row["kernel"] for row in rows} == KERNELS
    assert len(rows) > 200
    assert [row for row in rows if not _fits(row, capability)] == []
