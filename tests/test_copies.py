"""Copies of a cache (`copy.deepcopy`, as people reuse a prefix) share what is stored, and each goes on by itself."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from chats import Chat
from matrix import FAST_LINK, TOLERANCE, profile
from modes import COMMON, given, plain_cache, prompt
from test_carried import ALWAYS
from test_reported import tiny
from transformers import PreTrainedModel

import kvoffload
from kvoffload import KVOffloadError, OffloadConfig
from kvoffload.backend import CheckingBackend, EmulatedBackend
from kvoffload.config import GIB
from kvoffload.session import generation_planner
from kvoffload.session.session import Session

BLOCKS: dict[str, Any] = {"block_tokens": 4, "chunk_blocks": 2, "link": FAST_LINK}
WAYS = {
    "transfer": OffloadConfig(split="transfer", device_gib="min", **BLOCKS),
    "half": OffloadConfig(split=0.5, device_gib="min", **BLOCKS),
    "resident": OffloadConfig(split="transfer", device_gib=200_000 / GIB, **BLOCKS),
    "planned": OffloadConfig(split="auto", device_gib="min", profile=profile(), **BLOCKS),
    "whole layers": OffloadConfig(split=0.5, device_gib="min", attention="whole_layer", **BLOCKS),
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16},
}


@pytest.fixture(scope="module", name="model")
def model_fixture() -> PreTrainedModel:
    return tiny("llama")


class Pair:
    """One talk with a plain cache and with ours."""

    def __init__(self, model: PreTrainedModel, plain: Any, ours: Any, rows: int) -> None:
        self.chats = (Chat(model, plain, rows), Chat(model, ours, rows))

    def do(self, what: Callable[[Chat], None]) -> None:
        for chat in self.chats:
            what(chat)

    def copied(self) -> Pair:
        plain, ours = (copy.deepcopy(chat.cache) for chat in self.chats)
        other = Pair(self.chats[0].model, plain, ours, 1)
        for chat, before in zip(other.chats, self.chats, strict=True):
            chat.mask = before.mask.clone()
        return other

    @property
    def error(self) -> float:
        """Of all logits so far."""
        plain, ours = (torch.cat(chat.logits) for chat in self.chats)
        return (plain - ours).abs().max().item()

    @property
    def tokens(self) -> int:
        return self.chats[0].mask.shape[1]


def walk(pairs: list[Pair], draw: random.Random, steps: int, *, is_padded: bool, crops: bool) -> None:
    """Whatever one does with caches, in any order; copies of copies, some of which are closed again."""
    for step in range(steps):
        pair = draw.choice(pairs)
        rows = pair.chats[0].mask.shape[0]
        doing = draw.random()
        if doing < 0.2 and len(pairs) < 5:
            pairs.append(pair.copied())
        elif doing < 0.28 and len(pairs) > 1:
            pairs.remove(pair)
            pair.chats[1].cache.close()
        elif doing < 0.43 and crops:
            removed = draw.randint(1, min(11, pair.tokens - 1))
            pair.do(lambda chat, by=removed: chat.crop(by))
            pair.do(lambda chat, step=step: chat.feed(1, seed=step))
        elif doing < 0.5 and rows < 5:
            pair.do(lambda chat: chat.repeat(2))
        elif doing < 0.58:
            order = [draw.randrange(rows) for _ in range(draw.randint(1, rows))]
            pair.do(lambda chat, order=order: chat.select(*order))
        elif doing < 0.7:
            tokens = draw.randint(2, 13)
            pair.do(lambda chat, n=tokens, step=step: chat.feed(n, is_padded=is_padded, seed=step))
        else:
            tokens = draw.randint(1, 6)
            pair.do(lambda chat, n=tokens: chat.go_on(n))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_on_as_those_of_a_plain_cache_do(kind: str, way: str, is_padded: bool, seed: int) -> None:
    """On a backend that knows the order of events alone: nobody writes where another copy may still read."""
    model = tiny(kind, **KINDS[kind])
    config = WAYS[way]
    if (kind, way) == ("gemma3_text", "resident"):  # beside layers that are not offloaded
        config = replace(config, device_gib=1_900_000 / GIB)
    with Session(model, config, CheckingBackend(EmulatedBackend(FAST_LINK))) as session, torch.no_grad():
        first = Pair(model, plain_cache(model), session.new_cache(), 2)
        pairs = [first]
        first.do(lambda chat: chat.feed(19, is_padded=is_padded))
        pairs.append(first.copied())
        seen = list(pairs)
        blocks = pairs[1].chats[1].cache.core.layers[0].blocks
        assert any(block.is_resident for block in blocks) == (way == "resident")
        assert {block.form for block in blocks} >= {"half": {"kv", "activation"}}.get(way, set())
        # a sliding window that has closed cannot be cropped, by transformers either
        walk(pairs, random.Random(seed), 40, is_padded=is_padded, crops=kind == "llama")
        for pair in {*seen, *pairs}:
            if pair.chats[0].logits:
                assert pair.error <= TOLERANCE
        for pair in pairs:
            pair.chats[1].cache.close()
        assert session.pool.used_bytes == 0
        assert not any(name.startswith("cache") for name in session.engine.account.held_bytes)


@pytest.mark.parametrize("removed", [13, 16])  # in the middle of a block, and between two
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_what_one_of_them_removes_and_writes_anew_the_other_still_has(
    way: str, who: int, removed: int, model: PreTrainedModel
) -> None:
    with Session(model, WAYS[way], CheckingBackend(EmulatedBackend(FAST_LINK))) as session, torch.no_grad():
        first = Pair(model, plain_cache(model), session.new_cache(), 2)
        first.do(lambda chat: chat.feed(40))
        pairs = [first, first.copied()]
        pairs[who].do(lambda chat: chat.crop(removed))
        pairs[who].do(lambda chat: chat.feed(17, seed=5))
        for pair in (pairs[1 - who], pairs[who]):
            pair.do(lambda chat: chat.go_on(3))
        pairs[who].chats[1].cache.close()
        pairs[1 - who].do(lambda chat: chat.crop(removed))  # nobody else has these any more
        pairs[1 - who].do(lambda chat: chat.feed(17, seed=6))
        pairs[1 - who].do(lambda chat: chat.go_on(3))
        assert max(pair.error for pair in pairs) <= TOLERANCE


def test_room_that_was_made_for_a_cache_stays_with_it(model: PreTrainedModel) -> None:
    used: list[int] = []
    copies: list[Any] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        used.append(session.pool.used_bytes)
        if len(used) == 6:  # in the middle of the turn
            copies.append(copy.deepcopy(cache))

    with kvoffload.offload(model, WAYS["transfer"]) as session, torch.no_grad():
        cache = session.new_cache()
        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            model.generate(prompt(2, 40), **given(cache), **{**COMMON, "max_new_tokens": 30})
        finally:
            handle.remove()
        assert copies
        assert len(set(used[1:])) == 1


@pytest.mark.parametrize("way", ["half", "resident"])
def test_copies_of_blocks_that_carry_their_positions(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_planner, "POSITION_SHARE", ALWAYS)
    test_copies_go_on_as_those_of_a_plain_cache_do("llama", way, is_padded=False, seed=1)


@pytest.mark.parametrize("way", WAYS)
def test_ten_copies_take_hardly_more_host_memory_than_one_and_each_continues_exactly(
    way: str, model: PreTrainedModel
) -> None:
    ids, more = prompt(2, 120), prompt(2, 7, seed=3)
    whole = torch.cat([ids, more], 1)
    with torch.no_grad():
        wanted = model.generate(whole, attention_mask=torch.ones_like(whole), **COMMON).sequences
    with Session(model, WAYS[way], CheckingBackend(EmulatedBackend(FAST_LINK))) as session, torch.no_grad():
        cache = session.new_cache()
        model(ids, **given(cache))
        before, device = session.pool.used_bytes, sum(session.engine.account.held_bytes.values())
        copies = [copy.deepcopy(cache) for _ in range(10)]
        assert session.pool.used_bytes < 1.1 * before
        cache.close()
        copies.pop().close()
        tails = sum(layer.tail.device_bytes for layer in copies[0].core.layers) * 10
        assert sum(session.engine.account.held_bytes.values()) <= device + tails
        for copied in copies:
            found = model.generate(whole, attention_mask=torch.ones_like(whole), **given(copied), **COMMON).sequences
            assert torch.equal(found, wanted)
            copied.close()
        assert session.pool.used_bytes == 0


def test_a_prompt_that_is_cached_to_its_end_is_continued(model: PreTrainedModel) -> None:
    """transformers itself caches all of it once more then (seen up to 5.24)."""
    for rows, tokens in ((2, 19), (1, 1), (3, 16)):
        ids = prompt(rows, tokens)
        wanted = model.generate(ids, **COMMON).sequences
        with kvoffload.offload(model, WAYS["half"]) as session, torch.no_grad():
            cache = session.new_cache()
            model(ids, **given(cache))
            assert torch.equal(model.generate(ids, **given(cache), **COMMON).sequences, wanted)


# ---- what cannot be copied -------------------------------------------------------------------------------------------


def test_a_cache_in_the_middle_of_a_forward_is_not_copied(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, WAYS["half"]) as session, torch.no_grad():
        cache = session.new_cache()
        model(prompt(1, 9), **given(cache))

        def copy_it(*args: Any) -> None:
            copy.deepcopy(cache)

        inner: Any = model
        for module in (inner.model.layers[1].self_attn, inner.model.layers[1].mlp):
            handle = module.register_forward_hook(copy_it)
            with pytest.raises(KVOffloadError, match="in the middle of a forward"):
                model(prompt(1, 1), **given(cache))
            handle.remove()
            cache = session.new_cache()
            model(prompt(1, 9), **given(cache))


def test_a_closed_cache_and_one_of_a_closed_session_are_not_copied(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, WAYS["half"]) as session, torch.no_grad():
        closed, left = session.new_cache(), session.new_cache()
        model(prompt(1, 9), **given(left))
        closed.close()
        with pytest.raises(KVOffloadError, match="take a new_cache"):
            copy.deepcopy(closed)
    with pytest.raises(KVOffloadError, match="take a new_cache"):
        copy.deepcopy(left)


def test_a_copy_belongs_to_the_session_of_the_cache(model: PreTrainedModel) -> None:
    other = tiny("llama")
    with kvoffload.offload(model, WAYS["half"]) as session, kvoffload.offload(other, WAYS["half"]):
        with torch.no_grad():
            cache = session.new_cache()
            model(prompt(1, 9), **given(cache))
        copied = copy.deepcopy(cache)
        with pytest.raises(kvoffload.ConfigError, match="does not belong to this session"):
            other.generate(prompt(1, 12), **given(copied), **COMMON)


def test_an_empty_cache_is_copied(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, WAYS["half"]) as session, torch.no_grad():
        copied = copy.deepcopy(session.new_cache())
        ids = prompt(1, 12)
        assert torch.equal(model(ids, **given(copied)).logits.argmax(-1), model(ids).logits.argmax(-1))


# ---- memory ----------------------------------------------------------------------------------------------------------


def held(session: Session) -> int:
    """Device memory that the session accounts for."""
    return sum(session.engine.account.held_bytes.values())


def test_copies_that_go_on_by_themselves_take_what_they_add(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, WAYS["transfer"]) as session, torch.no_grad():
        cache = session.new_cache()
        model(prompt(2, 400), **given(cache))
        before = session.pool.used_bytes
        copies = [copy.deepcopy(cache) for _ in range(10)]
        for idx, copied in enumerate(copies):
            model(prompt(2, 5, seed=idx), **given(copied))
        block_bytes = before // 100
        assert session.pool.used_bytes <= before + 10 * 4 * block_bytes


@pytest.mark.parametrize("are_copies", [True, False])
def test_the_cap_on_the_device_holds_for_all_caches_together(are_copies: bool, model: PreTrainedModel) -> None:
    cap, ids = 400_000, prompt(2, 41)
    texts = [torch.cat([ids, prompt(2, 90, seed=idx)], 1) for idx in range(4)]
    wanted = [model.generate(text, **COMMON).sequences for text in texts]
    options = replace(WAYS["resident"], device_gib=cap / GIB, speculate="off")
    with kvoffload.offload(model, options) as session, torch.no_grad():
        cache = session.new_cache()
        model.generate(ids, **given(cache), **COMMON)
        caches = [copy.deepcopy(cache) for _ in range(4)] if are_copies else [session.new_cache() for _ in range(4)]
        for one, text, answer in zip(caches, texts, wanted, strict=True):
            one.crop(min(0, 41 - one.get_seq_length()))
            assert torch.equal(model.generate(text, **given(one), **COMMON).sequences, answer)
            # A further cache gets no less than works: its tails, where the first ones have taken all there was.
            tails = sum(layer.tail.device_bytes for layer in one.core.layers)
            spare = 0 if are_copies else tails * (1 + caches.index(one))
            assert held(session) <= cap + spare
            assert session.stats is not None
            assert session.stats.device_kv_peak_decode_bytes <= cap + spare


def test_what_copies_share_on_the_device_counts_until_the_last_is_closed(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, WAYS["resident"]) as session, torch.no_grad():
        cache = session.new_cache()
        model(prompt(2, 120), **given(cache))
        alone = held(session)
        copied = copy.deepcopy(cache)
        tails = sum(layer.tail.device_bytes for layer in copied.core.layers)
        assert held(session) == alone + tails
        cache.close()
        assert held(session) == alone
        copied.close()
        assert held(session) < alone - tails


def test_a_copy_for_which_there_is_no_memory_leaves_nothing(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvoffload.offload(model, WAYS["half"]) as session, torch.no_grad():
        cache = session.new_cache()
        model(prompt(2, 60), **given(cache))
        before, calls = held(session), []
        allocate = session.backend.allocate_device

        def out_of_memory(num_bytes: int) -> torch.Tensor:
            calls.append(num_bytes)
            if len(calls) == 5:
                raise torch.OutOfMemoryError("simulated")
            return allocate(num_bytes)

        monkeypatch.setattr(session.backend, "allocate_device", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            copy.deepcopy(cache)
        monkeypatch.undo()
        assert held(session) == before
        assert model(prompt(2, 1), **given(cache)).logits.isfinite().all()
        cache.close()
        assert session.pool.used_bytes == 0


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_turn_after_rows_were_repeated_has_buffers_for_all_of_them(way: str, model: PreTrainedModel) -> None:
    def talk(cache: Any) -> torch.Tensor:
        text = model.generate(prompt(1, 41), **given(cache), **COMMON).sequences
        cache.batch_repeat_interleave(2)
        text = torch.cat([text.repeat_interleave(2, 0), prompt(2, 3, seed=4)], 1)
        answer: torch.Tensor = model.generate(text, **given(cache), **COMMON).sequences
        return answer

    with torch.no_grad():
        wanted = talk(plain_cache(model))
        with Session(model, WAYS[way], CheckingBackend(EmulatedBackend(FAST_LINK))) as session:
            assert torch.equal(talk(session.new_cache()), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_one_prompt_that_part_after_a_crop_are_stored_apart(way: str, model: PreTrainedModel) -> None:
    """Returned by beams, whose prompt is stored once."""
    with Session(model, WAYS[way], CheckingBackend(EmulatedBackend(FAST_LINK))), torch.no_grad():
        for is_selected in (False, True):
            given_back = model.generate(prompt(2, 41), num_beams=3, **{**COMMON, "output_logits": False})
            ours = getattr(given_back, "cache", None) or given_back.past_key_values
            plain = plain_cache(model)
            model(prompt(2, 41).repeat_interleave(3, 0), **given(plain))
            pair = Pair(model, plain, ours, 6)
            ours.crop(41 - ours.get_seq_length())
            for chat in pair.chats:
                chat.mask = torch.ones(6, 41, dtype=torch.long)
            if is_selected:
                pair.do(lambda chat: chat.select(0, 3))
            pair.do(lambda chat: chat.crop(14))
            for step in range(12):  # the first token differs by row, those behind are alike
                tokens = prompt(6, 1, seed=step) if step == 0 else prompt(1, 1, seed=step).expand(6, 1)
                for chat in pair.chats:
                    rows = chat.mask.shape[0]
                    chat.mask = torch.cat([chat.mask, torch.ones(rows, 1, dtype=torch.long)], 1)
                    out = model(tokens[:rows], attention_mask=chat.mask, **given(chat.cache))
                    chat.logits.append(out.logits[:, -1])
            assert pair.error <= TOLERANCE
            ours.close()


def test_a_turn_that_is_refused_leaves_the_cache_as_it_was(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, replace(WAYS["transfer"], host_gib=0.002)) as session, torch.no_grad():
        cache, ids = session.new_cache(), prompt(2, 40)
        model(ids, **given(cache))
        with pytest.raises(kvoffload.KVOffloadError, match="host memory"):
            model.generate(ids, **given(cache), **{**COMMON, "max_new_tokens": 100_000})
        assert cache.get_seq_length() == 40
