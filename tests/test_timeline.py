"""What ran when: planned stretches add up to the plan, measured ones to the statistics, and no lane overlaps itself."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Sequence
from typing import Any

import closed_forms
import pytest
import torch
from matrix import prompt
from models import make_model
from modes import given
from placements import LONG, changed, placed, random_placement

import kvoffload
from kvoffload import EmulatedLink, KVOffloadError, OffloadConfig
from kvoffload.backend import CheckingBackend, EmulatedBackend
from kvoffload.planning.simulation import simulate
from kvoffload.session.session import Session
from kvoffload.timeline import COMPUTE, Span, Timeline, assemble

NEW_TOKENS = 10


def assert_no_overlap(spans: Sequence[Span]) -> None:
    for before, after in itertools.pairwise(sorted(spans, key=lambda span: span.start_s)):
        assert before.end_s <= after.start_s + 1e-9, (before, after)


def assert_compute_is_tiled(found: Timeline, start_s: float, end_s: float) -> None:
    """Something of compute, or a wait, at every moment, and never two of them at once."""
    compute = [span for span in found.spans if span.lane in COMPUTE and span.end_s > start_s and span.start_s < end_s]
    assert_no_overlap(compute)
    covered_s = sum(min(span.end_s, end_s) - max(span.start_s, start_s) for span in compute)
    assert covered_s == pytest.approx(end_s - start_s, rel=1e-6)


# ---- assembling ------------------------------------------------------------------------------------------------------


def test_what_nobody_noted_in_a_step_is_dense() -> None:
    found = assemble(
        [
            Span("end", 9.0, 9.0),
            Span("step", 6.0, 6.0),
            Span("attention", 7.0, 8.0),
            Span("wait", 3.0, 4.0),
            Span("recompute", 4.0, 7.0),
            Span("step", 2.0, 2.0),
            Span("prefill", 0.0, 0.0),
            Span("h2d", 1.0, 5.0, 40),
        ]
    )
    assert found.steps_s == (2.0, 6.0, 9.0)
    assert found.lane("dense") == (Span("dense", 2.0, 3.0), Span("dense", 8.0, 9.0))
    assert_compute_is_tiled(found, 2.0, 9.0)


def test_a_step_is_cut_out_with_the_share_of_the_bytes_that_travelled_in_it() -> None:
    found = Timeline((Span("h2d", 1.0, 5.0, 40), Span("attention", 7.0, 8.0)), (2.0, 6.0, 9.0))
    assert found.steps(0) == Timeline((Span("h2d", 0.0, 3.0, 30),), (0.0, 4.0))
    assert found.steps(0, 2).lane("attention") == (Span("attention", 5.0, 6.0),)
    assert found.num_steps == 2


def test_a_timeline_without_decode_steps_has_none() -> None:
    assert assemble([Span("prefill", 0.0, 0.0), Span("h2d", 0.0, 1.0, 3), Span("end", 2.0, 2.0)]).num_steps == 0


def test_neither_a_pause_after_the_end_nor_a_second_prefill_is_a_step() -> None:
    first = [Span("prefill", 0.0, 0.0), Span("prefill", 1.0, 1.0), Span("step", 2.0, 2.0), Span("step", 3.0, 3.0)]
    end = Span("end", 4.0, 4.0)
    assert assemble([*first, end, Span("prefill", 50.0, 50.0), Span("end", 51.0, 51.0)]).steps_s == (2.0, 3.0, 4.0)
    assert assemble([*first, Span("prefill", 4.0, 4.0), Span("end", 5.0, 5.0)]).steps_s == (2.0, 3.0, 4.0)
    again = [Span("prefill", 50.0, 50.0), Span("step", 52.0, 52.0), Span("step", 54.0, 54.0), Span("end", 56.0, 56.0)]
    for found in (assemble([*first, end, *again]), assemble([*first, *again])):
        assert found.steps_s == (52.0, 54.0, 56.0)
        assert found.busy_s("dense") == pytest.approx(4.0)
    without_prefill = [*first, end, *again[1:]]
    assert assemble(without_prefill).steps_s == (52.0, 54.0, 56.0)


@pytest.mark.parametrize(("first", "count"), [(2, 1), (1, 2), (-1, 1), (0, 0), (0, 3), (7, 1)])
def test_steps_that_are_not_there_are_refused(first: int, count: int) -> None:
    found = Timeline((Span("h2d", 1.0, 5.0, 40),), (2.0, 6.0, 9.0))
    with pytest.raises(IndexError, match=rf"first={first}, count={count}: this timeline has 2 steps"):
        found.steps(first, count)
    with pytest.raises(IndexError, match="this timeline has 0"):
        Timeline((), ()).steps(0)


# ---- planned ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_segmented", [False, True])
def test_planned_stretches_carry_the_bytes_of_the_plan_and_never_overlap(is_segmented: bool) -> None:
    rng = random.Random(1)
    for _ in range(60):
        inputs, (r, r_x, x, t) = random_placement(rng)
        speed = 160.0
        rates = changed(inputs.rates, h2d_activation_bytes_per_s=speed, h2d_kv_bytes_per_s=speed)
        schedule: Any = "pipelined" if is_segmented else rng.choice(["pipelined", "kvpr"])
        plan = dataclasses.replace(placed(inputs, r, r_x, x, t), is_segmented=is_segmented, schedule=schedule)
        overlap = rng.random() < 0.8
        recorded: list[Span] = []
        simulation = simulate(plan, rates, overlap=overlap, num_steps=4, record=recorded.append)
        assert simulation == simulate(plan, rates, overlap=overlap, num_steps=4)
        found = assemble(recorded)
        assert found.num_steps == 4
        link = sorted([*found.lane("h2d"), *found.lane("weights")], key=lambda span: span.start_s)
        assert_no_overlap(tuple(link))
        assert_compute_is_tiled(found, 0.0, found.steps_s[-1])
        assert sum(span.seconds for span in link) == pytest.approx(4 * plan.link_bytes_per_step / speed)
        assert sum(span.num_bytes for span in link) == pytest.approx(4 * plan.link_bytes_per_step, abs=99)
        weight_bytes = sum(span.num_bytes for span in found.lane("weights"))
        assert weight_bytes == pytest.approx(4 * plan.weight_bytes_per_step, abs=99)
        assert (found.steps_s[4] - found.steps_s[2]) / 2 == pytest.approx(simulation.step_s)


def test_planned_stretches_of_compute_add_up_to_the_device_time_of_the_model() -> None:
    recorded: list[Span] = []
    plan = dataclasses.replace(placed(LONG, 10, 10, 20, 20), is_segmented=True)
    simulate(plan, LONG.rates, num_steps=2, record=recorded.append)
    worked_s = sum(span.seconds for span in recorded if span.lane in COMPUTE - {"wait"})
    assert worked_s == pytest.approx(2 * closed_forms.device_s(LONG, 10, 20))


# ---- measured --------------------------------------------------------------------------------------------------------


def generate(session: Session, rows: int = 4, new_tokens: int = NEW_TOKENS) -> torch.Tensor:
    ids = prompt(rows, 64)
    out: torch.Tensor = session.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    return out


def opened(checked: bool = False, attention: Any = "auto") -> Session:
    model = make_model("opt", hidden_size=64, ffn_dim=64, word_embed_proj_dim=64)
    link = EmulatedLink(h2d_gb_per_s=0.02)
    config = OffloadConfig(split=0.5, link=link, device_gib="min", block_tokens=8, chunk_blocks=2, attention=attention)
    backend: Any = EmulatedBackend(link)
    return Session(model, config, CheckingBackend(backend) if checked else backend)


def test_nothing_is_recorded_unless_asked_for() -> None:
    with opened() as session:
        generate(session)
        assert session.backend.recorded() == []
        with pytest.raises(KVOffloadError, match=r"call session\.record_timeline\(\) before generate"):
            session.timeline()


@pytest.mark.parametrize("attention", ["auto", "whole_layer"])
@pytest.mark.parametrize("checked", [False, True])
def test_recorded_copies_are_those_of_the_statistics(checked: bool, attention: Any) -> None:
    with opened(checked, attention) as session:
        session.record_timeline()
        generate(session)
        found, stats = session.timeline(), session.stats
        use = session.backend.link_use("h2d")
    assert stats is not None
    for lane, num_bytes in (("h2d", stats.h2d_bytes), ("d2h", stats.d2h_bytes)):
        spans = found.lane(lane)
        assert_no_overlap(spans)
        assert sum(span.num_bytes for span in spans) == num_bytes > 0
    assert found.busy_s("h2d") == pytest.approx(use.busy_s)
    assert found.busy_s("recompute") == pytest.approx(stats.recompute_s)
    assert found.busy_s("wait") == pytest.approx(stats.exposed_wait_s)
    assert found.num_steps == len(stats.decode_step_s) == NEW_TOKENS - 1
    assert_compute_is_tiled(found, found.steps_s[0], found.steps_s[-1])
    assert bool(found.lane("attention")) == (attention == "auto")  # inside a module of transformers it is not seen


@pytest.mark.timing
def test_recorded_steps_take_as_long_as_the_statistics_say() -> None:
    with opened() as session:
        session.record_timeline()
        generate(session)
        found, stats = session.timeline(), session.stats
    assert stats is not None
    steps = [after - before for before, after in itertools.pairwise(found.steps_s)]
    assert sum(steps) == pytest.approx(sum(stats.decode_step_s), rel=0.02)


def test_each_generate_is_recorded_anew() -> None:
    with opened() as session:
        session.record_timeline()
        generate(session)
        generate(session, rows=2, new_tokens=4)
        found, stats = session.timeline(), session.stats
    assert stats is not None
    assert found.num_steps == 3
    assert sum(span.num_bytes for span in found.lane("h2d")) == stats.h2d_bytes


def custom_loop(session: Session, steps: int = 3) -> None:
    ids, cache = prompt(4, 64), session.new_cache()
    with torch.inference_mode():
        for _ in range(steps):
            ids = session.model(ids, **given(cache), use_cache=True).logits[:, -1:].argmax(-1)
    session.backend.synchronize()


def test_a_loop_of_the_caller_is_not_in_the_timeline() -> None:
    with opened(checked=True) as session:
        session.record_timeline()
        custom_loop(session)
        with pytest.raises(KVOffloadError, match="nothing is recorded"):
            session.timeline()
        generate(session)
        before = session.timeline()
        custom_loop(session)
        assert session.timeline() == before
        assert not session.backend.is_recording


def test_a_generate_that_fails_ends_the_recording_too() -> None:
    with opened() as session:
        session.record_timeline()
        with pytest.raises(TypeError):
            session.model.generate(prompt(1), max_new_tokens="many", do_sample=False)
        assert not session.backend.is_recording


@pytest.mark.parametrize("checked", [False, True])
def test_a_recording_that_is_switched_off_is_forgotten(checked: bool) -> None:
    with opened(checked) as session:
        session.record_timeline()
        generate(session)
        assert session.backend.recorded()
        session.record_timeline(False)
        assert session.backend.recorded() == []
        generate(session)
        assert session.backend.recorded() == []
        with pytest.raises(KVOffloadError, match="nothing is recorded"):
            session.timeline()
        session.record_timeline()
        generate(session)
        assert session.timeline().num_steps == NEW_TOKENS - 1


def test_recorded_times_count_from_the_beginning_of_generate() -> None:
    with opened() as session:
        session.record_timeline()
        began = time.perf_counter()
        generate(session)
        took_s = time.perf_counter() - began
        found = session.timeline()
    assert 0 <= found.spans[0].start_s <= found.steps_s[0]
    assert found.steps_s[-1] <= took_s


def test_tokens_are_the_same_with_and_without_a_recording() -> None:
    with opened() as session:
        plain = generate(session)
        session.record_timeline()
        assert torch.equal(generate(session), plain)


def test_a_recording_keeps_the_latest_stretches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvoffload.backend.emulated.MAX_RECORDED", 40)
    with opened() as session:
        session.record_timeline()
        generate(session)
        assert len(session.backend.recorded()) == 40


def test_the_public_session_offers_it() -> None:
    assert {"record_timeline", "timeline"} <= set(dir(kvoffload.Session))
