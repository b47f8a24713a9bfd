"""The program over any table of options, against HiGHS on the integers; the tables of plans are in test_planner."""

from __future__ import annotations

import random

import numpy as np
import pulp
import pytest

from kvoffload.planning.options import Option, Table
from kvoffload.planning.program import best_counts, fewest_bytes, program
from kvoffload.planning.step_time import allowed, costs, step_of


def random_table(rng: random.Random, num_options: int, num_blocks: int) -> Table:
    """Options of two tiers and any balance of their resources, among them some that no plan of today has."""
    options = []
    for idx in range(num_options):
        on_host = idx >= num_options // 2
        size = rng.choice([1, 2, 3, 4, 8]) * 2**20
        recompute_s = rng.choice([None, rng.uniform(0.1, 2)])
        seconds = {"device": rng.uniform(0, 0.5) + (recompute_s or 0.0)}
        if on_host:
            seconds[rng.choice(["h2d", "h2d", "host"])] = rng.uniform(0.5, 3)
        options.append(
            Option(
                name=f"option_{idx}",
                form="kv" if recompute_s is None else "activation",
                tier="host" if on_host else "device",
                seconds=seconds,  # type: ignore[arg-type]
                bytes={"host" if on_host else "device": size},
                link_bytes=size if "h2d" in seconds else 0,
                chunk_s=rng.choice([0.0, 0.3]) if on_host else 0.0,
                restore_s=recompute_s,
                is_recomputed=recompute_s is not None,
            )
        )
    return Table(
        options=tuple(options),
        num_layers=rng.choice([1, 24]),
        num_blocks=num_blocks,
        chunk_blocks=rng.choice([1, 4]),
        fixed_s={"device": rng.uniform(0, 5), "issue": rng.uniform(0, 2)},
        capacity={"device": rng.randint(0, num_blocks) * 2**21, "host": num_blocks * rng.choice([2, 8]) * 2**20},
        stored=tuple(rng.choice([0, 0, 1]) for _ in range(num_options)),
        split=None,
        schedule="pipelined",
        attention_s=0.0,
    )


@pytest.mark.parametrize("num_options", [2, 3, 5, 6, 8, pytest.param(12, marks=pytest.mark.slow)])
def test_any_table_is_solved_to_within_a_thousandth(num_options: int) -> None:
    highs = pulp.HiGHS(msg=False, threads=1, gapRel=1e-6)
    if not highs.available():
        pytest.skip("highspy is not installed")
    rng, compared, infeasible = random.Random(num_options), 0, 0
    while compared < 25:
        table = random_table(rng, num_options, rng.choice([6, 30, 150]))
        made, counts = program(table), best_counts(table)
        status = made.problem.solve(highs)
        assert (counts is None) == (status != pulp.LpStatusOptimal)
        if counts is None:
            infeasible += 1
            continue
        assert allowed(table, counts[None, :]).all()
        found = step_of(table, counts)
        assert found.step_s <= made.step.varValue * made.unit_s * (1 + 1e-3)
        compared += 1
    assert infeasible or num_options == 2


def test_of_equal_steps_the_one_with_fewer_bytes_over_the_link_is_taken() -> None:
    seconds = {"h2d": 1.0, "device": 0.0}
    few, many = (
        Option(name=name, form="kv", tier="host", seconds=seconds, bytes={"host": 1}, link_bytes=size)  # type: ignore[arg-type]
        for name, size in (("few", 1), ("many", 2))
    )
    for num_blocks in (5, 10_000):  # every combination is tried, and near the relaxation
        table = random_table(random.Random(0), 2, num_blocks)._replace(
            options=(many, few), stored=(0, 0), capacity={"device": 0, "host": 10**6}
        )
        counts = best_counts(table)
        assert counts is not None
        assert counts.tolist() == [0, num_blocks]


def test_the_fewest_bytes_are_those_of_the_smallest_forms_that_what_is_stored_allows() -> None:
    large, small = (
        Option(name=str(size), form="kv", tier="host", seconds={"h2d": 1.0}, bytes={"host": size}) for size in (7, 3)
    )
    table = random_table(random.Random(0), 2, 100)._replace(
        options=(large, small), stored=(10, 0), capacity={"device": 0, "host": 0}
    )
    assert best_counts(table) is None
    assert fewest_bytes(table, "host") == 10 * 7 + 90 * 3


def test_a_resource_that_no_plan_of_today_uses_can_bind() -> None:
    table = random_table(random.Random(0), 2, 4)._replace(
        options=(
            Option(name="here", form="kv", tier="device", seconds={"device": 1.0}, bytes={"device": 1}),
            Option(name="there", form="kv", tier="host", seconds={"host": 100.0}, bytes={"host": 1}),
        ),
        num_layers=1,
        stored=(0, 0),
        capacity={"device": 3, "host": 4},
        fixed_s={},
    )
    counts = best_counts(table)
    assert counts is not None
    assert counts.tolist() == [3, 1]
    assert (step_of(table, counts).step_s, step_of(table, counts).binding) == (100.0, "host")
    assert costs(table, np.array([[3, 1]])).by_resource["device"][0] == 3.0


def test_of_equal_steps_the_one_with_less_loss_is_taken_before_fewer_bytes() -> None:
    """Where the device is what a step waits for, so that it takes as long in every form."""
    seconds = {"h2d": 0.1, "device": 1.0}
    exact, lossy = (
        Option(name=name, form=name, tier="host", seconds=seconds, bytes={"host": size}, link_bytes=size, loss=loss)  # type: ignore[arg-type]
        for name, size, loss in (("kv", 4, 0.0), ("int4", 1, 0.06))
    )
    for num_blocks in (5, 10_000):
        table = random_table(random.Random(0), 2, num_blocks)._replace(
            options=(lossy, exact), stored=(0, 0), capacity={"device": 0, "host": 10**6}
        )
        counts = best_counts(table)
        assert counts is not None
        assert counts.tolist() == [0, num_blocks]


def test_forms_are_mixed_where_link_and_device_are_balanced_by_it() -> None:
    """int4 takes a quarter of the link and all of the device, K and V the reverse."""
    int4 = Option(name="int4", form="int4", tier="host", seconds={"h2d": 1, "device": 4}, bytes={"host": 1}, loss=0.06)
    kv = Option(name="kv", form="kv", tier="host", seconds={"h2d": 4, "device": 1}, bytes={"host": 4})
    table = random_table(random.Random(0), 2, 100)._replace(
        options=(int4, kv),
        stored=(0, 0),
        capacity={"device": 0, "host": 1000},
        num_layers=1,
        fixed_s={},
        chunk_blocks=1,
    )
    counts = best_counts(table)
    assert counts is not None
    assert counts.tolist() == [50, 50]
    assert step_of(table, counts).step_s == 250.0
    assert best_counts(table._replace(limits=(30, 100))).tolist() == [30, 70]  # type: ignore[union-attr]
