"""Caches of a session in loops of one's own: in turns, changing their rows and length, collected at a bad moment."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparing import SPLITS, config
from matrix import TOLERANCE, FixedRates, checking_backend, distance, row_bytes
from models import make_model
from modes import MODES, PROMPT_TOKENS, Outcome, emptied, given, outcome, plain_cache, prompt
from transformers import PreTrainedModel

from kvoffload import ConfigError, InfeasiblePlanError
from kvoffload.cache import attention, whole_layer
from kvoffload.cache.layer import CacheLayer
from kvoffload.session.later_plans import LaterPlans
from kvoffload.session.session import Session


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama", num_key_value_heads=4)  # activations are half of K and V: "auto" recomputes


def greedy_loop(model: PreTrainedModel, cache: Any, tokens: torch.Tensor, steps: int) -> Outcome:
    """Decode by hand."""
    logits, new = [], tokens
    with torch.no_grad():
        for _ in range(steps):
            out = model(new, **given(cache), use_cache=True)
            logits.append(out.logits[:, -1])
            new = logits[-1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, new], dim=1)
    return Outcome([tokens], logits)


@pytest.mark.parametrize("split", SPLITS)
def test_other_rows_than_are_cached_are_refused_and_the_cache_goes_on(split: Any, model: PreTrainedModel) -> None:
    wanted = greedy_loop(model, plain_cache(model), prompt(2), 12)
    with Session(model, config(split), checking_backend()) as session:
        cache = session.new_cache()
        found = greedy_loop(model, cache, prompt(2), 6)
        with torch.no_grad(), pytest.raises(ConfigError, match=r"holds 2 rows and is given tokens for 3.*new_cache"):
            model(prompt(3)[:, :1], **given(cache))
        with pytest.raises(ConfigError, match=r"holds 2 rows and is given tokens for 6 \(beams counted\)"):
            model.generate(prompt(2, 99), **given(cache), num_beams=3, max_new_tokens=2)  # type: ignore[operator]
        rest = greedy_loop(model, cache, found.logits[-1].argmax(-1, keepdim=True), 6)
    assert distance(Outcome([], [*found.logits, *rest.logits]), Outcome([], wanted.logits)) <= TOLERANCE


@pytest.mark.parametrize("split", SPLITS)
def test_a_custom_loop_with_a_cache_of_the_session(split: Any, model: PreTrainedModel) -> None:
    wanted = greedy_loop(model, plain_cache(model), prompt(2), 12)
    with Session(model, config(split), checking_backend()) as session:
        if split == "auto":
            session.planner.measured = FixedRates(*row_bytes(model))
        cache = session.new_cache()
        found = greedy_loop(model, cache, prompt(2), 12)
        assert cache.get_seq_length() == PROMPT_TOKENS + 11
        assert session.backend.link_use("h2d").copied_bytes > 0
        assert (cache.core.recomputed_tokens > 0) == (split != "transfer")
        # Two caches in turns: what was prefetched for one must not be used for the other.
        caches = [session.new_cache(), session.new_cache()]
        inputs = [prompt(2), prompt(1, 41, seed=9)]
        plain = [greedy_loop(model, plain_cache(model), tokens, 6) for tokens in inputs]
        turns = [greedy_loop(model, cache, tokens, 1) for cache, tokens in zip(caches, inputs, strict=True)]
        for step in range(1, 6):
            for idx, cache in enumerate(caches):
                last = greedy_loop(model, cache, turns[idx].logits[-1].argmax(-1, keepdim=True), 1)
                turns[idx].logits.append(last.logits[0])
                assert (last.logits[0] - plain[idx].logits[step]).abs().max().item() <= TOLERANCE
    assert distance(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
def test_a_cache_follows_every_change_of_its_rows_and_length(split: Any, model: PreTrainedModel) -> None:
    """Repeating, dropping, reordering and cropping as transformers' own cache does."""

    def play(cache: Any) -> list[torch.Tensor]:
        logits: list[torch.Tensor] = []

        def step(tokens: torch.Tensor) -> None:
            logits.append(model(tokens, **given(cache), use_cache=True).logits[:, -1])

        step(prompt(3))
        step(prompt(3, 9, seed=2))
        cache.batch_repeat_interleave(2)
        step(prompt(6, 1, seed=3))
        cache.reorder_cache(torch.tensor([5, 0, 1, 1, 2, 4]))
        step(prompt(6, 3, seed=4))
        cache.batch_select_indices(torch.tensor([0, 2, 3]))
        step(prompt(3, 5, seed=5))
        cache.crop(-2)  # within the tail or just behind it
        step(prompt(3, 1, seed=6))
        cache.crop(-17)  # several blocks
        step(prompt(3, 2, seed=7))
        cache.batch_select_indices(torch.tensor([True, False, True]))
        step(prompt(2, 6, seed=8))
        cache = emptied(cache)
        step(prompt(2, 23, seed=9))
        step(prompt(2, 1, seed=10))
        return logits

    with torch.no_grad():
        wanted = play(plain_cache(model))
        with Session(model, config(split), checking_backend()) as session:
            cache = session.new_cache()
            found = play(cache)
            del cache
            assert session.backend.link_use("h2d").copied_bytes > 0
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert (ours - theirs).abs().max().item() <= TOLERANCE, f"step {step}"


