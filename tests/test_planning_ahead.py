"""Plans that are made beside the forwards: no token waits for one, and one for what is no longer so is dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from matrix import FAST_LINK, kvoffload_threads, profile
from modes import COMMON, prompt
from test_reported import tiny

import kvoffload
from kvoffload import OffloadConfig
from kvoffload.planning import planner
from kvoffload.session.planning_ahead import PlanningAhead


def wait(ahead: PlanningAhead[str]) -> None:
    assert ahead._pending is not None
    ahead._pending[1].exception()


@pytest.fixture
def ahead() -> Iterator[PlanningAhead[str]]:
    ahead: PlanningAhead[str] = PlanningAhead()
    yield ahead
    ahead.close()


def test_a_plan_is_taken_once_when_it_is_ready(ahead: PlanningAhead[str]) -> None:
    may_end = threading.Event()
    before = "before"

    def make() -> str:
        may_end.wait()
        return "after"

    assert ahead.take(before) is None
    ahead.start(before, make)
    assert ahead.take(before) is None
    ahead.start(before, lambda: "another")  # one at a time
    may_end.set()
    wait(ahead)
    assert ahead.take(before) == "after"
    assert ahead.take(before) is None


def test_a_plan_made_for_what_does_not_hold_any_more_is_dropped(ahead: PlanningAhead[str]) -> None:
    ahead.start("before", lambda: "after")
    wait(ahead)
    assert ahead.take("something else") is None
    assert ahead.take("before") is None


def test_a_plan_that_cannot_be_made_leaves_the_old_one_in_force(
    ahead: PlanningAhead[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> str:
        raise MemoryError("no room")

    before = "before"
    ahead.start(before, fail)
    wait(ahead)
    assert ahead.take(before) is None
    assert "no room" in caplog.text
    ahead.start(before, lambda: "after")
    wait(ahead)
    assert ahead.take(before) == "after"


@pytest.mark.timing
def test_no_token_waits_for_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama", num_key_value_heads=4), prompt(1, 37)
    wanted = model.generate(ids, **{**COMMON, "max_new_tokens": 24}).sequences
    config = OffloadConfig(link=FAST_LINK, profile=profile(), device_gib="min", block_tokens=4, chunk_blocks=2)
    real, solved_in = planner.solve, []

    def slow(inputs: Any) -> Any:
        solved_in.append(threading.current_thread().name)
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)
        return real(inputs)

    with kvoffload.offload(model, config) as session:
        model.generate(ids, **COMMON)  # measures, and plans first
        monkeypatch.setattr(planner, "solve", slow)
        found = model.generate(ids, **{**COMMON, "max_new_tokens": 24}).sequences
        assert torch.equal(found, wanted)
        assert session.stats is not None
        assert max(session.stats.decode_step_s) < 0.2
        first = solved_in.index("kvoffload-plan_0")
        assert all(name.startswith("kvoffload-plan") for name in solved_in[first:]), "in a decode step"
    assert not kvoffload_threads()
