"""Several caches of one session in turn, and one cache in several ways: crops, reads, resets, other threads, copies."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from matrix import FAST_LINK
from modes import COMMON, given, plain_cache, prompt
from test_reported import tiny
from transformers import PreTrainedModel

import kvoffload
from kvoffload import KVOffloadError, OffloadConfig

WAYS = {
    "segments": OffloadConfig(split="transfer", device_gib="min", block_tokens=8, link=FAST_LINK),
    "half": OffloadConfig(split=0.5, device_gib="min", block_tokens=8, link=FAST_LINK),
    "whole layers": OffloadConfig(
        split="transfer", device_gib="min", block_tokens=8, link=FAST_LINK, attention="whole_layer"
    ),
}


@pytest.fixture(scope="module", name="model")
def model_fixture() -> PreTrainedModel:
    return tiny("llama")


def logits_of(model: PreTrainedModel, caches: tuple[Any, Any], ids: torch.Tensor) -> float:
    """How far a step with our cache is from one with transformers' own."""
    ours, theirs = (model(ids, **given(cache)).logits for cache in caches)
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [40, 300])  # the second beyond what a cache of unknown length is made for
def test_a_cache_is_cropped_after_another_had_its_turn(model: PreTrainedModel, way: str, tokens: int) -> None:
    ids = prompt(2, tokens)[:, :250] if tokens > 250 else prompt(2, tokens)
    with kvoffload.offload(model, WAYS[way]) as session, torch.no_grad():
        caches = (session.new_cache(), plain_cache(model))
        assert logits_of(model, caches, ids) <= 5e-6
        model.generate(prompt(1, 9), **COMMON)  # with smaller slots and buffers
        for cache in caches:
            cache.crop(-3)
        assert logits_of(model, caches, prompt(2, 2)) <= 5e-6


def test_layers_of_other_widths_come_back_after_another_cache_had_its_turn() -> None:
    kinds = ["sliding_attention", "full_attention"]
    wide = {"num_attention_heads": 4, "num_key_value_heads": 4, "layer_types": kinds * 2, "sliding_window": 512}
    model = tiny("gemma3_text", **wide)
    with kvoffload.offload(model, WAYS["whole layers"]) as session, torch.no_grad():
        caches = (session.new_cache(), plain_cache(model))
        for step in range(3):
            assert logits_of(model, caches, prompt(2, 60 if step == 0 else 1)) <= 5e-6
            model(prompt(1, 9), **given(session.new_cache()))


@pytest.mark.parametrize("way", WAYS)
def test_reading_keys_takes_device_memory_only_for_as_long_as_it_lasts(model: PreTrainedModel, way: str) -> None:
    with kvoffload.offload(model, WAYS[way]) as session, torch.no_grad():
        caches = (session.new_cache(), plain_cache(model))
        logits_of(model, caches, prompt(2, 60))
        logits_of(model, caches, prompt(2, 1))
        held = dict(session.engine.account.held_bytes)
        for ours, theirs in zip(caches[0], caches[1], strict=True):
            torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
        assert session.engine.account.held_bytes == held
        assert logits_of(model, caches, prompt(2, 1)) <= 5e-6


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_that_was_reset_forgets_the_order_of_its_rows(model: PreTrainedModel, way: str) -> None:
    with kvoffload.offload(model, WAYS[way]) as session, torch.no_grad():
        cache = session.new_cache()
        for order in ([1, 0, 2], [2, 1, 0]):
            caches = (cache, plain_cache(model))
            assert logits_of(model, caches, prompt(3, 40)) <= 5e-6
            for one in caches:
                one.reorder_cache(torch.tensor(order))
            assert logits_of(model, caches, prompt(3, 1)) <= 5e-6
            cache.reset()


def test_keys_are_read_after_another_cache_had_its_turn(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, WAYS["whole layers"]) as session, torch.no_grad():
        caches = (session.new_cache(), plain_cache(model))
        logits_of(model, caches, prompt(2, 60))
        model(prompt(1, 9), **given(session.new_cache()))
        for ours, theirs in zip(caches[0], caches[1], strict=True):
            torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)


def test_a_layer_with_a_state_begins_anew_with_other_rows() -> None:
    sizes = {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_n_groups": 1, "mamba_d_state": 8}
    model = tiny("falcon_h1", **sizes, mamba_chunk_size=8, num_key_value_heads=2)
    with kvoffload.offload(model, WAYS["segments"]) as session, torch.no_grad():
        cache = session.new_cache()
        model(prompt(1, 20), **given(cache))
        cache.reset()
        assert logits_of(model, (cache, plain_cache(model)), prompt(3, 20)) <= 5e-6


def test_a_cache_in_another_thread_is_refused_while_generate_runs(model: PreTrainedModel) -> None:
    raised: list[BaseException] = []
    with kvoffload.offload(model, WAYS["segments"]) as session:
        other = session.new_cache()
        with torch.no_grad():
            model(prompt(1, 30), **given(other))

        def read() -> None:
            try:
                other.layers[0].keys  # noqa: B018
            except KVOffloadError as error:
                raised.append(error)

        def in_the_middle(*args: Any) -> None:
            if not raised:
                thread = threading.Thread(target=read)
                thread.start()
                thread.join()

        handle = model.lm_head.register_forward_hook(in_the_middle)
        try:
            found = model.generate(prompt(1), **COMMON).sequences
        finally:
            handle.remove()
        assert other.layers[0].keys is not None
    assert "running in another thread" in str(raised[0])
    assert torch.equal(found, model.generate(prompt(1), **COMMON).sequences)


def test_a_model_is_not_copied_while_it_is_offloaded(model: PreTrainedModel) -> None:
    with (
        kvoffload.offload(model, WAYS["segments"]),
        pytest.raises(KVOffloadError, match="close\\(\\) the session first"),
    ):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_a_crop_of_a_dead_cache_says_so(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, WAYS["segments"]) as session, torch.no_grad():
        cache = session.new_cache()
        model(prompt(1, 30), **given(cache))
    with pytest.raises(KVOffloadError, match="failed or is over"):
        cache.crop(-1)