@pytest.mark.parametrize("path", ["auto", "whole_layer"])
@pytest.mark.parametrize("split", ["transfer", "recompute"])
def test_a_cache_that_is_collected_in_the_middle_of_a_step_of_another(
    split: Any, path: Any, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python frees an abandoned cache whenever it likes; that must not disturb what is under way."""
    wanted = outcome(MODES["left_padding"].run(model, None))
    with Session(model, config(split, attention=path), checking_backend()) as session:
        abandoned = session.new_cache()
        greedy_loop(model, abandoned, prompt(2), 3)
        abandoned.itself = abandoned  # only the garbage collector can free it
        reference = weakref.ref(abandoned)
        used_bytes = session.pool.used_bytes
        collected_at: list[int] = []

        def collect(layer: CacheLayer) -> None:
            if layer.position == 1 and not collected_at:
                gc.collect()
                collected_at.append(layer.num_tokens)

        def assemble(layer: CacheLayer, *new: torch.Tensor) -> Any:
            result = whole_layer.whole_kv(layer, *new)
            collect(layer)  # K and V stand ready, attention has not read them yet
            return result

        add = attention._Answer.add

        def add_segment(answer: Any, kv: torch.Tensor, first_block: int) -> None:
            collect(answer._layer)  # the chunk is in its slot
            add(answer, kv, first_block)

        monkeypatch.setattr("kvoffload.hf.offloaded_layer.whole_layer", SimpleNamespace(whole_kv=assemble))
        monkeypatch.setattr(attention._Answer, "add", add_segment)
        gc.disable()
        try:
            del abandoned
            found = outcome(MODES["left_padding"].run(model, None))
        finally:
            gc.enable()
        assert collected_at
        assert reference() is None
        assert distance(found, wanted) <= TOLERANCE
        assert used_bytes > 0
        session.new_cache()
        assert session.pool.used_bytes == 0


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
@pytest.mark.parametrize("device_gib", ["min", 0.0006])
def test_a_prompt_that_many_rows_continue(split: Any, device_gib: Any, model: PreTrainedModel) -> None:
    """Rows repeated after the first tokens: every buffer must grow, and resident blocks were made for fewer rows."""

    def play(cache: Any) -> list[torch.Tensor]:
        logits = [model(prompt(2, 9), **given(cache)).logits[:, -1]]
        cache.batch_repeat_interleave(5)
        for step, tokens in enumerate((7, 7, 7, 1)):
            logits.append(model(prompt(10, tokens, seed=step), **given(cache)).logits[:, -1])
        cache.crop(-9)
        logits.append(model(prompt(10, 1), **given(cache)).logits[:, -1])
        return logits

    with torch.no_grad():
        wanted = play(plain_cache(model))
        with Session(model, config(split, device_gib=device_gib), checking_backend()) as session:
            found = play(session.new_cache())
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
@pytest.mark.parametrize("device_gib", ["min", 0.0006])
def test_a_cache_goes_in_and_out_of_inference_mode(split: Any, device_gib: Any, model: PreTrainedModel) -> None:
    def play(cache: Any, *, with_inference_mode: bool) -> list[torch.Tensor]:
        logits = []
        for step in range(12):
            with torch.inference_mode() if with_inference_mode and step % 3 == 0 else torch.no_grad():
                tokens = 9 if step == 0 else 1 + step % 5
                logits.append(model(prompt(2, tokens, seed=step), **given(cache)).logits[:, -1])
                cache.reorder_cache(torch.tensor([1, 0]))
            if step == 7:
                cache.crop(-6)
        return logits

    with torch.no_grad():
        wanted = play(plain_cache(model), with_inference_mode=False)
        with Session(model, config(split, device_gib=device_gib), checking_backend()) as session:
            found = play(session.new_cache(), with_inference_mode=True)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max().item() <= TOLERANCE


def test_a_turn_that_cannot_be_planned_anew_keeps_no_cache_alive(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error, and the frames it passed, are gone when the turn is over, without a collection."""

    def fails(*args: Any) -> Any:
        raise InfeasiblePlanError("no room")

    monkeypatch.setattr(LaterPlans, "_planned_anew", fails)
    with Session(model, config("transfer"), checking_backend()) as session:
        gc.collect()
        gc.disable()
        try:
            MODES["returned_cache"].run(model, None)
            session.new_cache()  # gives back the memory of caches that nobody holds
            assert session.pool.used_bytes == 0
        finally:
            gc.enable()
