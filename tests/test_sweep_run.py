from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from campaign.rows import Row
from campaign.sweep import CellVerdict, Report
from campaign.sweep_run import run


def scripted(model_type: str, cells: Iterable[tuple[str, str]], on_stage: Callable[[str], Any]) -> Report:
    """Types that do what their names say; run in another process."""
    on_stage("plain greedy")
    if model_type == "dies in transformers":
        os._exit(3)
    on_stage("greedy/half")
    if model_type == "dies":
        os._exit(4)
    if model_type == "hangs":
        time.sleep(600)
    return Report(model_type, verdicts={cell: CellVerdict("equal") for cell in cells}, plain=str(os.getpid()))


def test_a_type_that_ends_its_process_or_hangs_costs_only_its_own_row() -> None:
    found: dict[str, Row] = {}
    types = ["one", "two", "dies", "hangs", "dies in transformers", "three"]
    run(types, lambda row: found.update({row["model_type"]: row}), judge=scripted, limit_s=2, jobs=2)
    assert set(found) == set(types)
    assert found["dies"]["form"] == found["hangs"]["form"] == "short"
    assert "the process ended with code 4 at: greedy/half" in found["dies"]["reasons"]
    assert "took longer than 2 s at: greedy/half" in found["hangs"]["reasons"]
    assert found["dies in transformers"]["form"] == "not run"
    assert found["dies in transformers"]["plain"] == "the process ended with code 3 at: plain greedy"
    assert found["one"]["plain"] != str(os.getpid())
