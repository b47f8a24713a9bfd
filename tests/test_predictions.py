"""The cost model against the engine, on combinations nobody chose."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvoffload.bench import core_for_the_link, predictions
from kvoffload.bench.predictions import Checked, Combination
from kvoffload.types import HardwareProfile

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
