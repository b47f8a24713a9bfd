"""A step played chunk by chunk, against the formulas of the cost model and the bounds they are."""

from __future__ import annotations

import dataclasses
import random

import closed_forms
import pytest
from placements import LONG, changed, placed, random_placement, with_rates

from kvoffload.planning.simulation import simulate


def test_a_link_bound_pipeline_runs_at_the_speed_of_the_link() -> None:
    inputs = with_rates(LONG, recompute_s_per_token=0.02, attention_s_per_token=0.01)
    for x, t in ((60, 0), (30, 30), (0, 60)):
        simulation = simulate(placed(inputs, 0, 0, x, t), inputs.rates)
        assert simulation.step_s == pytest.approx(closed_forms.link_s(inputs, x, t), rel=0.03)
        assert simulation.link_busy_fraction == pytest.approx(1.0, abs=0.03)


def test_a_compute_bound_pipeline_runs_at_the_speed_of_the_device() -> None:
    inputs = with_rates(LONG, recompute_s_per_token=2.0)
    for r_x, x, t in ((0, 60, 0), (20, 40, 0), (60, 0, 0), (0, 40, 20)):
        simulation = simulate(placed(inputs, 0, r_x, x, t), inputs.rates)
        assert simulation.step_s == pytest.approx(closed_forms.device_s(inputs, r_x, x), rel=0.03)
        assert simulation.device_busy_fraction == pytest.approx(1.0, abs=0.03)


def test_no_simulated_step_is_faster_than_its_bound() -> None:
    rng = random.Random(0)
    for _ in range(150):
        inputs, (r, r_x, x, t) = random_placement(rng)
        pipelined = simulate(placed(inputs, r, r_x, x, t), inputs.rates)
        assert pipelined.step_s >= closed_forms.predict_step_s(inputs, r, r_x, x, t)[0] * (1 - 1e-9)
        assert 0 <= pipelined.link_busy_fraction <= 1 + 1e-9
        assert 0 <= pipelined.device_busy_fraction <= 1 + 1e-9
        kvpr = dataclasses.replace(inputs, schedule="kvpr")
        barrier = simulate(placed(kvpr, r, r_x, x, t), inputs.rates)
        assert barrier.step_s >= closed_forms.predict_step_s(kvpr, r, r_x, x, t)[0] * (1 - 1e-9)
        assert barrier.step_s >= pipelined.step_s * (1 - 1e-9)
        sequential = simulate(placed(inputs, r, r_x, x, t), inputs.rates, overlap=False)
        assert sequential.step_s >= closed_forms.sequential_step_s(inputs, r_x, x, t) * (1 - 1e-9)
        assert sequential.step_s >= pipelined.step_s * (1 - 1e-9)


def test_without_overlap_the_simulation_takes_the_sum() -> None:
    inputs = with_rates(LONG, host_s_per_layer=0.0)
    simulation = simulate(placed(inputs, 0, 10, 30, 20), inputs.rates, overlap=False)
    assert simulation.step_s == pytest.approx(closed_forms.sequential_step_s(inputs, 10, 30, 20))
    assert simulation.link_busy_fraction + simulation.device_busy_fraction <= 1.0


def test_fewer_slots_stall_the_link_when_recomputation_is_slow() -> None:
    inputs = with_rates(LONG, recompute_s_per_token=0.4)
    steps = [
        simulate(placed(dataclasses.replace(inputs, num_slots=n), 0, 0, 30, 30), inputs.rates).step_s
        for n in (1, 2, 4, 30)
    ]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 1.2 * steps[-1]


def test_kvpr_with_few_slots_recomputes_as_much_as_they_hold() -> None:
    inputs = dataclasses.replace(LONG, schedule="kvpr")
    few = dataclasses.replace(inputs, num_slots=2)  # a gate on the whole activation could never open
    enough_s = simulate(placed(inputs, 0, 0, 30, 30), inputs.rates).step_s
    assert 0 < simulate(placed(few, 0, 0, 30, 30), inputs.rates).step_s < 2 * enough_s


def test_streamed_weights_pace_a_step_that_transfers_nothing_else() -> None:
    inputs = dataclasses.replace(LONG, weight_bytes_per_step=40_000)
    simulation = simulate(placed(inputs, 60, 0, 0, 0), inputs.rates)
    assert simulation.step_s == pytest.approx(40_000 / 200, rel=0.03)
    assert simulation.step_s >= 40_000 / 200 * (1 - 1e-9)


def test_newer_rates_change_the_simulation_of_an_old_plan() -> None:
    plan = placed(LONG, 0, 0, 0, 60)
    slower = changed(LONG.rates, h2d_kv_bytes_per_s=100.0)
    assert simulate(plan, slower).step_s == pytest.approx(2 * simulate(plan, LONG.rates).step_s, rel=0.03)


def test_resident_work_is_spread_over_all_chunks_so_that_it_never_fills_the_ring() -> None:
    """Seven kv chunks and one activation chunk; recomputing takes nearly as long as the link."""
    inputs = with_rates(
        dataclasses.replace(LONG, chunk_blocks=1, num_slots=5, num_blocks=26, is_segmented=True),
        attention_s_per_token=0.0,
        dense_s=0.0,
        head_s=0.0,
    )
    link_s = closed_forms.link_s(inputs, 1, 7) / inputs.num_offloaded_layers
    inputs = with_rates(inputs, recompute_s_per_token=0.95 * link_s / (19 * inputs.block_tokens), gap_s=0.0)
    simulated_s = simulate(placed(inputs, 0, 18, 1, 7), inputs.rates).step_s
    assert simulated_s == pytest.approx(closed_forms.predict_step_s(inputs, 0, 18, 1, 7)[0], rel=0.03)
