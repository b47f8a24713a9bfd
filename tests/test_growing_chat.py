"""A cache that lives on over several turns is planned for each as a fresh one of that length would be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import FixedRates, checking_backend, profile, row_bytes
from models import make_model
from modes import COMMON, given, prompt
from transformers import DynamicCache

from kvoffload import EmulatedLink, OffloadConfig, Plan
from kvoffload.errors import HostMemoryError, InfeasiblePlanError
from kvoffload.session import later_plans
from kvoffload.session.session import Session

LINK = EmulatedLink(h2d_gb_per_s=0.05)
ROWS, NEW_TOKENS, TURNS = 2, 6, (40, 80, 160, 320, 640)  # tokens at the end of each turn's prompt
OPTIONS: list[dict[str, Any]] = [
    {"split": "auto"},
    {"split": "transfer"},
    {"split": 0.5},
    {"split": "auto", "attention": "whole_layer"},
    {"split": "auto", "schedule": "kvpr"},
    {"split": "transfer", "device_gib": 2e-3},
    {"split": "transfer", "device_gib": 3e-4},
    {"split": "auto", "device_gib": 3e-4},
]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", num_key_value_heads=4, max_position_embeddings=2048)


def config_of(options: dict[str, Any]) -> OffloadConfig:
    return OffloadConfig(**{"link": LINK, "profile": profile(0.05), "device_gib": "min"} | options)


def turns(model: Any, cache: Any, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """A chat that is given so many tokens in all before each answer; what has been said by then."""
    text, said = prompt(ROWS, 1), []
    for turn, length in enumerate(lengths):
        text = torch.cat([text, prompt(ROWS, length - text.shape[1], seed=turn)], 1)
        mask = torch.ones_like(text)
        options = {**COMMON, "max_new_tokens": NEW_TOKENS, "attention_mask": mask, **given(cache)}
        text = model.generate(text, **options).sequences
        said.append(text)
    return said


def fresh_plan(model: Any, options: dict[str, Any], length: int, block_tokens: int) -> Plan:
    """That of a cache which begins at this length, in blocks of that size."""
    with Session(model, config_of(options | {"block_tokens": block_tokens}), checking_backend(LINK)) as session:
        session.planner.measured = FixedRates(*row_bytes(model))
        turns(model, session.new_cache(), (length,))
        assert session.stats is not None
        return session.stats.plan


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_turn_is_planned_like_a_fresh_cache_of_its_length(model: Any, options: dict[str, Any]) -> None:
    expected = turns(model, DynamicCache(config=model.config), TURNS)
    plans = []
    with Session(model, config_of(options), checking_backend(LINK)) as session:
        session.planner.measured = FixedRates(*row_bytes(model))
        cache, text = session.new_cache(), prompt(ROWS, 1)
        for turn, length in enumerate(TURNS):
            text = torch.cat([text, prompt(ROWS, length - text.shape[1], seed=turn)], 1)
            call = {**COMMON, "max_new_tokens": NEW_TOKENS, "attention_mask": torch.ones_like(text), **given(cache)}
            text = model.generate(text, **call).sequences
            assert torch.equal(text, expected[turn])
            assert session.stats is not None
            plans.append(session.stats.plan)
    for length, plan in zip(TURNS, plans, strict=True):
        fresh = fresh_plan(model, options, length, plan.block_tokens)
        # Plans are for the middle of a turn, so that its last block may be on the host already when the next begins.
        left_s = len(TURNS) * plan.block_tokens * 3 * max(plan.bytes_per_token.values()) / 0.05e9
        assert plan.predicted_step_s == pytest.approx(fresh.predicted_step_s, rel=0.1, abs=left_s)
        assert (plan.chunk_blocks, plan.num_slots) == (fresh.chunk_blocks, fresh.num_slots)
        assert abs(plan.num_blocks - fresh.num_blocks) <= 1


def test_a_turn_that_no_plan_fits_keeps_the_plan_of_the_last(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = turns(model, DynamicCache(config=model.config), TURNS[:3])
    with Session(model, config_of({"split": "transfer"}), checking_backend(LINK)) as session:
        session.planner.measured = FixedRates(*row_bytes(model))
        cache = session.new_cache()
        assert torch.equal(turns(model, cache, TURNS[:1])[0], expected[0])
        before = session.stats.plan  # type: ignore[union-attr]

        def refuse(*args: object, **options: object) -> None:
            raise InfeasiblePlanError("no room")

        monkeypatch.setattr(later_plans, "pose", refuse)
        text = torch.cat([expected[0], prompt(ROWS, TURNS[1] - expected[0].shape[1], seed=1)], 1)
        call = {**COMMON, "max_new_tokens": NEW_TOKENS, "attention_mask": torch.ones_like(text), **given(cache)}
        assert torch.equal(model.generate(text, **call).sequences, expected[1])
        assert session.stats.plan == before  # type: ignore[union-attr]


def held_by_turn(model: Any, options: dict[str, Any], lengths: tuple[int, ...]) -> list[int]:
    """Device memory of K and V at the peak of each turn's decoding."""
    peaks, text = [], prompt(ROWS, 1)
    with Session(model, config_of(options), checking_backend(LINK)) as session:
        session.planner.measured = FixedRates(*row_bytes(model))
        cache = session.new_cache()
        for turn, length in enumerate(lengths):
            text = torch.cat([text, prompt(ROWS, length - text.shape[1], seed=turn)], 1)
            call = {**COMMON, "max_new_tokens": NEW_TOKENS, "attention_mask": torch.ones_like(text), **given(cache)}
            text = model.generate(text, **call).sequences
            assert session.stats is not None
            peaks.append(session.stats.device_kv_peak_decode_bytes)
    return peaks


