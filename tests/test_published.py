"""What docs/performance.md says of measurements is what the rows say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from run_script import run_script
from typer.testing import Result

from campaign import published, rows

ROOT = Path(__file__).parents[1]


def _report(*args: str) -> Result:
    return run_script("report", *args)


def test_the_page_and_its_figure_agree_with_the_rows() -> None:
    done = _report("--check")
    assert done.exit_code == 0, done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Page, figure and rows in another folder."""
    shutil.copytree(ROOT / "scripts" / "results", tmp_path / "results")
    shutil.copytree(ROOT / "docs" / "figures", tmp_path / "docs" / "figures")
    shutil.copy(ROOT / "docs" / "performance.md", tmp_path / "docs")
    return tmp_path


def test_a_changed_row_fails_the_check_and_writing_mends_it(copy: Path) -> None:
    where = ("--root", str(copy), "--results", str(copy / "results"))
    path = copy / "results" / "decode.csv"
    found = rows.load(path)
    changed = next(row for row in found if row["metric"] == "fraction_of_bound" and row["provider"] == "planned")
    rows.save(path, [row | ({"p50": "0.123"} if row is changed else {}) for row in found])
    done = _report("--check", *where)
    assert done.exit_code == 1
    assert "docs/performance.md, docs/figures/share_of_bound.svg disagree" in done.stderr
    assert _report(*where).exit_code == 0
    assert _report("--check", *where).exit_code == 0
    assert "0.123" in (copy / "docs" / "performance.md").read_text()


def test_an_edited_number_of_the_page_fails_the_check(copy: Path) -> None:
    page = copy / "docs" / "performance.md"
    text = page.read_text()
    begin = text.index("<!-- results:performance -->")
    end = text.index("<!-- /results:performance -->")
    page.write_text(text[:begin] + text[begin:end].replace("of the bound", "of the bounds", 1) + text[end:])
    done = _report("--check", "--root", str(copy))
    assert done.exit_code == 1
    assert "docs/performance.md disagree" in done.stderr


def _decode(link: str, device: str) -> list[rows.Row]:
    metrics = {"decode_step": 0.2, "bound_step": 0.19, "fraction_of_bound": 0.95, "link_utilization": 0.9}
    metrics |= {"speedup_vs_full_transfer": 1.5}
    return [
        rows.row("decode", "planned", metric, "", "opt-6.7b", [value], {"preset": "opt-6.7b"}, link, device=device)
        for metric, value in metrics.items()
    ]


def test_without_a_gpu_row_the_section_says_so_first() -> None:
    emulated = _decode("emulated 0.1 GB/s", "CPU (2 threads)")
    assert published.performance([]) == published.NO_GPU
    assert published.performance(emulated).startswith(published.NO_GPU)
    measured = published.performance([*emulated, *_decode("measured pinned 25 GB/s", "NVIDIA A100")])
    assert published.NO_GPU not in measured
    assert "**opt-6.7b: 0.95 of the bound**" in measured
    assert "NVIDIA A100" in measured


def test_the_comparison_marks_the_fastest_and_says_where_not_to_offload() -> None:
    def row(provider: str, cell: str, value: float, metric: str = "decode_tokens_per_s") -> rows.Row:
        return rows.row("campaign", provider, metric, "1/s", cell, [value], {}, "emulated 1 GB/s")

    found = [row("planned", "long", 10), row("planned", "long", 0.97, "fraction_of_bound"), row("kvpr", "long", 5)]
    text = published.comparison(found)
    assert "| long | 5.00 | **10.00** | 0.970 |" in text
    assert "in parts" not in text  # no row says so
    assert "A dash" not in text
    parts = published.comparison([*found, row("sub_batches", "half", 100), row("planned", "half", 10)])
    assert "In half a part of the batch fits" in parts
    assert "| half | **100.00** | – | 10.00 |" in parts
    assert "A dash is a cell" in parts
    # a part of the batch has short steps, and the batch has many parts
    slow = [row("sub_batches", "half", 8), row("sub_batches", "half", 0.01, "tpot")]
    slow += [row("planned", "half", 10), row("planned", "half", 0.1, "tpot")]
    assert "In half" not in published.comparison(slow)


def test_a_dirty_commit_is_called_dirty() -> None:
    found = [row | {"commit": "abc1234-dirty-1a2b3c"} for row in _decode("emulated 0.1 GB/s", "CPU (2 threads)")]
    assert "commit abc1234-dirty-1a2b3c:" in published.performance(found)


def test_parts_are_those_of_the_newest_commit_alone() -> None:
    def row(name: str, value: float, commit: str, date: str) -> rows.Row:
        made = rows.row(
            "ablation", name, "step_over_everything_on", "", "slow", [value], {"preset": "p"}, "emulated 1 GB/s"
        )
        return made | {"commit": commit, "date": date}

    old = [row("everything on", 1.0, "old", "2026-01-01"), row("gone", 3.0, "old", "2026-01-01")]
    new = [row("everything on", 1.0, "new", "2026-01-02"), row("there", 2.0, "new", "2026-01-02")]
    for found in ([*old, *new], [*new, *old]):
        text = published.parts(found)
        assert "| there | 2.00 |" in text
        assert "gone" not in text
        assert "commit new:" in text


def test_the_gpu_suite_lists_its_steps_in_order_without_a_gpu() -> None:
    command = ["bash", str(ROOT / "scripts" / "gpu_suite.sh"), "--tier", "2", "--dry-run"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    order = ("cli env", "not sanitizer", "-k sanitizer", "test_segment_attention", "bench_kernels", "cli profile")
    order += ("bench_transfer", "bench_decode", "bench_campaign", "ablation")
    firsts = [next(idx for idx, line in enumerate(lines) if step in line) for step in order]
    assert firsts == sorted(firsts)
    assert all(line.startswith("up to ") and " s  writes " in line for line in lines)
