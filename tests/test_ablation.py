"""The ablation: every variant is the product with one part off, and the factors multiply to the whole gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvoffload.bench import PRESETS, Lab, ablation
from kvoffload.bench.ablation import FACTORS, FULL, Found, Setting, factors, settings, variants
from kvoffload.types import HardwareProfile


@pytest.fixture(scope="module")
def measured() -> tuple[list[dict[str, str]], list[Any]]:
    """The quick ablation of the small shape, on a recorded machine."""
    recorded = HardwareProfile.load(Path(__file__).parent / "data" / "profile_emulated_2_threads.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "load_or_measure", lambda: recorded)
        return ablation.run("cpu-small", new_tokens=5, rounds=1, quick=True, tell=lambda _: None)


def _values(rows: list[dict[str, str]], metric: str, x: str) -> dict[str, float]:
    return {row["provider"]: float(row["p50"]) for row in rows if row["metric"] == metric and row["x"] == x}


def test_all_variants_are_measured_and_compared_with_everything_on(measured: Any) -> None:
    rows, tables = measured
    plain = rows[0]["x"]
    steps = _values(rows, "decode_step", plain)
    assert {variant.name for variant in variants(Lab(PRESETS["cpu-small"]))} < set(steps)
    ratio = _values(rows, "step_over_everything_on", plain)
    assert ratio[FULL] == 1
    assert ratio["scheduler off"] == pytest.approx(steps["scheduler off"] / steps[FULL], rel=1e-4)
    assert "gain over the traffic" in str(tables[0].caption)
    assert {row["x"] for row in rows} == {
        f"{link}, {memory} memory, {load} cores"
        for link, memory, load in (
            ("slow link", "min", "idle"),
            ("fast link", "min", "idle"),
            ("slow link", "half", "idle"),
            ("slow link", "min", "loaded"),
        )
    }


def test_one_token_blocks_are_written_at_every_step_and_whole_layers_in_both_directions(measured: Any) -> None:
    rows, _ = measured
    written = _values(rows, "d2h_bytes", rows[0]["x"])
    p = PRESETS["cpu-small"]
    token_bytes = p.layers * p.batch * 2 * p.hidden * 4  # keys and values, float32
    assert written["full_transfer"] == pytest.approx(p.cached_tokens * token_bytes, rel=1e-5)  # the prompt, in blocks
    assert written["whole_layer_fetched"] == pytest.approx(p.cached_tokens * token_bytes, rel=1e-5)
    steps = range(p.cached_tokens, p.cached_tokens + 5)
    assert written["whole_layer_both_ways"] == pytest.approx(sum(steps) * token_bytes, rel=1e-5)
    assert written["write-back per step"] != written[FULL]


def test_half_the_cache_on_the_device_halves_the_step_of_a_link_bound_plan(measured: Any) -> None:
    rows, _ = measured
    plain, half = (_values(rows, "link_utilization", x) for x in ("slow link, min memory, idle cores",) * 2)
    assert plain == half
    moved = {x: _values(rows, "decode_step", x) for x in {row["x"] for row in rows}}
    assert moved["slow link, half memory, idle cores"][FULL] < moved["slow link, min memory, idle cores"][FULL]


def test_the_factors_multiply_to_the_whole_gain() -> None:
    def found(seconds: float) -> Found:
        return Found([seconds], None, None, None)

    steps = {"whole_layer_both_ways": 8.0, "whole_layer_fetched": 6.0, "full_transfer": 4.0, FULL: 2.0}
    shown = factors({name: found(seconds) for name, seconds in steps.items()})
    assert list(shown) == list(FACTORS)
    assert shown["write-back"] * shown["overlap"] * shown["split"] == pytest.approx(4.0)
    assert factors({FULL: found(1.0)}) == {}


def test_without_quick_every_combination_of_link_memory_and_load_is_measured() -> None:
    lab = Lab(PRESETS["cpu-small"])
    assert len(set(settings(lab, quick=False))) == 8
    assert settings(lab, quick=False)[0] == settings(lab, quick=True)[0] == Setting("slow link", "min", "idle")
