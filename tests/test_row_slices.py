"""Rows of a prefill pass a layer in slices while its weights are there: the same tokens, caches and bytes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from configs import CONFIGS
from matrix import checking_backend, distance
from models import make_model
from modes import COMMON, KINDS, Shape, given, outcome, padded_prompt, plain_cache, prompt
from streaming import LAYERS, config, streamable, weights_as_before
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kvoffload.hf.collected_rows import Collected, CollectedRows, Update
from kvoffload.model.model_shape import model_shape
from kvoffload.planning.memory import MIN_PREFILL_TOKENS, prefill_chunk_tokens, prefill_parts, prefill_peak_bytes
from kvoffload.session.session import Session


def sliced(session: Session, rows: int) -> None:
    """From now on so many rows pass a layer at once."""
    vars(session.model)["_kvoffload_session"]._weights.slice_rows(rows)


def layers_of(model: Any) -> Any:
    return next(one for one in model.modules() if isinstance(one, nn.ModuleList))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, ...]]]:
    """The shapes that a part of the second layer is called with; a hook there would have rows pass all at once."""

    def watch(model: Any, name: str, then: Callable[[], None] = lambda: None) -> list[tuple[int, ...]]:
        seen: list[tuple[int, ...]] = []
        watched_part = getattr(layers_of(model)[1], name)
        kind, call = type(watched_part), type(watched_part).forward

        def forward(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if part is watched_part:
                seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape))
                then()
            return call(part, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", functools.wraps(call)(forward))
        return seen

    return watch


Watch = Callable[..., list[tuple[int, ...]]]


SPLITS: tuple[Any, ...] = ("transfer", "recompute", 0.5)
SLICED_KINDS = ("llama", "opt", "qwen3", "mixtral", "phi3")
SLICED_MODES = ("greedy", "left_padding", "beams", "multi_turn", "return_sequences")
CELLS = [  # a split for each model and mode by default, in rotation; the others are slow
    pytest.param(kind, mode, split, marks=() if (i + j) % 3 == k else pytest.mark.slow)
    for i, kind in enumerate(SLICED_KINDS)
    for j, mode in enumerate(SLICED_MODES)
    for k, split in enumerate(SPLITS)
]


@pytest.mark.parametrize(("kind", "mode", "split"), CELLS)
def test_tokens_and_logits_are_those_of_plain_generate(kind: str, mode: str, split: Any) -> None:
    model, way = streamable(kind), KINDS[mode](Shape(rows=5, prompt_tokens=36))
    wanted = outcome(way.run(model, lambda: plain_cache(model)))
    with weights_as_before(model), Session(model, config(model, 1, split=split), checking_backend()) as session:
        sliced(session, 2)
        found = outcome(way.run(model, session.new_cache))
        assert session.stats is not None
        assert session.stats.weight_bytes % session.stats.plan.weight_bytes_per_step == 0
    assert distance(found, wanted) <= 1e-5


@pytest.mark.parametrize("rows_at_once", [1, 2])
def test_rows_with_padding_of_their_own_are_recomputed_with_their_own_positions(rows_at_once: int) -> None:
    model, way = streamable("llama", num_key_value_heads=4), KINDS["left_padding"](Shape(rows=3, prompt_tokens=36))
    wanted = outcome(way.run(model, lambda: plain_cache(model)))
    with Session(model, config(model, 0, split="recompute"), checking_backend()) as session:
        sliced(session, rows_at_once)
        found = outcome(way.run(model, session.new_cache))
        assert session.stats is not None
        assert session.stats.recomputed_tokens > 0
    assert distance(found, wanted) <= 1e-5


def test_a_bias_by_heads_is_not_cut_by_rows() -> None:
    model = make_model("mpt")  # ALiBi, [heads, 1, tokens], with as many heads as rows
    options = {**COMMON, "max_new_tokens": 6}
    wanted = model.generate(prompt(4, 20), **options)
    for rows in (1, 2):
        with Session(model, config(model, 0, split="transfer"), checking_backend()) as session:
            sliced(session, rows)
            found = model.generate(prompt(4, 20), **options)
        assert torch.equal(found.sequences, wanted.sequences)
        assert torch.allclose(torch.stack(found.logits), torch.stack(wanted.logits), atol=1e-5)


def test_a_later_part_of_a_prefill_passes_whole(watched: Watch) -> None:
    model = streamable("llama")
    seen = watched(model, "mlp")
    with Session(model, config(model, 0), checking_backend()) as session:
        sliced(session, 2)
        model.generate(prompt(5, 20), max_new_tokens=1, prefill_chunk_size=10)
    assert seen == [(2, 10, 48), (2, 10, 48), (1, 10, 48), (5, 10, 48)]


def test_slices_keep_no_embeddings_of_their_own() -> None:
    model = streamable("llama")
    with Session(model, config(model, 0, split="transfer"), checking_backend()) as session:
        sliced(session, 2)
        cache = session.new_cache()
        with torch.no_grad():  # with padding each row has its own
            model(**padded_prompt(5, 20), position_ids=torch.arange(100).view(5, 20) % 37, **given(cache))
        assert [layer._embeddings for layer in cache.layers] == [()] * LAYERS


def test_a_prefill_passes_in_slices_and_a_step_at_once(watched: Watch) -> None:
    model = streamable("llama")
    seen = watched(model, "mlp")
    with Session(model, config(model, 0), checking_backend()) as session:
        sliced(session, 2)
        model.generate(prompt(5, 20), max_new_tokens=3)
        assert session.stats is not None
        assert session.stats.weight_bytes == 3 * session.stats.plan.weight_bytes_per_step  # the prefill in one pass
    assert seen == [(2, 20, 48), (2, 20, 48), (1, 20, 48), (5, 1, 48), (5, 1, 48)]


@pytest.mark.parametrize("kind", ["gemma3_text", "lfm2", "falcon_h1"])
def test_layers_that_hold_something_else_pass_whole(kind: str, watched: Watch) -> None:
    model = hybrid() if kind == "falcon_h1" else streamable(kind)  # a window, a convolution, a state beside K and V
    wanted = model.generate(prompt(5, 40), max_new_tokens=6)
    is_ours = kind != "falcon_h1"  # of the first two every second layer is one of K and V alone
    with Session(model, config(model, 0 if is_ours else 1, split="transfer"), checking_backend()) as session:
        sliced(session, 2)
        seen = watched(model, "mlp" if kind == "gemma3_text" else "feed_forward")
        assert torch.equal(model.generate(prompt(5, 40), max_new_tokens=6), wanted)
    in_slices = [shape[0] for shape in seen if shape[1] > 1]
    assert in_slices == ([2, 2, 1] if is_ours else [5])
    assert model_shape(model.config).goes_by_rows is False


def hybrid() -> Any:
    """Falcon-H1: every layer has attention and a recurrent state."""
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 96, "head_dim": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    state = {"mamba_d_ssm": 96, "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_n_groups": 1, "mamba_d_state": 8}
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("falcon_h1", **sizes, **heads, **state, mamba_chunk_size=8)
    ).eval()
    found.generation_config.eos_token_id, found.generation_config.pad_token_id = None, 0
    return found


def test_a_bias_that_has_no_rows_is_planned_whole() -> None:
    for kind, wanted in (("bloom", False), ("mpt", False), ("llama", True)):
        assert model_shape(make_model(kind).config).goes_by_rows is wanted
    shape = model_shape(CONFIGS / "llama-3.1-8b.json")
    assert prefill_parts(shape, rows=32, prompt_tokens=512, room_bytes=2**40, may_slice=False) == (512, 32)


def test_attention_that_is_not_ours_takes_slices_too(watched: Watch) -> None:
    model = streamable("llama")
    wanted = model.generate(prompt(5, 30), max_new_tokens=6)
    with Session(model, config(model, 0, attention="whole_layer"), checking_backend()) as session:
        sliced(session, 3)
        seen = watched(model, "mlp")
        assert torch.equal(model.generate(prompt(5, 30), max_new_tokens=6), wanted)
    assert seen[:2] == [(3, 30, 48), (2, 30, 48)]


def test_an_error_between_two_slices_leaves_the_model_usable(watched: Watch) -> None:
    model, calls = streamable("llama"), 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    wanted = model.generate(prompt(5, 20), max_new_tokens=3)
    with Session(model, config(model, 0), checking_backend()) as session:
        sliced(session, 2)
        watched(model, "mlp", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt(5, 20), max_new_tokens=3)
        assert torch.equal(model.generate(prompt(5, 20), max_new_tokens=3), wanted)


def test_rows_are_put_together_when_all_are_there() -> None:
    def some(rows: int, *, is_segmented: bool = True, has_activation: bool = True, width: int = 1) -> Collected:
        states = torch.rand(rows, 2, 3, 4)
        activation = torch.rand(rows, 3, 8) if has_activation else None
        return Collected(Update(states, -states, activation), (torch.rand(width, 3, 4),), is_segmented)

    collected, slices = CollectedRows(5), [some(2, width=2), some(2, width=2), some(1)]
    slices[2] = slices[2]._replace(embeddings=(torch.rand(2, 3, 4)[:1],))
    assert [collected.add(one) for one in slices[:2]] == [None, None]
    whole = collected.add(slices[2])
    assert whole is not None
    assert torch.equal(whole.update.keys, torch.cat([one.update.keys for one in slices]))
    assert torch.equal(whole.update.values, -whole.update.keys)
    assert whole.update.activation is not None
    assert whole.update.activation.shape == (5, 3, 8)
    assert whole.embeddings is not None
    assert whole.embeddings[0].shape == (5, 3, 4)
    assert whole.is_segmented
    same, collected = torch.rand(1, 3, 4), CollectedRows(2)
    collected.add(some(1)._replace(embeddings=(same,)))
    shared = collected.add(some(1)._replace(embeddings=(same,)))
    assert shared is not None
    assert shared.embeddings == (same,)
    own, collected = [some(1), some(1)], CollectedRows(2)
    collected.add(own[0])
    found = collected.add(own[1])
    assert found is not None
    assert found.embeddings is not None
    assert torch.equal(found.embeddings[0], torch.cat([one.embeddings[0] for one in own if one.embeddings]))
    for odd in (some(2, is_segmented=False), some(2, has_activation=False), some(2)._replace(embeddings=None)):
        for pair in ([some(2), odd], [odd, some(2)]):
            collected = CollectedRows(4)
            assert collected.add(pair[0]) is None
            found = collected.add(pair[1])
            assert found is not None
            assert found.is_segmented == odd.is_segmented
            assert (found.update.activation is None) == (odd.update.activation is None)
            assert (found.embeddings is None) == (odd.embeddings is None)


def test_a_prefill_has_the_fewest_passes_that_fit_with_slices_that_keep_the_device_busy() -> None:
    shape = model_shape(CONFIGS / "llama-3.1-8b.json")

    def peak(tokens: int, at_once: int) -> int:
        return prefill_peak_bytes(shape, num_tokens=32 * tokens, rows=32, rows_at_once=at_once)

    assert 1.4 * peak(512, 8) < peak(512, 32) == prefill_peak_bytes(shape, num_tokens=32 * 512, rows=32)
    for room, wanted in (
        (peak(512, 8), (512, 8)),
        (peak(512, 8) - 1, (256, 32) if peak(256, 32) < peak(512, 8) else (128, 32)),
        (peak(128, 32), (128, 32)),
        (0, (MIN_PREFILL_TOKENS, 32)),
    ):
        assert prefill_parts(shape, rows=32, prompt_tokens=512, room_bytes=room) == wanted
    assert prefill_parts(shape, rows=2, prompt_tokens=512, room_bytes=2**40) == (512, 2)  # nothing is saved
    sliding = dataclasses.replace(shape, num_offloaded_layers=8)
    assert prefill_parts(sliding, rows=32, prompt_tokens=512, room_bytes=2**40) == (512, 32)


def test_a_part_of_a_prefill_is_not_longer_than_pays() -> None:
    shape = model_shape(CONFIGS / "llama-3.1-8b.json")

    def tokens(rows: int, prompt_tokens: int, room_bytes: int = 2**50) -> int:
        return prefill_chunk_tokens(shape, rows=rows, prompt_tokens=prompt_tokens, room_bytes=room_bytes)

    assert [tokens(rows, 130_000) for rows in (1, 8, 1000)] == [16_384, 2_048, MIN_PREFILL_TOKENS]
    assert tokens(8, 100) == 100  # a short prompt goes in one part
    half = prefill_peak_bytes(shape, num_tokens=8_192, rows=1)
    assert (tokens(1, 130_000, half), tokens(1, 130_000, half - 1)) == (8_192, 4_096)
