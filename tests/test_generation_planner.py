"""Sizes, plan and placement of one generation, decided without running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from matrix import FAST_LINK, profile
from models import make_model

import kvoffload
from kvoffload import OffloadConfig
from kvoffload.backend import EmulatedBackend
from kvoffload.config import GIB
from kvoffload.model.model_shape import model_shape
from kvoffload.planning.geometry import Geometry
from kvoffload.session.generation_planner import GenerationPlanner


@pytest.fixture
def backend() -> Iterator[EmulatedBackend]:
    backend = EmulatedBackend(FAST_LINK)
    yield backend
    backend.close()


def test_where_memory_for_recomputing_costs_more_than_it_gains_auto_is_sized_as_transfer(
    backend: EmulatedBackend,
) -> None:
    """Under caps that leave little room for resident blocks, each decided both ways."""
    shape = model_shape(make_model("opt").config)
    geometry = Geometry(
        num_offloaded_layers=3,
        rows=2,
        max_tokens=128,
        kv_row_bytes=shape.kv_row_bytes,
        activation_row_bytes=shape.activation_row_bytes,
        is_segmented=True,
    )
    known = {"prompt_tokens": 96, "knows_length": True, "host_held_bytes": 0}
    fast = profile()
    points = tuple(point._replace(seconds=1e6 * point.seconds) for point in fast.gemm.points)
    slow = replace(fast, gemm=replace(fast.gemm, points=points))
    chosen = set()
    for budget in range(60_000, 400_000, 10_000):
        config = OffloadConfig(device_gib=budget / GIB, link=FAST_LINK, profile=slow, block_tokens=4)
        decider = GenerationPlanner(config, shape, backend, lambda: slow)
        try:
            plain = decider.plan_for(geometry, can_recompute=False, **known)
        except kvoffload.InfeasiblePlanError:
            continue
        free = decider.plan_for(geometry, **known)
        assert free.plan.predicted_step_s <= 1.0102 * plain.plan.predicted_step_s, budget
        assert free.plan.full_transfer_step_s <= 1.0102 * plain.plan.predicted_step_s, budget
        chosen.add(bool(free.placement.may_become))
    assert chosen == {True, False}  # both happen


def test_activations_that_are_no_smaller_than_kv_with_their_positions_are_not_planned_with(
    backend: EmulatedBackend,
) -> None:
    config = OffloadConfig(link=FAST_LINK, profile=profile(), device_gib="min", block_tokens=4, chunk_blocks=2, slots=2)
    shape = model_shape(make_model("llama", num_key_value_heads=4).config)
    decider = GenerationPlanner(config, shape, backend, profile)
    geometry = Geometry(num_offloaded_layers=3, rows=2, max_tokens=100, kv_row_bytes=200, activation_row_bytes=160)
    for num_bytes, is_smaller in ((16, True), (48, False)):
        decision = decider.plan_for(
            replace(geometry, position_row_bytes=num_bytes),
            prompt_tokens=50,
            knows_length=True,
            host_held_bytes=0,
        )
        assert (decision.placement.forms != {"kv"}) == is_smaller
