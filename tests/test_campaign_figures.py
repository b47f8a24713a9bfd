"""Figures that the campaign works out of its runs: sameness, use of memory, and the bound."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from campaigns import tiny_cell

from campaign import campaign
from campaign.providers import Ours
from campaign.serving import Sameness, ServedGroup
from kvoffload.advise.utilization import memory_bytes_per_s
from kvoffload.machine.hardware_profile import HardwareProfile


@pytest.mark.parametrize(
    "same", [Sameness(float("nan"), float("nan"), None), Sameness(0.0, 0.0, 2), Sameness(6e-6, 0.0, None)]
)
def test_what_cannot_be_compared_is_not_equal(same: Sameness) -> None:
    campaign._must_be_equal(Ours("planned"), tiny_cell(), Sameness(5e-6, 0.0, None))
    with pytest.raises(AssertionError, match="its times mean nothing"):
        campaign._must_be_equal(Ours("planned"), tiny_cell(), same)


def test_utilization_is_of_all_tokens_and_of_the_steps_that_ran(tmp_path: Path) -> None:
    class Task:
        profile = HardwareProfile.load(Path(__file__).parent / "data" / "profile_emulated_2_threads.json")

        def step_bytes(self, batch: int) -> float:
            return 1000.0 + 100.0 * batch

    task: Any = Task()
    peak = memory_bytes_per_s(task.profile)
    # two sequences in 2 steps, one sequence in 1 step that gave two tokens
    groups = [ServedGroup(2, 0.0, [1.0, 1.5, 2.0]), ServedGroup(1, 2.0, [3.0, 4.0, 4.0])]
    assert campaign._mbu(task, groups) == pytest.approx((2 * 1200 + 1 * 1100) / (peak * 2.0))


def test_the_bound_is_the_lower_of_both_and_stands_beside_even_steps() -> None:
    stats = SimpleNamespace(
        decode_step_s=[100.0, 100.0, 2.0, 4.0, 3.0],
        plan=SimpleNamespace(num_blocks=4, split_fraction=0.25),
        setup_s=7.0,
        prediction_error_fraction=-0.1,
    )
    lab = SimpleNamespace(bound_s=lambda mode, rates, like: rates)
    bed, runs, rates = SimpleNamespace(cell=tiny_cell(), lab=lab), [SimpleNamespace(stats=stats)], (2.0, 1.5)
    for measured_around in (rates, rates[::-1]):
        found: dict[str, Any] = {}
        campaign._add_bound(found, Ours("planned"), bed, runs, measured_around)  # type: ignore[arg-type]
        assert found["decode_step"] == ("s", [2.0, 4.0, 3.0])
        assert found["bound_step"] == ("s", [1.5])
        assert found["fraction_of_bound"] == ("fraction", [0.5])
        assert found["setup"] == ("s", [7.0])
        assert found["prediction_error"] == ("fraction", [0.1])