@pytest.mark.parametrize(
    ("attention", "cap", "turns"),
    [("auto", 450_000, TURNS), ("whole_layer", 2**19, TURNS[:3])],  # whole layers grow beyond it in the fourth
)
def test_the_cap_on_the_device_holds_in_every_turn(model: Any, attention: str, cap: int, turns: Any) -> None:
    """Resident blocks of the first turn stay; chunks that would grow later have to fit beside them."""
    options = {"split": "transfer", "device_gib": cap / 2**30, "attention": attention}
    peaks = held_by_turn(model, options, turns)
    assert peaks[0] > cap / 3
    assert max(peaks) <= cap


def test_a_turn_is_refused_only_where_no_form_fits_and_the_cache_lives_on(model: Any) -> None:
    kv, activation = row_bytes(model)
    layers, first, last = 3, TURNS[1], TURNS[3]
    room = layers * ROWS * (last + 200) * activation  # mostly of activations, which are half of K and V
    with Session(model, config_of({"split": "auto", "host_gib": room / 2**30}), checking_backend(LINK)) as session:
        session.planner.measured = FixedRates(kv, activation)
        cache, text = session.new_cache(), prompt(ROWS, first)
        session.pool.cap_bytes = 2**30  # slabs are larger than this cache
        call = {**COMMON, "max_new_tokens": NEW_TOKENS}
        text = model.generate(text, **call, attention_mask=torch.ones_like(text), **given(cache)).sequences
        much = torch.cat([text, prompt(ROWS, 4 * last, seed=3)], 1)
        with pytest.raises(HostMemoryError, match="host memory"):
            model.generate(much, **call, attention_mask=torch.ones_like(much), **given(cache))
        more = torch.cat([text, prompt(ROWS, last - text.shape[1], seed=4)], 1)
        found = model.generate(more, **call, attention_mask=torch.ones_like(more), **given(cache)).sequences
    plain = model.generate(more, **call, attention_mask=torch.ones_like(more)).sequences
    assert torch.equal(found, plain)
