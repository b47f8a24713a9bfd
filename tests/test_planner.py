"""Tests of the planner: against brute force, against HiGHS on the integer program, and against the paper's figures."""

from __future__ import annotations

import dataclasses
import random
import re
import time
import warnings
from collections.abc import Iterator
from typing import Any

import closed_forms
import pulp
import pytest
from placements import changed

from kvoffload.errors import ConfigError, InfeasiblePlanError
from kvoffload.planning import planner
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.options import table_of
from kvoffload.planning.plan import Plan
from kvoffload.planning.program import program
from kvoffload.planning.rates import Rates
from kvoffload.units import gb, gib

SAME = 1e-3  # relative: how far above the shortest step a plan may be


def small_instance(rng: random.Random) -> PlanInputs:
    """An instance brute force can do, with coefficients that make ties, plateaus and every limit likely."""
    num_blocks = rng.choice([1, 2, 3, 5, 8, 10, 12, 13, 16, 16]) if rng.random() < 0.97 else rng.randint(20, 40)
    beta_x = rng.choice([1, 2, 3, 4, 7, 8, 64])
    beta_kv = rng.choice([2 * beta_x, 2 * beta_x, beta_x, max(1, beta_x // 2), rng.randint(1, 16), 3 * beta_x])
    layers, block_tokens = rng.choice([1, 2, 4]), rng.choice([1, 4])
    bandwidth = rng.choice([1.0, 10.0, 33.3])
    block_s = block_tokens * beta_kv / bandwidth
    rates = Rates(
        h2d_bytes_per_s={"activation": bandwidth * rng.choice([1, 1, 0.8]), "kv": bandwidth},
        restore_s_per_token={
            "activation": rng.choice([0, 0.1, 0.3, 0.5, 0.6, 1.0, 2.0, rng.random()]) * beta_kv / bandwidth
        },
        attention_s_per_token=rng.choice([0, 0.05, 0.2]) * beta_kv / bandwidth,
        dense_s=rng.choice([0, 0.5, 2, 5]) * block_s,
        head_s=rng.choice([0, 1]) * block_s,
        gap_s=rng.choice([0, 0, 3 * rng.random()]) * block_s,
        host_s_per_layer=rng.choice([0, 0.5, 3]) * block_s,
        host_s_per_chunk=rng.choice([0, 0, 0.3, 1, 3]) * block_s,
    )
    every_bytes = layers * block_tokens * num_blocks * max(beta_x, beta_kv)
    stored, left = [0] * 4, num_blocks
    for idx in range(4 * (rng.random() < 0.4)):
        stored[idx] = rng.randint(0, min(left, max(1, num_blocks // 5)))
        left -= stored[idx]
    return PlanInputs(
        num_layers=layers + rng.choice([0, 0, 1]),
        num_offloaded_layers=layers,
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        bytes_per_token={"kv": beta_kv, "activation": beta_x},
        rates=rates,
        chunk_blocks=rng.choice([1, 2, 3, 4]),
        num_slots=rng.choice([2, 3]),
        device_bytes=10 + int(every_bytes * rng.choice([0, 0.1, 0.3, 0.5, 0.7]) * rng.uniform(0.8, 1.1)),
        fixed_device_bytes=rng.choice([0, 10]),
        host_bytes=int(every_bytes * rng.choice([0.4, 0.5, 0.6, 0.8, 1.2, 2])),
        stored=dict(zip(("activation", "kv", "resident_kv", "resident_activation"), stored, strict=True)),
        split=rng.choice([None] * 6 + [0.0, 1.0, 0.5, 0.3, rng.random()]),
        schedule=rng.choice(["pipelined", "pipelined", "kvpr"]),
        weight_bytes_per_step=rng.choice([0, 0, 100]),
        num_micro_batches=rng.choice([1, 1, 2]),
    )


def every_placement(inputs: PlanInputs) -> Iterator[tuple[int, int, int, int]]:
    """All (r, r_x, x, t) within every limit, by plain enumeration."""
    s = inputs.num_blocks
    for x in range(inputs.stored.get("activation", 0), s + 1):
        for t in range(inputs.stored.get("kv", 0), s + 1 - x):
            if closed_forms.host_bytes(inputs, x, t) > inputs.host_bytes:
                continue
            if inputs.split is not None:
                nearest = max(round(inputs.split * (x + t)), inputs.stored.get("activation", 0))
                if x != min(nearest, x + t - inputs.stored.get("kv", 0)):
                    continue
            for r_x in range(
                inputs.stored.get("resident_activation", 0), s + 1 - x - t - inputs.stored.get("resident_kv", 0)
            ):
                if inputs.split is not None and r_x > inputs.stored.get("resident_activation", 0):
                    continue
                if closed_forms.device_bytes(inputs, s - x - t - r_x, r_x) <= inputs.device_bytes:
                    yield s - x - t - r_x, r_x, x, t


def brute_force(inputs: PlanInputs) -> float | None:
    """Seconds of the best placement."""
    return min((closed_forms.predict_step_s(inputs, *p)[0] for p in every_placement(inputs)), default=None)


def solve_or_none(inputs: PlanInputs) -> Plan | None:
    try:
        return planner.solve(inputs)
    except InfeasiblePlanError:
        return None


def test_the_optimum_is_that_of_brute_force_on_1000_instances() -> None:
    rng = random.Random(0)
    solved = {"pipelined": 0, "kvpr": 0, "split": 0, "infeasible": 0}
    for number in range(1000):
        inputs = small_instance(rng)
        best, plan = brute_force(inputs), solve_or_none(inputs)
        solved["infeasible" if plan is None else inputs.schedule if inputs.split is None else "split"] += 1
        if best is None or plan is None:
            assert best == plan, f"instance {number}: {inputs}"
            continue
        assert plan.predicted_step_s <= best * (1 + SAME), f"instance {number}: {inputs}"
        placement = (plan.resident_kv_blocks, plan.resident_activation_blocks, plan.activation_blocks, plan.kv_blocks)
        assert plan.predicted_step_s == pytest.approx(closed_forms.predict_step_s(inputs, *placement)[0])
        assert placement in set(every_placement(inputs))
        equal = (p for p in every_placement(inputs) if closed_forms.predict_step_s(inputs, *p)[0] <= best)
        fewest = min(closed_forms.host_bytes(inputs, *p[2:]) for p in equal)
        assert plan.link_bytes_per_step <= fewest + inputs.weight_bytes_per_step, f"instance {number}: {inputs}"
    assert all(count >= 100 for count in solved.values()), solved


MODELS = [(4096, 32, 1.0), (5120, 40, 1.0), (7168, 48, 1.0), (4096, 32, 4.0), (3072, 28, 3.0), (3072, 28, 0.75)]


def real_instance(rng: random.Random, most_blocks: int) -> PlanInputs:
    """A model of a known size on a machine between a desktop card and an H200; (hidden, layers, heads per KV head)."""
    hidden, layers, group = rng.choice(MODELS)
    batch, block_tokens = rng.choice([1, 4, 16, 32, 64]), rng.choice([16, 32, 64, 128])
    beta_x, beta_kv = 2 * hidden * batch, int(2 * 2 * hidden / group) * batch
    bandwidth = rng.choice([12e9, 25e9, 32e9, 55e9]) * rng.uniform(0.9, 1.1)
    flops_per_s = rng.choice([60e12, 120e12, 250e12, 600e12]) * rng.uniform(0.9, 1.1)
    rates = Rates(
        h2d_bytes_per_s={"activation": bandwidth * rng.uniform(0.95, 1), "kv": bandwidth},
        restore_s_per_token={"activation": batch * 2 * hidden * 2 * hidden / group / flops_per_s},
        attention_s_per_token=beta_kv / rng.choice([6e11, 1.5e12, 3e12]),
        dense_s=2 * 12 * hidden**2 / 1.5e12,
        head_s=4e-4,
        gap_s=rng.uniform(1e-3, 2.5e-3),
        host_s_per_layer=rng.choice([2e-4, 1e-3]),
        host_s_per_chunk=rng.choice([2e-5, 1e-4]),
    )
    num_blocks = rng.randint(8, most_blocks)
    every_bytes = layers * block_tokens * num_blocks * beta_kv
    return PlanInputs(
        num_layers=layers,
        num_offloaded_layers=layers,
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        bytes_per_token={"kv": beta_kv, "activation": beta_x},
        rates=rates,
        chunk_blocks=rng.choice([1, 2, 4, 8]),
        num_slots=rng.choice([2, 3, 4]),
        device_bytes=2 * 10**9 + int(every_bytes * rng.choice([0, 0.1, 0.3, 0.6]) * rng.uniform(0.9, 1.1)),
        fixed_device_bytes=2 * 10**9,
        host_bytes=int(every_bytes * rng.choice([0.55, 0.8, 2, 2, 2])),
        schedule=rng.choice(["pipelined", "pipelined", "kvpr"]),
    )


def test_highs_finds_no_shorter_step_for_the_integer_program_at_real_sizes() -> None:
    rng = random.Random(1)
    tolerances = {"mip_feasibility_tolerance": 1e-9, "primal_feasibility_tolerance": 1e-9}
    highs = pulp.HiGHS(msg=False, threads=1, gapRel=0.0, gapAbs=0.0, **tolerances)
    if not highs.available():
        pytest.skip("highspy is not installed")
    compared = 0
    while compared < 60:
        inputs = real_instance(rng, 300)
        if (plan := solve_or_none(inputs)) is None:
            continue
        made = program(table_of(inputs))
        assert made.problem.solve(highs) == pulp.LpStatusOptimal
        assert plan.predicted_step_s <= made.step.varValue * made.unit_s * (1 + SAME), inputs
        compared += 1


def test_no_hand_made_plan_is_faster() -> None:
    rng = random.Random(2)
    for _ in range(40):
        inputs = real_instance(rng, 1000)
        if (plan := solve_or_none(inputs)) is None:
            continue
        s = inputs.num_blocks
        shares = [0.0, 0.25, 0.5, 0.7, 0.75, 1.0]
        resident = range(0, s + 1, max(1, s // 10))
        by_hand = [(r, 0, round(share * (s - r)), s - r - round(share * (s - r))) for r in resident for share in shares]
        by_hand += [
            (0, r, round(share * (s - r)), s - r - round(share * (s - r))) for r in resident for share in shares
        ]
        for r, r_x, x, t in by_hand:
            fits = closed_forms.device_bytes(inputs, r, r_x) <= inputs.device_bytes
            if fits and closed_forms.host_bytes(inputs, x, t) <= inputs.host_bytes:
                assert plan.predicted_step_s <= closed_forms.predict_step_s(inputs, r, r_x, x, t)[0] * (1 + SAME)


@pytest.mark.timing
def test_a_solve_is_fast_enough_to_plan_again_while_decoding() -> None:
    rng = random.Random(3)
    instances = [inputs for inputs in (real_instance(rng, 512) for _ in range(300)) if solve_or_none(inputs)][:200]
    rounds = []
    for _ in range(8):  # the best of a few, in CPU time (one thread): other work on the machine only ever adds
        times = []
        for inputs in instances:
            start = time.process_time()
            planner.solve.__wrapped__(inputs)
            times.append(time.process_time() - start)
        times.sort()
        rounds.append((times[len(times) // 2], times[int(0.99 * len(times))]))
        if rounds[-1][0] < 5e-3 and rounds[-1][1] < 30e-3:
            break
    assert min(p50 for p50, _ in rounds) < 5e-3
    assert min(p99 for _, p99 in rounds) < 30e-3


def paper_instance(hidden: int, group: int = 1, **changes: Any) -> PlanInputs:
    """A worked example: 312 TFLOP/s, 32 GB/s, fp16; only link and recomputation count, nothing stays resident."""
    rates = Rates(
        h2d_bytes_per_s={"activation": 32e9, "kv": 32e9},
        # multiply-add, keys and values
        restore_s_per_token={"activation": 2 * hidden * 2 * hidden / group / 312e12},
        attention_s_per_token=0.0,
        dense_s=0.0,
    )
    inputs = PlanInputs(
        num_layers=32,
        num_offloaded_layers=32,
        num_blocks=1000,
        block_tokens=16,
        bytes_per_token={"kv": 2 * 2 * hidden // group, "activation": 2 * hidden},
        rates=rates,
        chunk_blocks=4,
        num_slots=3,
        device_bytes=10**9,
        fixed_device_bytes=10**9,
        host_bytes=10**12,
    )
    return dataclasses.replace(inputs, **changes)


@pytest.mark.parametrize(
    ("hidden", "kvpr_split", "kvpr_gain", "our_gain"),
    [(4096, 0.70, 1.54, 2.00), (5120, 0.66, 1.49, 1.95), (7168, 0.58, 1.40, 1.68)],
)
def test_the_figures_of_the_design_come_out(hidden: int, kvpr_split: float, kvpr_gain: float, our_gain: float) -> None:
    kvpr = planner.solve(paper_instance(hidden, schedule="kvpr"))
    assert kvpr.split_fraction == pytest.approx(kvpr_split, abs=0.005)
    assert kvpr.full_transfer_step_s / kvpr.predicted_step_s == pytest.approx(kvpr_gain, abs=0.005)
    ours = planner.solve(paper_instance(hidden))
    assert ours.full_transfer_step_s / ours.predicted_step_s == pytest.approx(our_gain, abs=0.005)


@pytest.mark.parametrize("group", [2, 4, 8])
@pytest.mark.parametrize("schedule", ["pipelined", "kvpr"])
def test_grouped_query_attention_recomputes_nothing(group: int, schedule: str) -> None:
    half = 10**9 + 32 * 16 * 500 * (4 * 4096 // group)
    for device_bytes in (10**9, half):
        plan = planner.solve(paper_instance(4096, group, schedule=schedule, device_bytes=device_bytes))
        assert (plan.activation_blocks, plan.resident_activation_blocks) == (0, 0)
        assert plan.predicted_step_s == plan.full_transfer_step_s
        assert plan.resident_kv_blocks == (500 if device_bytes == half else 0)


def test_residents_are_activations_where_that_saves_transfer() -> None:
    inputs = paper_instance(4096, device_bytes=10**9 + 32 * 16 * 200 * 16384)  # 200 blocks of K/V or 400 of activations
    plan = planner.solve(inputs)
    assert plan.resident_activation_blocks > plan.resident_kv_blocks
    assert plan.device_bytes == closed_forms.device_bytes(
        inputs, plan.resident_kv_blocks, plan.resident_activation_blocks
    )
    assert plan.host_bytes == closed_forms.host_bytes(inputs, plan.activation_blocks, plan.kv_blocks)
    assert plan.full_transfer_step_s == closed_forms.predict_step_s(inputs, 200, 0, 0, 800)[0]


def test_what_fits_on_the_device_stays_there() -> None:
    plan = planner.solve(paper_instance(4096, device_bytes=10**12))
    assert (plan.resident_kv_blocks, plan.link_bytes_per_step) == (1000, 0)
    empty = planner.solve(paper_instance(4096, num_blocks=0))
    assert (empty.num_blocks, empty.predicted_step_s) == (0, 0.0)
    sliding_only = planner.solve(paper_instance(4096, num_offloaded_layers=0, host_bytes=0))
    assert sliding_only.resident_kv_blocks == 1000


def test_planning_again_keeps_what_is_stored() -> None:
    stored = {"kv": 300, "activation": 100, "resident_kv": 20, "resident_activation": 10}
    room = 10**9 + 32 * 16 * 60 * 16384
    for extra in ({}, {"schedule": "kvpr"}, {"split": 1.0}, {"split": 0.0}):
        inputs = paper_instance(4096, **extra, stored=stored, device_bytes=room, host_bytes=10**13)
        plan = planner.solve(inputs)
        assert plan.kv_blocks >= 300
        assert plan.activation_blocks >= 100
        assert plan.resident_kv_blocks >= 20
        assert plan.resident_activation_blocks >= 10
        if "split" in extra:  # as near to it as stored blocks allow
            assert (plan.kv_blocks == 300) if extra["split"] else (plan.activation_blocks == 100)
        else:
            free = planner.solve(paper_instance(4096, **extra, device_bytes=room, host_bytes=10**13))
            assert plan.predicted_step_s >= free.predicted_step_s
    with pytest.raises(ConfigError, match="1001 blocks are stored"):
        planner.solve(paper_instance(4096, stored={"kv": 1001}))


@pytest.mark.parametrize("split", [0.0, 0.25, 1 / 3, 0.5, 0.9999, 1.0])
def test_a_fixed_split_is_kept_to_the_block(split: float) -> None:
    for resident in (0, 1, 333):
        plan = planner.solve(paper_instance(4096, split=split, device_bytes=10**9 + 32 * 16 * resident * 16384))
        assert plan.resident_kv_blocks == resident
        assert plan.resident_activation_blocks == 0
        assert plan.activation_blocks == round(split * (1000 - resident))


def test_the_binding_constraint_names_what_limits_the_step() -> None:
    inputs = paper_instance(4096)
    assert planner.solve(inputs).binding_constraint == "link"
    slow_host = dataclasses.replace(inputs.rates, host_s_per_layer=1.0)
    assert planner.solve(dataclasses.replace(inputs, rates=slow_host)).binding_constraint == "host"
    dense = dataclasses.replace(inputs.rates, dense_s=1.0)
    assert planner.solve(dataclasses.replace(inputs, rates=dense)).binding_constraint == "device"
    # recomputation four times as slow: the best split is 0.33, but the host holds K/V of half the cache only
    slow = changed(inputs.rates, recompute_s_per_token=4 * inputs.rates.restore_s_per_token["activation"])
    tight = dataclasses.replace(inputs, rates=slow, host_bytes=closed_forms.host_bytes(inputs, 1000, 0) * 5 // 4)
    plan = planner.solve(tight)
    assert plan.binding_constraint == "host_memory"
    assert plan.host_bytes <= tight.host_bytes
    roomy = planner.solve(dataclasses.replace(tight, host_bytes=10**13))
    assert roomy.predicted_step_s < plan.predicted_step_s
    assert roomy.binding_constraint in ("link", "device")


def test_too_little_device_memory_is_said_with_the_numbers_and_the_way_out() -> None:
    with pytest.raises(InfeasiblePlanError) as caught:
        planner.solve(paper_instance(4096, device_bytes=5 * 10**8))
    assert "device memory" in str(caught.value)
    assert "need 1.00 GB (953.67 MiB)" in str(caught.value)
    assert "limit is 500.00 MB (476.84 MiB)" in str(caught.value)
    assert re.search("raise device_gib.*lower the batch", str(caught.value))


@pytest.mark.parametrize("changes", [{}, {"split": 0.0}, {"split": 0.5}, {"stored": {"kv": 100}}])
def test_too_little_host_memory_is_said_with_the_least_that_works(changes: dict[str, Any]) -> None:
    kv_share = {0.0: 1.0, 0.5: 0.5}.get(changes.get("split", 1.0), changes.get("stored", {}).get("kv", 0) / 1000)
    least = 32 * 16 * 1000 * 8192 * (1 + kv_share)
    with pytest.raises(InfeasiblePlanError) as caught:
        planner.solve(paper_instance(4096, **changes, host_bytes=int(least) - 1))
    assert f"needs at least {gb(least)} ({gib(least)})" in str(caught.value)
    assert re.search("host memory.*raise host_gib or device_gib.*lower max_new_tokens", str(caught.value))
    assert planner.solve(paper_instance(4096, **changes, host_bytes=int(least))).host_bytes == least


def test_streamed_weights_and_micro_batches_at_zero_and_one_change_nothing() -> None:
    plain = planner.solve(paper_instance(4096))
    assert (plain.weight_bytes_per_step, plain.num_micro_batches, plain.objective) == (0, 1, "latency")
    same = planner.solve(paper_instance(4096, weight_bytes_per_step=0, num_micro_batches=1, objective="throughput"))
    assert same == dataclasses.replace(plain, objective="throughput")
    streamed = planner.solve(paper_instance(4096, weight_bytes_per_step=10**9))
    assert streamed.link_bytes_per_step - streamed.weight_bytes_per_step == plain.link_bytes_per_step
    assert streamed.predicted_step_s == pytest.approx(plain.predicted_step_s + 10**9 / 32e9)


def test_equal_inputs_are_solved_once() -> None:
    assert planner.solve(paper_instance(4096)) is planner.solve(paper_instance(4096))


def test_planning_warns_of_nothing_and_leaves_the_filters_of_the_process_alone(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("the filters of all threads were changed")

    warnings.simplefilter("always")
    monkeypatch.setattr(warnings, "catch_warnings", refuse)
    monkeypatch.setattr(warnings, "simplefilter", refuse)
    monkeypatch.setattr(warnings, "filterwarnings", refuse)
    for schedule in ("pipelined", "kvpr"):
        planner.solve.__wrapped__(paper_instance(4096, schedule=schedule))
    monkeypatch.undo()
    assert [str(warning.message) for warning in recwarn] == []


def test_without_highspy_cbc_gives_the_same_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    if not pulp.COIN_CMD(path=pulp.PULP_CBC_CMD.pulp_cbc_path, msg=False).available():
        pytest.skip("this PuLP brings no CBC")
    rng = random.Random(4)
    instances = [real_instance(rng, 100) for _ in range(10)] + [small_instance(rng) for _ in range(30)]
    expected = [solve_or_none(inputs) for inputs in instances]
    calls = []
    solve = pulp.COIN_CMD.actualSolve
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    monkeypatch.setattr(pulp.COIN_CMD, "actualSolve", lambda self, lp: calls.append(1) or solve(self, lp))
    for inputs, plan in zip(instances, expected, strict=True):
        if plan is not None:
            assert planner.solve.__wrapped__(inputs) == plan
    assert len(calls) >= 10


def test_the_papers_barrier_is_left_out_where_it_costs_more_than_recomputing_saves() -> None:
    """It is paid as a whole, which a relaxation spreads over the blocks."""
    rng, left_out = random.Random(6), 0
    for _ in range(40):
        inputs = dataclasses.replace(real_instance(rng, 300), schedule="kvpr", num_blocks=rng.randint(100, 300))
        kv_s = inputs.bytes_per_token["kv"] / inputs.rates.h2d_bytes_per_s["kv"]
        rates = dataclasses.replace(
            inputs.rates,
            attention_s_per_token=rng.uniform(0.1, 0.5) * kv_s,
            restore_s_per_token={"activation": rng.uniform(2, 7) * kv_s},
        )
        roomy = dataclasses.replace(inputs, rates=rates, host_bytes=10**15)
        plan = planner.solve(roomy)
        assert plan.predicted_step_s <= plan.full_transfer_step_s * (1 + SAME)
        left_out += plan.activation_blocks == 0
    assert left_out >= 10
