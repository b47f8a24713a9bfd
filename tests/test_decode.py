"""Rows of decoding: what is known of each when it is complete, and how it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench_decode import save_csv

from campaign.rows import load
from kvoffload.bench import decode


def _row(mode: str, step_s: float) -> dict[str, Any]:
    shares = dict.fromkeys(("fraction_of_bound", "link_utilization", "split_fraction"), 0.5)
    sizes = {"device_kv_peak_decode_bytes": 1000, "bound_step_s": step_s / 2}
    where = {"device": "NVIDIA Fake", "link": "measured pinned 20.000 GB/s"}
    return {"mode": mode, "decode_step_s": [step_s], "decode_step_s_p50": step_s} | shares | sizes | where


def test_speedups_are_there_once_full_transfer_was_measured() -> None:
    found = {"planned": _row("planned", 0.2)}
    decode._compare(found)
    assert found["planned"]["speedup_vs_full_transfer"] is None
    found["full_transfer"] = _row("full_transfer", 0.5)
    decode._compare(found)
    assert [row["speedup_vs_full_transfer"] for row in found.values()] == [2.5, 1.0]


def test_a_row_is_saved_alone_and_again_when_more_is_known_of_it(tmp_path: Path) -> None:
    path, found = tmp_path / "decode.csv", {"planned": _row("planned", 0.2)}
    decode._compare(found)
    save_csv("opt-6.7b", [found["planned"]], path)
    assert {row["metric"] for row in load(path)} >= {"decode_step", "bound_step", "link_utilization"}
    assert "speedup_vs_full_transfer" not in {row["metric"] for row in load(path)}
    found["full_transfer"] = _row("full_transfer", 0.5)
    decode._compare(found)
    save_csv("opt-6.7b", list(found.values()), path)
    speedups = {row["provider"]: row["p50"] for row in load(path) if row["metric"] == "speedup_vs_full_transfer"}
    assert speedups == {"planned": "2.5", "full_transfer": "1"}
    assert len([row for row in load(path) if row["metric"] == "decode_step"]) == 2
