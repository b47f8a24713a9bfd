"""Rows of a prefill pass a layer in slices while its weights are there: the same tokens, caches and bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from configs import CONFIGS
from matrix import checking_backend, distance
from models import make_model
from modes import COMMON, KINDS, Shape, given, outcome, plain_cache, prompt
from streaming import config, streamable, weights_as_before
from torch import nn

from kvoffload.hf.collected_rows import Collected, CollectedRows, Update
from kvoffload.hf.row_slices import through_in_slices
from kvoffload.model.model_shape import model_shape
from kvoffload.planning.memory import MIN_PREFILL_TOKENS, prefill_parts, prefill_peak_bytes
from kvoffload.session.session import Session


def sliced(session: Session, rows: int) -> None:
    """From now on so many rows pass a layer at once."""
    session._offloaded._weights.slice_rows(rows)


def watched(model: Any, name: str) -> list[tuple[int, ...]]:
    """The shapes that a part of the second layer is called with."""
    seen: list[tuple[int, ...]] = []
    layers: Any = next(one for one in model.modules() if isinstance(one, nn.ModuleList))
    part = getattr(layers[1], name)
    part.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    return seen


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


def test_a_later_part_of_a_prefill_passes_whole() -> None:
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
        with torch.no_grad():
            model(prompt(5, 20), **given(cache))
        kept = {part.data_ptr() for layer in cache.layers for part in layer._embeddings or ()}
        assert len(kept) <= 2


def test_a_prefill_passes_in_slices_and_a_step_at_once() -> None:
    model = streamable("llama")
    seen = watched(model, "mlp")
    with Session(model, config(model, 0), checking_backend()) as session:
        sliced(session, 2)
        model.generate(prompt(5, 20), max_new_tokens=3)
        assert session.stats is not None
        assert session.stats.weight_bytes == 3 * session.stats.plan.weight_bytes_per_step  # the prefill in one pass
    assert seen == [(2, 20, 48), (2, 20, 48), (1, 20, 48), (5, 1, 48), (5, 1, 48)]


def test_layers_that_hold_something_else_pass_whole() -> None:
    for kind in ("gemma3_text", "lfm2"):  # a window, a convolution
        model = streamable(kind)
        wanted = model.generate(prompt(5, 40), max_new_tokens=6)
        with Session(model, config(model, 0), checking_backend()) as session:
            sliced(session, 2)
            assert torch.equal(model.generate(prompt(5, 40), max_new_tokens=6), wanted)


def test_attention_that_is_not_ours_takes_slices_too() -> None:
    model = streamable("llama")
    wanted = model.generate(prompt(5, 30), max_new_tokens=6)
    with Session(model, config(model, 0, attention="whole_layer"), checking_backend()) as session:
        sliced(session, 3)
        assert torch.equal(model.generate(prompt(5, 30), max_new_tokens=6), wanted)


def test_an_error_between_two_slices_leaves_the_model_usable() -> None:
    model, calls = streamable("llama"), 0

    def interrupt(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    wanted = model.generate(prompt(5, 20), max_new_tokens=3)
    layers: Any = model.model.layers  # type: ignore[union-attr]
    with Session(model, config(model, 0), checking_backend()) as session:
        sliced(session, 2)
        handle = layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt(5, 20), max_new_tokens=3)
        handle.remove()
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


def test_arguments_whose_rows_are_not_known_are_not_cut() -> None:
    model = streamable("llama")
    with Session(model, config(model, 0), checking_backend()) as session:
        cache, seen = session.new_cache(), []

        def forward(hidden_states: torch.Tensor, bias: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            seen.append((tuple(hidden_states.shape), tuple(bias.shape)))
            return hidden_states

        hidden = torch.zeros(4, 6, 48)
        for bias in (torch.zeros(8, 1, 6), torch.zeros(4, 1, 6, 6), torch.zeros(1, 1, 6, 6), torch.zeros(6)):
            kwargs = {"hidden_states": hidden, "bias": bias, **given(cache)}
            found = through_in_slices(forward, ["hidden_states", "bias"], 0, 2, (), kwargs)
            assert found.shape == hidden.shape
        square = {"hidden_states": torch.zeros(4, 4, 48), "bias": torch.zeros(4, 4), **given(cache)}
        through_in_slices(forward, ["hidden_states", "bias"], 0, 2, (), square)
    assert seen == [
        ((4, 6, 48), (8, 1, 6)),  # rows and heads in one
        ((4, 6, 48), (4, 1, 6, 6)),  # rows or heads
        *[((2, 6, 48), (1, 1, 6, 6))] * 2,
        *[((2, 6, 48), (6,))] * 2,
        ((4, 4, 48), (4, 4)),  # rows or tokens
    ]


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
