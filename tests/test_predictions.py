"""The cost model against the engine, on combinations nobody chose."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from campaign import predictions
from campaign.predictions import Checked, Combination
from kvoffload.bench import PRESETS, Lab, core_for_the_link
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.planning.rates import Rates

ONE = Combination(2, 256, 4, 0.3)


def test_combinations_are_random_and_the_same_for_the_same_seed() -> None:
    drawn = predictions.draw(30, seed=0)
    assert drawn == predictions.draw(30, seed=0) != predictions.draw(30, seed=1)
    assert len(set(drawn)) == 30
    assert {one.batch for one in drawn} == set(predictions.BATCHES)
    assert min(one.recompute_to_link for one in drawn) < 0.5 < 2 < max(one.recompute_to_link for one in drawn)


@pytest.mark.parametrize(
    ("link_over_device", "measured_s", "is_within"),
    [(1.6, 1.04, True), (1.6, 1.06, False), (1.4, 1.06, True), (1.4, 0.89, False)],
)
def test_a_link_bound_step_is_held_to_five_percent_any_other_to_ten(
    link_over_device: float, measured_s: float, is_within: bool
) -> None:
    assert Checked(ONE, 1.0, measured_s, link_over_device, "emulated 1 GB/s").is_within is is_within


def _lab(one: Combination) -> Lab:
    changes = {"batch": one.batch, "cached_tokens": one.context, "recompute_to_link": one.recompute_to_link}
    return Lab(dataclasses.replace(PRESETS["cpu-balanced"], **changes))


def test_recomputation_is_what_a_step_takes_longer_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = _lab(ONE)
    speed, seen = lab.bytes_per_s, []

    def step_s(lab: Lab, profile: HardwareProfile, new_tokens: int, split: float) -> float:
        seen.append((lab.bytes_per_s, split))
        return 0.2 + 0.3 * split

    monkeypatch.setattr(predictions, "_step_s", step_s)
    rates = predictions.engine_rates(lab, None, 8)  # type: ignore[arg-type]
    assert seen == [(predictions.FAST_BYTES_PER_S, 0.0), (predictions.FAST_BYTES_PER_S, 1.0)]
    assert rates.restore_s_per_token["activation"] == pytest.approx(0.3 / (lab.preset.layers * 256))
    assert rates.head_s == 0.2
    assert rates.h2d_bytes_per_s["kv"] == rates.h2d_bytes_per_s["activation"] == lab.bytes_per_s == speed


def test_the_link_over_the_device_is_that_of_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(
        h2d_bytes_per_s={"activation": 1e6, "kv": 1e6},
        restore_s_per_token={"activation": 1e-3},
        attention_s_per_token=0.0,
        dense_s=0.0,
        head_s=0.5,
    )
    monkeypatch.setattr(predictions, "engine_rates", lambda *args: rates)
    monkeypatch.setattr(predictions, "_step_s", lambda *args: 1.0)
    lab = _lab(ONE)
    monkeypatch.setattr(predictions, "Lab", lambda preset: lab)
    checked = predictions.check(ONE, None, 8)  # type: ignore[arg-type]
    activations, kv = 64, 192  # of 256 tokens, at a split of 4/16
    row_bytes = activations * lab.shape.activation_row_bytes + kv * lab.shape.kv_row_bytes
    link_s = lab.preset.layers * ONE.batch * row_bytes / 1e6
    device_s = 0.5 + lab.preset.layers * activations * 1e-3
    assert checked.link_over_device == pytest.approx(link_s / device_s)
    assert checked.measured_s == 1.0


@pytest.mark.timing
def test_a_link_bound_step_is_as_predicted() -> None:
    profile = HardwareProfile.load(Path(__file__).parent / "data" / "profile_emulated_2_threads.json")
    with core_for_the_link():
        for attempt in range(5):
            checked = predictions.check(ONE, profile, new_tokens=8)
            assert checked.is_link_bound
            if checked.is_within or attempt == 4:
                break
    assert checked.is_within, checked
    values = {row["metric"]: float(row["p50"]) for row in predictions.rows_of(checked)}
    assert values["error"] == pytest.approx(values["decode_step"] / values["predicted_step"] - 1, abs=1e-4)
