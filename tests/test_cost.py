"""Tests of the cost model: each formula against numbers worked out by hand, the simulation against the formulas."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from kvoffload import cost
from kvoffload.errors import ProfileError
from kvoffload.hardware_profile import HardwareProfile
from kvoffload.types import Curve, ModelShape, Plan, PlanInputs, Point, Rates

RATES = Rates(
    h2d_activation_bytes_per_s=80.0,
    h2d_kv_bytes_per_s=200.0,
    recompute_s_per_token=0.25,
    attention_s_per_token=0.125,
    dense_s=3.0,
    head_s=5.0,
    gap_s=0.0,
    host_s_per_layer=7.0,
    host_s_per_chunk=0.5,
)
INPUTS = PlanInputs(
    num_layers=4,
    num_offloaded_layers=3,
    num_blocks=10,
    block_tokens=2,
    kv_bytes_per_token=40,
    activation_bytes_per_token=20,
    rates=RATES,
    chunk_blocks=2,
    num_slots=2,
    device_bytes=10_000,
    fixed_device_bytes=1_000,
    host_bytes=10_000,
)


def with_rates(inputs: PlanInputs, **changes: Any) -> PlanInputs:
    return dataclasses.replace(inputs, rates=dataclasses.replace(inputs.rates, **changes))


def placed(inputs: PlanInputs, r: int, r_x: int, x: int, t: int) -> Plan:
    """A plan for any placement, good or bad."""
    step_s, binding = cost.predict_step_s(inputs, r, r_x, x, t)
    return Plan(
        **{name: getattr(inputs, name) for name in ("num_layers", "num_offloaded_layers", "block_tokens")},
        **{name: getattr(inputs, name) for name in ("chunk_blocks", "num_slots", "schedule", "is_segmented")},
        num_micro_batches=inputs.num_micro_batches,
        resident_kv_blocks=r,
        resident_activation_blocks=r_x,
        kv_blocks=t,
        activation_blocks=x,
        kv_bytes_per_token=inputs.kv_bytes_per_token,
        activation_bytes_per_token=inputs.activation_bytes_per_token,
        weight_bytes_per_step=inputs.weight_bytes_per_step,
        predicted_step_s=step_s,
        full_transfer_step_s=cost.full_transfer_step_s(inputs),
        binding_constraint=binding,
    )


def test_the_link_carries_both_forms_at_their_own_rates() -> None:
    # 3 layers * 2 tokens * (4 blocks * 20 bytes / 80 + 3 blocks * 40 bytes / 200)
    assert cost.link_s(INPUTS, 4, 3) == pytest.approx(6 * (1.0 + 0.6))


def test_the_device_recomputes_resident_and_transferred_activations_and_attends_everything() -> None:
    # 4 * dense + head + 3 layers * 2 tokens * (0.25 * (1 + 4) + 0.125 * 10)
    assert cost.device_s(INPUTS, 1, 4) == pytest.approx(12 + 5 + 6 * (1.25 + 1.25))


def test_the_host_issues_whole_chunks_of_each_form() -> None:
    # 4 layers * 7 + 3 layers * 0.5 * (2 chunks of 3 blocks + 1 chunk of 1 block)
    assert cost.host_s(INPUTS, 3, 1) == pytest.approx(28 + 1.5 * 3)


def test_the_gap_counts_as_far_as_the_ring_cannot_hide_it() -> None:
    ring_s = 2 * 2 * 2 * 20 / 200  # slots * blocks * tokens * bytes / bandwidth
    hidden, exposed = with_rates(INPUTS, gap_s=ring_s), with_rates(INPUTS, gap_s=ring_s + 3)
    assert cost.link_s(hidden, 4, 3) == cost.link_s(INPUTS, 4, 3)
    assert cost.link_s(exposed, 4, 3) == pytest.approx(cost.link_s(INPUTS, 4, 3) + 3)


@pytest.mark.parametrize(
    ("changes", "binding"),
    [
        ({"host_s_per_layer": 0.0, "dense_s": 0.0, "h2d_kv_bytes_per_s": 1.0}, "link"),
        ({"host_s_per_layer": 0.0, "dense_s": 90.0}, "device"),
        ({"host_s_per_layer": 90.0}, "host"),
    ],
)
def test_the_longest_of_the_three_is_the_step(changes: dict[str, float], binding: str) -> None:
    inputs = with_rates(INPUTS, **changes)
    terms = {
        "link": cost.link_s(inputs, 4, 3),
        "device": cost.device_s(inputs, 1, 4),
        "host": cost.host_s(inputs, 4, 3),
    }
    assert cost.predict_step_s(inputs, 2, 1, 4, 3) == (terms[binding], binding)
    assert terms[binding] == max(terms.values())


@pytest.mark.parametrize("recompute_s", [0.01, 0.25])  # kv transfer and recomputation the longer one
def test_the_papers_schedule_has_a_barrier_in_every_layer(recompute_s: float) -> None:
    inputs = with_rates(INPUTS, recompute_s_per_token=recompute_s, dense_s=0.0, head_s=0.0, host_s_per_layer=0.0)
    kvpr = dataclasses.replace(inputs, schedule="kvpr")
    x, t = 6, 4  # per layer: 2 tokens a block
    by_hand = 3 * (2 * 20 * x / 80 + max(2 * recompute_s * x, 2 * 40 * t / 200) + 2 * 10 * 0.125)
    assert cost.predict_step_s(kvpr, 0, 0, x, t) == (pytest.approx(by_hand), "link")
    assert cost.predict_step_s(kvpr, 0, 0, 0, 10) == cost.predict_step_s(inputs, 0, 0, 0, 10)  # nothing to wait for


def test_without_overlap_copies_gap_and_compute_add_up() -> None:
    inputs = dataclasses.replace(with_rates(INPUTS, gap_s=0.75, host_s_per_layer=0.0), weight_bytes_per_step=500)
    by_hand = 6 * (1.0 + 0.6) + 500 / 200 + 0.75 + cost.device_s(inputs, 1, 4)
    assert cost.sequential_step_s(inputs, 1, 4, 3) == pytest.approx(by_hand)
    busy_host = with_rates(inputs, host_s_per_layer=99.0)
    assert cost.sequential_step_s(busy_host, 1, 4, 3) == cost.host_s(busy_host, 4, 3)


def test_streamed_weights_and_micro_batches_do_nothing_at_zero_and_one() -> None:
    plain = cost.terms(INPUTS)
    assert cost.terms(dataclasses.replace(INPUTS, weight_bytes_per_step=0, num_micro_batches=1)) == plain
    streamed = cost.terms(dataclasses.replace(INPUTS, weight_bytes_per_step=1000, num_micro_batches=2))
    assert streamed.link_fixed_s == plain.link_fixed_s + 1000 / 200  # once for both micro-batches
    assert streamed.host_s(3, 1) == 2 * plain.host_s(3, 1)


def test_memory_counts_every_offloaded_layer() -> None:
    assert cost.device_bytes(INPUTS, 2, 1) == 1_000 + 3 * 2 * (2 * 40 + 1 * 20)
    assert cost.host_bytes(INPUTS, 4, 3) == 3 * 2 * (4 * 20 + 3 * 40)
    assert cost.resident_capacity_bytes(INPUTS) == (10_000 - 1_000) // 6
    assert cost.host_capacity_bytes(INPUTS) == 10_000 // 6


def test_full_transfer_keeps_resident_what_fits() -> None:
    inputs = dataclasses.replace(INPUTS, device_bytes=1_000 + 6 * 40 * 4 + 239)
    inputs = with_rates(inputs, dense_s=0.0, head_s=0.0, attention_s_per_token=0.0, host_s_per_layer=0.1)
    assert cost.predict_step_s(inputs, 4, 0, 0, 6)[1] == "link"
    assert cost.full_transfer_step_s(inputs) == cost.predict_step_s(inputs, 4, 0, 0, 6)[0]
    all_fits = dataclasses.replace(inputs, device_bytes=10**6)
    assert cost.full_transfer_step_s(all_fits) == cost.predict_step_s(inputs, 10, 0, 0, 0)[0]
    nothing_fits = dataclasses.replace(inputs, device_bytes=0)
    assert cost.full_transfer_step_s(nothing_fits) == cost.predict_step_s(inputs, 0, 0, 0, 10)[0]


SHAPE = ModelShape(
    num_layers=2,
    num_offloaded_layers=2,
    hidden_size=64,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=1000,
    kv_itemsize_bytes=2,
    activation_itemsize_bytes=2,
    weight_bytes=2 * (2 * 45_056 + 64_000),  # two bytes each
)
PROFILE = HardwareProfile(
    device_name="test",
    link_name="test link",
    emulated_link=False,
    key="test",
    h2d=Curve(unit="bytes", points=(Point((1024.0,), 1e-3, 0.0), Point((16384.0,), 4e-3, 0.0))),
    d2h=None,
    gemm=Curve(unit="m,n,k", points=(Point((4.0, 256.0, 64.0), 1e-6, 0.0), Point((64.0, 32.0, 64.0), 2e-6, 0.0))),
    attention=Curve(unit="bytes", points=(Point((1e4,), 1e-5, 0.0), Point((1e6,), 1e-4, 0.0))),
    device_copy_bytes_per_s=1e12,
    device_memory_bytes=10**9,
)


def test_rates_are_read_at_the_sizes_the_runtime_uses() -> None:
    rates = cost.rates_from_profile(PROFILE, SHAPE, batch=4, block_tokens=8, chunk_blocks=2)
    assert rates.h2d_activation_bytes_per_s == pytest.approx(8192 / PROFILE.h2d.seconds(8192))  # 16 tokens * 4 * 64 * 2
    assert rates.h2d_kv_bytes_per_s == pytest.approx(8192 / PROFILE.h2d.seconds(8192))  # 16 * 4 * 2 * 2 * 16 * 2
    assert rates.recompute_s_per_token == pytest.approx(4 * 2 * 64 * 64 / (2 * 64 * 32 * 64 / 2e-6))
    assert rates.attention_s_per_token == pytest.approx(4 * 128 / (1e6 / 1e-4))
    assert rates.dense_s == pytest.approx(4 * SHAPE.dense_flops / (2 * 4 * 256 * 64 / 1e-6))
    assert rates.head_s == pytest.approx(2 * 4 * 64_000 / (2 * 4 * 256 * 64 / 1e-6))
    assert (rates.gap_s, rates.host_s_per_layer) == (PROFILE.gap_s, PROFILE.host_s_per_layer)
    smaller = cost.rates_from_profile(PROFILE, SHAPE, batch=4, block_tokens=8, chunk_blocks=1)
    assert smaller.h2d_kv_bytes_per_s == pytest.approx(4096 / PROFILE.h2d.seconds(4096))
    short = cost.rates_from_profile(PROFILE, SHAPE, batch=4, block_tokens=8, chunk_blocks=1, cached_tokens=10)
    assert short.attention_s_per_token == pytest.approx(4 * 128 / (5120 / 1e-5))


def test_reading_the_weights_bounds_the_dense_part_and_the_head() -> None:
    slow = dataclasses.replace(PROFILE, device_copy_bytes_per_s=1e6)
    rates = cost.rates_from_profile(slow, SHAPE, batch=4, block_tokens=8, chunk_blocks=2)
    assert rates.dense_s == pytest.approx(2 * 45_056 / 1e6)
    assert rates.head_s == pytest.approx(2 * 64_000 / 1e6)


def test_a_device_that_is_the_cpu_pays_for_the_hosts_time_itself() -> None:
    sizes = {"batch": 4, "block_tokens": 8, "chunk_blocks": 2, "cached_tokens": 100}
    on_gpu = cost.rates_from_profile(PROFILE, SHAPE, **sizes)
    on_cpu = cost.rates_from_profile(dataclasses.replace(PROFILE, emulated_link=True), SHAPE, **sizes)
    issued_s = PROFILE.host_s_per_layer + 7 * PROFILE.host_s_per_chunk  # chunks of 16 tokens
    assert on_cpu.dense_s == pytest.approx(on_gpu.dense_s + issued_s)
    assert on_cpu.head_s == pytest.approx(on_gpu.head_s + PROFILE.gap_s)


@pytest.mark.parametrize(("emulated", "wanted"), [(False, 2**21), (True, 2**22)])
def test_a_chunk_is_long_enough_for_the_host_to_issue_the_next(emulated: bool, wanted: int) -> None:
    """10 us and 10 GB/s: the link is at 95 % of its speed from 2 MiB on, and a copy of 4 MiB takes 430 us."""
    link = Curve(unit="bytes", points=tuple(Point((size,), 1e-5 + size / 1e10, 0.0) for size in (1e3, 1e6, 1e9)))
    profile = dataclasses.replace(PROFILE, h2d=link, emulated_link=emulated, host_s_per_chunk=2e-5)
    assert cost.least_chunk_bytes(profile, SHAPE, recomputes=False) == wanted
    slower = dataclasses.replace(profile, host_s_per_chunk=1e-4)
    longer = cost.least_chunk_bytes(slower, SHAPE, recomputes=False)
    share = 0.05 if emulated else 0.25
    assert link.seconds(longer) >= 1e-4 / share > link.seconds(longer // 2)


def test_an_unpaced_link_has_no_rates_and_the_message_says_what_to_do() -> None:
    with pytest.raises(ProfileError, match=r"no bandwidth to plan with.*split='transfer'"):
        cost.rates_from_profile(dataclasses.replace(PROFILE, h2d=None), SHAPE, batch=1, block_tokens=8, chunk_blocks=2)


# Simulation. A ring that hides the gap, as the design sizes it, and slots for a whole activation.
LONG = dataclasses.replace(
    with_rates(INPUTS, dense_s=0.5, head_s=0.5, host_s_per_layer=0.01, host_s_per_chunk=0.0, gap_s=0.2),
    num_layers=8,
    num_offloaded_layers=8,
    num_blocks=60,
    num_slots=30,
)


def test_a_link_bound_pipeline_runs_at_the_speed_of_the_link() -> None:
    inputs = with_rates(LONG, recompute_s_per_token=0.02, attention_s_per_token=0.01)
    for x, t in ((60, 0), (30, 30), (0, 60)):
        simulation = cost.simulate(placed(inputs, 0, 0, x, t), inputs.rates)
        assert simulation.step_s == pytest.approx(cost.link_s(inputs, x, t), rel=0.03)
        assert simulation.link_busy_fraction == pytest.approx(1.0, abs=0.03)


def test_a_compute_bound_pipeline_runs_at_the_speed_of_the_device() -> None:
    inputs = with_rates(LONG, recompute_s_per_token=2.0)
    for r_x, x, t in ((0, 60, 0), (20, 40, 0), (60, 0, 0), (0, 40, 20)):
        simulation = cost.simulate(placed(inputs, 0, r_x, x, t), inputs.rates)
        assert simulation.step_s == pytest.approx(cost.device_s(inputs, r_x, x), rel=0.03)
        assert simulation.device_busy_fraction == pytest.approx(1.0, abs=0.03)


def random_placement(rng: random.Random) -> tuple[PlanInputs, tuple[int, int, int, int]]:
    """Any placement on a machine of any balance, `LONG` in all else."""
    names = ("recompute_s_per_token", "attention_s_per_token", "dense_s", "head_s", "host_s_per_layer")
    changes = {name: getattr(LONG.rates, name) * rng.choice([0.0, 0.1, 1.0, 5.0]) for name in names}
    inputs = with_rates(LONG, host_s_per_chunk=rng.choice([0.0, 0.1]), **changes)
    inputs = dataclasses.replace(inputs, num_layers=rng.choice([8, 10]), weight_bytes_per_step=rng.choice([0, 9999]))
    cuts = sorted(rng.randint(0, 60) for _ in range(3))
    return inputs, (cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1], 60 - cuts[2])


def test_no_simulated_step_is_faster_than_its_bound() -> None:
    rng = random.Random(0)
    for _ in range(150):
        inputs, (r, r_x, x, t) = random_placement(rng)
        pipelined = cost.simulate(placed(inputs, r, r_x, x, t), inputs.rates)
        assert pipelined.step_s >= cost.predict_step_s(inputs, r, r_x, x, t)[0] * (1 - 1e-9)
        assert 0 <= pipelined.link_busy_fraction <= 1 + 1e-9
        assert 0 <= pipelined.device_busy_fraction <= 1 + 1e-9
        kvpr = dataclasses.replace(inputs, schedule="kvpr")
        barrier = cost.simulate(placed(kvpr, r, r_x, x, t), inputs.rates)
        assert barrier.step_s >= cost.predict_step_s(kvpr, r, r_x, x, t)[0] * (1 - 1e-9)
        assert barrier.step_s >= pipelined.step_s * (1 - 1e-9)
        sequential = cost.simulate(placed(inputs, r, r_x, x, t), inputs.rates, overlap=False)
        assert sequential.step_s >= cost.sequential_step_s(inputs, r_x, x, t) * (1 - 1e-9)
        assert sequential.step_s >= pipelined.step_s * (1 - 1e-9)


def test_without_overlap_the_simulation_takes_the_sum() -> None:
    inputs = with_rates(LONG, host_s_per_layer=0.0)
    simulation = cost.simulate(placed(inputs, 0, 10, 30, 20), inputs.rates, overlap=False)
    assert simulation.step_s == pytest.approx(cost.sequential_step_s(inputs, 10, 30, 20))
    assert simulation.link_busy_fraction + simulation.device_busy_fraction <= 1.0


def test_fewer_slots_stall_the_link_when_recomputation_is_slow() -> None:
    inputs = with_rates(LONG, recompute_s_per_token=0.4)
    steps = [
        cost.simulate(placed(dataclasses.replace(inputs, num_slots=n), 0, 0, 30, 30), inputs.rates).step_s
        for n in (1, 2, 4, 30)
    ]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 1.2 * steps[-1]


def test_kvpr_with_few_slots_recomputes_as_much_as_they_hold() -> None:
    inputs = dataclasses.replace(LONG, schedule="kvpr")
    few = dataclasses.replace(inputs, num_slots=2)  # a gate on the whole activation could never open
    enough_s = cost.simulate(placed(inputs, 0, 0, 30, 30), inputs.rates).step_s
    assert 0 < cost.simulate(placed(few, 0, 0, 30, 30), inputs.rates).step_s < 2 * enough_s


def test_streamed_weights_pace_a_step_that_transfers_nothing_else() -> None:
    inputs = dataclasses.replace(LONG, weight_bytes_per_step=40_000)
    simulation = cost.simulate(placed(inputs, 60, 0, 0, 0), inputs.rates)
    assert simulation.step_s == pytest.approx(40_000 / 200, rel=0.03)
    assert simulation.step_s >= 40_000 / 200 * (1 - 1e-9)


def test_newer_rates_change_the_simulation_of_an_old_plan() -> None:
    plan = placed(LONG, 0, 0, 0, 60)
    slower = dataclasses.replace(LONG.rates, h2d_kv_bytes_per_s=100.0)
    assert cost.simulate(plan, slower).step_s == pytest.approx(2 * cost.simulate(plan, LONG.rates).step_s, rel=0.03)


def test_resident_work_is_spread_over_all_chunks_so_that_it_never_fills_the_ring() -> None:
    """Seven kv chunks and one activation chunk; recomputing takes nearly as long as the link."""
    inputs = with_rates(
        dataclasses.replace(LONG, chunk_blocks=1, num_slots=5, num_blocks=26, is_segmented=True),
        attention_s_per_token=0.0,
        dense_s=0.0,
        head_s=0.0,
    )
    link_s = cost.link_s(inputs, 1, 7) / inputs.num_offloaded_layers
    inputs = with_rates(inputs, recompute_s_per_token=0.95 * link_s / (19 * inputs.block_tokens), gap_s=0.0)
    simulated_s = cost.simulate(placed(inputs, 0, 18, 1, 7), inputs.rates).step_s
    assert simulated_s == pytest.approx(cost.predict_step_s(inputs, 0, 18, 1, 7)[0], rel=0.03)
