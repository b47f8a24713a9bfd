"""Whether offloading helps: the judgement itself, and the pages that are made of it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_script import run_script
from test_comparison import task
from typer.testing import Result

from kvoffload.advise.comparison import WayFigures, compare_ways
from kvoffload.advise.task import Task
from kvoffload.advise.verdict import LEAST_GAIN, Verdict, judge, of_rows
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.planning.workload import Workload

ROOT = Path(__file__).parents[1]


def ways(**tokens_per_s: float) -> tuple[WayFigures, ...]:
    """Rows of the ways that work, with 1000 tokens each, and of the others, which say why they do not."""
    names = ("on_device", "sub_batches", "offload", "full_transfer", "kvpr")
    rates = {name: tokens_per_s.get(name, 0.0) for name in names}
    return tuple(
        WayFigures(name, "", runs=3, tokens_per_s=rate, total_s=1000 / rate) if rate else WayFigures(name, f"no {name}")
        for name, rate in rates.items()
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ways(on_device=9.0, offload=9.0, full_transfer=9.0), Verdict("fits", 1.0, 1.0)),
        (ways(offload=3.0, full_transfer=2.0), Verdict("faster", 1.5, 1.5)),
        (ways(offload=2.0, full_transfer=2.0), Verdict("only way", 1.0, 1.0)),
        (ways(offload=2.0), Verdict("faster", math.inf, math.inf)),
        (ways(sub_batches=8.0, offload=4.0, full_transfer=2.0), Verdict("parts", 0.5, 2.0, 3)),
        (ways(sub_batches=4.0, offload=4.0 * (LEAST_GAIN - 0.01), full_transfer=2.0), Verdict("parts", 1.04, 2.08, 3)),
        (ways(sub_batches=2.0, offload=6.0, full_transfer=4.0), Verdict("faster", 1.5, 1.5)),
        (ways(sub_batches=4.0, offload=6.0, full_transfer=2.0), Verdict("faster", 1.5, 3.0)),
        (ways(sub_batches=2.0), Verdict("parts", parts=3)),
        (ways(), Verdict("nothing", reason="on_device")),
    ],
)
def test_the_gain_is_over_the_best_alternative_that_works(rows: tuple[WayFigures, ...], expected: Verdict) -> None:
    found = of_rows(rows)
    assert found._replace(gain=0, gain_together=0, reason="") == expected._replace(gain=0, gain_together=0, reason="")
    assert (found.gain, found.gain_together) == pytest.approx((expected.gain, expected.gain_together))


@pytest.mark.parametrize(
    ("preset", "workload", "answer"),
    [
        ("a100-40gb-pcie4", Workload(batch=1, prompt_tokens=1024, new_tokens=128), "fits"),
        ("a100-40gb-pcie4", Workload(batch=64, prompt_tokens=1024, new_tokens=128), "parts"),
        ("a100-40gb-pcie4", Workload(batch=1, prompt_tokens=100_000, new_tokens=128), "faster"),
        ("a100-40gb-pcie4", Workload(batch=1, prompt_tokens=8192, new_tokens=128, num_beams=8), "faster"),
        ("t4-16gb-pcie3", Workload(batch=1, prompt_tokens=16384, new_tokens=128), "faster"),
    ],
)
def test_a_task_is_judged_by_its_forecast(preset: str, workload: Workload, answer: str) -> None:
    one = task(profile=HardwareProfile.preset(preset), workload=workload)
    one = one._replace(config=replace(one.config, speculate="off"))
    found = judge(one)
    assert found.answer == answer
    if answer == "faster":
        works = {row.name: row.tokens_per_s for row in compare_ways(one) if not row.problem}
        others = [rate for name, rate in works.items() if name in ("on_device", "sub_batches", "full_transfer")]
        assert found.gain == pytest.approx(works["offload"] / max(others))


def run(*arguments: object) -> Result:
    return run_script("will_it_help", *arguments)


@pytest.fixture
def judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell is judged in the first run alone."""
    found: dict[Any, Verdict] = {}

    def remembered(asked: Task) -> Verdict:
        key = (asked.shape, asked.workload, asked.profile.device_name, asked.config)
        if key not in found:
            found[key] = judge(asked)
        return found[key]

    monkeypatch.setattr("kvoffload.advise.verdict.judge", remembered)


@pytest.mark.usefixtures("judged_once")
def test_the_pages_say_what_plan_predicts_now(tmp_path: Path) -> None:
    done = run("--check")
    assert done.exit_code == 0, done.exception
    (tmp_path / "docs").mkdir()
    pages = [tmp_path / "README.md", tmp_path / "docs" / "will-it-help.md"]
    texts = [(ROOT / page.relative_to(tmp_path)).read_text(encoding="utf-8") for page in pages]
    for changed, text in zip(pages, texts, strict=True):
        for page, original in zip(pages, texts, strict=True):
            page.write_text(original, encoding="utf-8")
        changed.write_text(re.sub(r"\*\*\d\.\dx\*\*", "**9.9x**", text, count=1), encoding="utf-8")
        assert changed.read_text(encoding="utf-8") != text
        assert f"{changed} differs from what plan predicts now: run scripts/will_it_help.py --write" in (
            str(run("--check", "--root", tmp_path).exception)
        )
        assert run("--write", "--root", tmp_path).exit_code == 0
        assert changed.read_text(encoding="utf-8") == text
    pages[1].write_text("no markers")
    assert "has no markers" in str(run("--write", "--root", tmp_path).exception)
    in_short, table = (
        text.partition("<!-- will-it-help:begin -->")[2].partition("<!-- will-it-help:end -->")[0] for text in texts
    )
    assert in_short.count("\n- ") == 5
    assert "**not measured**" in table
    assert table.count("\n| ") <= 30  # tables that can be read
    assert len(run().stdout.splitlines()) == 7 * (7 * 3 + 2)
