"""Copies on the device: which blocks have one, and that drafts see these, the tail, and nothing else."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from drafting import window_gib
from matrix import FAST_LINK, checking_backend, profile
from models import make_model
from modes import COMMON, given, padded_prompt, plain_cache, prompt
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from kvoffload import OffloadConfig
from kvoffload.backend import EmulatedBackend
from kvoffload.config import GIB
from kvoffload.session.session import Session
from kvoffload.store.block import Block
from kvoffload.store.near_copies import NearCopies

BYTES = 16


def filled(window: NearCopies, index: int) -> None:
    data = window.take(index, Block("activation", 2, 5), BYTES)
    if data is not None:
        data.fill_(index)


@pytest.fixture
def backend() -> Any:
    found = EmulatedBackend(FAST_LINK)
    yield found
    found.close()


def test_the_first_and_the_newest_blocks_have_copies(backend: EmulatedBackend) -> None:
    window = NearCopies(backend, "kv", 4, BYTES)
    for index in range(10):
        filled(window, index)
        there = {0, *range(max(1, index - 2), index + 1)}
        assert {idx for idx in range(12) if idx in window.copies} == there
        for idx in there:
            block = window.copies[idx]
            assert block.form == "kv"
            assert block.is_resident
            assert block.bytes.tolist() == [idx] * BYTES
    whole = window.whole
    assert whole is not None
    assert sorted(whole.view(4, BYTES)[:, 0].tolist()) == [0, 7, 8, 9]


def test_blocks_that_come_all_at_once_forget_those_before(backend: EmulatedBackend) -> None:
    window = NearCopies(backend, "kv", 4, BYTES)
    for index in range(4):
        filled(window, index)
    wanted = window.wanted(range(4, 40))
    assert wanted == [37, 38, 39]
    for index in wanted:
        filled(window, index)
    assert len(window) == 4
    assert 3 not in window.copies


def test_what_a_crop_takes_has_no_copy(backend: EmulatedBackend) -> None:
    window = NearCopies(backend, "kv", 4, BYTES)
    for index in range(8):
        filled(window, index)
    window.forget(6)
    assert [idx for idx in range(10) if idx in window.copies] == [0, 5]
    for index in (6, 7, 8):
        filled(window, index)
    assert [idx for idx in range(10) if idx in window.copies] == [0, 6, 7, 8]


def test_copies_move_to_a_window_of_another_size(backend: EmulatedBackend) -> None:
    generator = random.Random(0)
    for _ in range(20):
        before, after = generator.randint(1, 6), generator.randint(1, 6)
        window, other = NearCopies(backend, "kv", before, BYTES), NearCopies(backend, "kv", after, BYTES)
        for index in range(12):
            filled(window, index)
        window.move_to(other)
        there = [idx for idx in range(12) if idx in other.copies]
        assert there == [0, *range(12 - min(before, after) + 1, 12)]
        for idx in there:
            block = other.copies[idx]
            assert block.bytes.tolist() == [idx] * BYTES


def test_a_block_of_too_many_rows_has_no_copy(backend: EmulatedBackend) -> None:
    window = NearCopies(backend, "kv", 3, BYTES)
    assert window.take(0, Block("kv", 4, 2 * BYTES), 2 * BYTES) is None
    filled(window, 1)
    window.take(2, Block("kv", 1, BYTES // 2), BYTES // 2)
    assert window.whole is None  # something is missing between


# ---- what drafts see -------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama")


def drafted_session(
    model: PreTrainedModel, rows: int, tokens: int, *, plain_backend: bool = False, **options: Any
) -> Session:
    """With memory for two fifths of so many tokens; the backend that checks for races keeps what it has seen."""
    values: dict[str, Any] = {"block_tokens": 4, "chunk_blocks": 2, "slots": 2, "split": "transfer", **options}
    gib = window_gib(model, rows, tokens, 4, 0.4)
    config = OffloadConfig(speculate=4, device_gib=gib, link=FAST_LINK, profile=profile(), **values)
    return Session(model, config, EmulatedBackend(FAST_LINK) if plain_backend else checking_backend())


@pytest.mark.parametrize("new_tokens", [1, 3, 14])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("split", ["transfer", "recompute"])
def test_a_draft_attends_to_what_is_on_the_device(
    split: Any, padded: bool, new_tokens: int, model: PreTrainedModel
) -> None:
    """As plain attention does with a mask that hides the rest, also after the window has rolled on."""
    inputs = padded_prompt(2, 61) if padded else {"input_ids": prompt(2, 61)}
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    options = {**COMMON, "max_new_tokens": new_tokens + 1}
    with drafted_session(model, 2, 61 + new_tokens, split=split) as session, torch.no_grad():
        cache = session.new_cache()
        text = model.generate(inputs["input_ids"], attention_mask=mask, **given(cache), **options).sequences
        layer, cached = cache.core.layers[0], cache.get_seq_length()
        assert cached == text.shape[1] - 1
        seen = torch.zeros(cached + 1, dtype=torch.bool)
        for idx, block in enumerate(layer.nearest):
            seen[4 * idx : 4 * idx + 4] = block.is_resident
        seen[4 * len(layer.blocks) :] = True
        assert 8 < int(seen.sum()) < cached - 8
        assert seen[0]
        before = session.backend.link_use("h2d").copies
        more = torch.cat([mask, mask.new_ones(2, text.shape[1] - mask.shape[1])], 1)
        positions = (more.cumsum(-1) - 1).clamp(min=0)[:, -1:]
        cache.core.is_drafting = True
        found = model(text[:, -1:], attention_mask=more, position_ids=positions, **given(cache)).logits[:, -1]
        cache.core.is_drafting = False
        session.backend.synchronize()
        assert session.backend.link_use("h2d").copies - before <= 2 * 3  # what the ring had begun with
    plain = plain_cache(model)
    with torch.no_grad():
        all_positions = (more.cumsum(-1) - 1).clamp(min=0)
        model(text[:, :-1], attention_mask=more[:, :-1], position_ids=all_positions[:, :-1], **given(plain))
        allowed = (seen & more.bool())[:, None, None, :]
        wanted = model(text[:, -1:], attention_mask=allowed, position_ids=positions, **given(plain)).logits[:, -1]
    assert (found - wanted).abs().max() <= 1e-5


def test_a_copy_of_a_cache_has_no_window_and_the_same_tokens(model: PreTrainedModel) -> None:
    ids = prompt(2, 61)
    wanted = model.generate(ids, **COMMON).sequences
    with drafted_session(model, 2, 90) as session:
        cache = session.new_cache()
        model.generate(ids, **given(cache), **{**COMMON, "max_new_tokens": 2})
        copied = copy.deepcopy(cache)
        for one in (copied, cache, copied):
            one.crop(61 - 1 - one.get_seq_length())
            assert torch.equal(model.generate(ids, **given(one), **COMMON).sequences, wanted)


def test_copies_of_a_cache_stay_within_the_cap_together(model: PreTrainedModel) -> None:
    ids = prompt(2, 61)
    with drafted_session(model, 2, 160) as session:
        cap = session.config.device_gib
        assert isinstance(cap, float)
        cache = session.new_cache()
        model.generate(ids, **given(cache), **COMMON)
        assert cache.core.layers[0].window_places > 2
        more = torch.cat([ids, prompt(2, 40, seed=3)], 1)
        for _ in range(2):
            copied = copy.deepcopy(cache)
            copied.crop(61 - copied.get_seq_length())
            model.generate(more, **given(copied), **COMMON)
            held = sum(layer.device_bytes for one in (cache, copied) for layer in one.core.layers)
            tails = sum(layer.tail.device_bytes for layer in copied.core.layers if layer.tail is not None)
            assert held <= cap * GIB + tails
            copied.close()


def test_a_window_of_another_size_leaves_nothing_of_the_one_before(model: PreTrainedModel) -> None:
    with drafted_session(model, 2, 400, plain_backend=True) as session:
        cache = session.new_cache()
        text = model.generate(prompt(2, 61), **given(cache), **COMMON).sequences
        before = [reference(layer._near[0]._data) for layer in cache.core.layers if layer._near]
        assert len(before) == 3
        longer = torch.cat([text, prompt(2, 120, seed=4)], 1)
        session._offloaded._plans.prolong(cache, longer.shape[1], longer.shape[1] + 12, drafts=True)
        now = [layer._near[0]._data.numel() for layer in cache.core.layers if layer._near]
        assert now[0] > before[0][1], "the window did not grow"
        assert all(storage.expired() for storage, _ in before), "before any forward"
        found = model.generate(longer, **given(cache), **COMMON).sequences
    assert torch.equal(found, model.generate(longer, **COMMON).sequences)


def reference(data: torch.Tensor) -> tuple[StorageWeakRef, int]:
    """What tells whether the memory is still there, and its size."""
    return StorageWeakRef(data.untyped_storage()), data.numel()


def test_every_block_of_the_window_is_on_the_host_as_well(model: PreTrainedModel) -> None:
    with drafted_session(model, 2, 90) as session:
        cache = session.new_cache()
        model.generate(prompt(2, 61), **given(cache), **COMMON)
        for layer in cache.core.layers:
            assert not layer.count("device")
            assert sum(layer.count_read("device").values()) > 4
            assert len(layer.blocks) == sum(layer.count("host").values())
