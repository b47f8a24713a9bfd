"""Rows of benchmarks: what replaces what, of which commit they are, and how they are tabulated."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path

from campaigns import row_of

from campaign import campaign, rows
from campaign.tables import campaign_tables


def test_rows_hold_exact_percentiles() -> None:
    found = rows.row("b", "one", "m", "s", "x", [float(n) for n in range(101)], {}, "emulated")
    assert (found["p20"], found["p50"], found["p80"], found["repeats"]) == ("20", "50", "80", "101")


def test_done_needs_the_commit_and_a_figure() -> None:
    one = row_of("planned", "tpot", 1.0)
    assert rows.done([one]) == {("campaign", "planned", "tiny", "{}")}
    assert rows.done([one | {"commit": "another"}]) == set()
    assert rows.done([rows.skipped("campaign", "planned", "tiny", {}, "emulated", "why")]) == set()


def test_rows_of_another_configuration_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows.save(path, [row_of("planned", "tpot", 1.0, {"n": 1})])
    rows.save(path, [row_of("planned", "tpot", 2.0, {"n": 2})])
    assert [row["p50"] for row in rows.load(path)] == ["1", "2"]


def test_what_benchmarks_write_does_not_make_the_commit_dirty_and_other_changes_have_a_hash(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "core.hooksPath=/dev/null")
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    written = ("scripts/results/a.csv", "docs/performance.md", "docs/figures/f.svg")
    for name in (*written, "code/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = rows._commit_of(tmp_path / "code")
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    for name in written:
        (tmp_path / name).write_text("after\n")
    assert rows._commit_of(tmp_path / "code") == clean
    dirty = []
    for text in ("one\n", "two\n"):
        (tmp_path / "code" / "a.py").write_text(text)
        dirty.append(rows._commit_of(tmp_path / "code"))
        assert re.fullmatch(f"{clean}-dirty-[0-9a-f]{{6}}", dirty[-1])
    assert dirty[0] != dirty[1]
    assert rows._commit_of(tmp_path.parent) == "unknown"


def test_a_rerun_replaces_all_rows_of_its_subject_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"

    def row(provider: str, metric: str, value: float) -> rows.Row:
        return rows.row("b", provider, metric, "s", "x", [value], {"n": 1}, "emulated 1 GB/s")

    rows.save(path, [row("one", "tpot", 1.0), row("one", "ttft", 2.0), row("two", "tpot", 3.0)])
    again = rows.row("b", "one", "tpot", "s", "x", [4.0], {"n": 1}, "emulated 2 GB/s")
    rows.save(path, [again])
    found = {(one["provider"], one["metric"]): one["p50"] for one in rows.load(path)}
    assert found == {("one", "tpot"): "4", ("two", "tpot"): "3"}
    on_gpu = rows.row("b", "one", "tpot", "s", "x", [5.0], {"n": 1}, "PCIe 4.0 x16")
    rows.save(path, [on_gpu])
    assert len(rows.load(path)) == 3
    with path.open(newline="") as file:
        assert json.loads(next(csv.DictReader(file))["config_json"]) == {"n": 1}


def test_a_summary_holds_the_latest_configuration_of_a_cell_alone() -> None:
    old = [row_of("planned", "tpot", 1.0, {"repeats": 1}, "2026-01-01"), row_of("kvpr", "tpot", 2.0, {"repeats": 1})]
    new = row_of("planned", "tpot", 3.0, {"repeats": 5}, "2026-01-02")
    old[1]["date"] = "2026-01-01"
    assert campaign.summary([*old, new]) == {"tiny": {"planned": {"tpot": 3.0}}}
    assert campaign.summary([new, *old]) == {"tiny": {"planned": {"tpot": 3.0}}}


def test_parts_rank_by_the_tokens_of_all_sequences_and_speed_is_over_full_transfer() -> None:
    found = [row_of("sub_batches", "tpot", 0.01), row_of("sub_batches", "decode_tokens_per_s", 5.0)]
    found += [row_of("full_transfer", "tpot", 0.04), row_of("full_transfer", "decode_tokens_per_s", 10.0)]
    found += [row_of("planned", "tpot", 0.02), row_of("planned", "decode_tokens_per_s", 25.0)]
    (table,) = campaign_tables(found)
    assert list(table.columns[0].cells) == ["planned", "full_transfer", "sub_batches"]
    assert table.columns[-1].header == "speed"
    assert list(table.columns[-1].cells) == ["2.50x", "1.00x", "0.50x"]


def test_rows_of_two_devices_stand_in_tables_of_their_own() -> None:
    def on(device: str, provider: str, speed: float) -> rows.Row:
        return row_of(provider, "decode_tokens_per_s", speed) | {"device": device}

    skipped = rows.skipped("campaign", "hf_offloaded", "tiny", {}, "emulated 1 GB/s", "needs CUDA") | {"device": "one"}
    found = [on("one", "full_transfer", 10.0), on("other", "full_transfer", 20.0), on("one", "planned", 15.0), skipped]
    one, reasons, other = campaign_tables([*found, on("other", "planned", 60.0)])
    assert [str(table.title).partition(", ")[0] for table in (one, other)] == ["tiny: one", "tiny: other"]
    assert [list(table.columns[-1].cells) for table in (one, other)] == [["1.50x", "1.00x"], ["3.00x", "1.00x"]]
    assert "not measured on one" in str(reasons.title)
