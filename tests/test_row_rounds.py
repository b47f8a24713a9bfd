"""Rows of a batch at their own pace: tokens and caches are those of plain decoding, and no row waits for nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from drafting import drafts_worse, session_of, window_gib
from matrix import FAST_LINK, checking_backend, profile
from models import WIDE, make_model
from modes import COMMON, given, padded_prompt, plain_cache, prompt
from test_packing import MACHINE
from transformers import LogitsProcessor, PreTrainedModel

from kvoffload import OffloadConfig
from kvoffload.cache.cache import CacheCore
from kvoffload.draft.row_rounds import RowRounds
from kvoffload.hf.offloaded_layer import OffloadedLayer
from kvoffload.planning.drafts import MOST_LEAD
from kvoffload.session.drafting import Drafting
from kvoffload.session.session import Session

NEW_TOKENS = 48
OPTIONS: dict[str, Any] = {**COMMON, "max_new_tokens": NEW_TOKENS}


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama", **WIDE)


def session_with(model: PreTrainedModel, cache: str, number: Any = 6, rows: int = 4, **options: Any) -> Session:
    values: dict[str, Any] = {"block_tokens": 4, "chunk_blocks": 2, "slots": 2, "split": "transfer", **options}
    values["device_gib"] = window_gib(model, rows, 120, 4, 0.25)
    values = {"profile": profile(), **values}
    config = OffloadConfig(speculate=number, draft_cache=cache, link=FAST_LINK, **values)  # type: ignore[arg-type]
    return Session(model, config, checking_backend())


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What rows were given of slots that they do not use, in each round."""
    found, keep = [], CacheCore.keep

    def noting(self: CacheCore, lengths: Any) -> None:
        keep(self, lengths)
        found.append(self.unused)

    monkeypatch.setattr(CacheCore, "keep", noting)
    return found


class Computed:
    """K and V as passes gave them last: by layer, row and position."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seen: list[dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in range(3)]
        update = OffloadedLayer.update

        def noting(layer: OffloadedLayer, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            core = layer.core.cache
            if not core.is_drafting:
                for row, slots in enumerate(core.unused or (0,) * keys.shape[0]):
                    for idx in range(keys.shape[2]):
                        place = (row, layer.core.num_tokens + idx - slots)
                        self._seen[layer.core.position][place] = (
                            keys[row, :, idx].clone(),
                            values[row, :, idx].clone(),
                        )
            return update(layer, keys, values, *args, **kwargs)

        monkeypatch.setattr(OffloadedLayer, "update", noting)

    def check(self, caches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Each is cached as it was, bit for bit."""
        for seen, (keys, values) in zip(self._seen, caches, strict=True):
            for row in range(keys.shape[0]):
                for place in range(keys.shape[2]):
                    assert torch.equal(keys[row, :, place], seen[row, place][0])
                    assert torch.equal(values[row, :, place], seen[row, place][1])


@pytest.mark.parametrize("quality", [0.85, 0.5])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", ["window", "int4"])
def test_what_is_cached_is_what_the_passes_computed_bit_for_bit(
    cache: Any,
    padded: bool,
    quality: float,
    unused: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    model: PreTrainedModel,
) -> None:
    """Whatever was moved in the tail; and it is what plain decoding caches."""
    inputs = padded_prompt(4, 61) if padded else {"input_ids": prompt(4, 61)}
    wanted, plain = model.generate(**inputs, **OPTIONS).sequences, plain_cache(model)
    model.generate(**inputs, **given(plain), **OPTIONS)
    computed = Computed(monkeypatch)
    with drafts_worse(monkeypatch, quality), session_with(model, cache) as session:
        mine = session.new_cache()
        assert torch.equal(model.generate(**inputs, **given(mine), **OPTIONS).sequences, wanted)
        assert any(unused), "all rows were as fast as each other"
        assert not mine.core.unused
        length = mine.get_seq_length()
        assert length == wanted.shape[1] - 1
        caches = [(layer.keys, layer.values) for layer in mine.layers]
    computed.check(caches)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    real = torch.cat([real, real.new_ones(4, length - real.shape[1])], 1)[:, None, :, None]
    for (keys, values), theirs in zip(caches, plain.layers, strict=True):
        assert ((keys - theirs.keys) * real).abs().max() <= 1e-5
        assert ((values - theirs.values) * real).abs().max() <= 1e-5


@pytest.mark.parametrize("rows", [1, 4])
def test_packed_blocks_with_coarse_copies_are_what_the_passes_computed(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = make_model("llama", **WIDE).to(torch.bfloat16)  # type: ignore[arg-type]
    computed, ids = Computed(monkeypatch), prompt(rows, 61)
    with session_with(packing, "int4", rows=rows, block_tokens=8, profile=MACHINE) as session:
        mine = session.new_cache()
        packing.generate(ids, **given(mine), **OPTIONS)
        stats = session.stats
        assert stats is not None
        assert stats.exact
        assert stats.packed_fraction > 0.5
        assert stats.draft_cache == "int4"
        assert stats.draft_survivals[0] > 0.5
        computed.check([(layer.keys, layer.values) for layer in mine.layers])


def test_rows_give_more_tokens_for_a_pass_than_in_lock_step(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    passes = []
    for can_go in (True, False):
        with monkeypatch.context() as patch, drafts_worse(monkeypatch, 0.8):
            if not can_go:
                patch.setattr("kvoffload.hf.OffloadedHFCache.can_go_by_rows", False)
            with session_of(model, 8, split="transfer") as session:
                model.generate(prompt(4, 61), **OPTIONS)
            assert session.stats is not None
            passes.append(session.stats.tokens_per_pass)
    assert passes[0] > 1.4 * passes[1], passes


def test_no_row_is_further_ahead_than_its_tail_has_room_for(
    unused: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    """One row has all of its drafts right and the others none, for as long as the answer is."""
    choose = RowRounds._choose

    def uneven(self: RowRounds, ids: Any, logits: torch.Tensor) -> torch.Tensor:
        token = choose(self, ids, logits)
        token[1:] = (token[1:] + 1) % logits.shape[-1]
        return token

    monkeypatch.setattr(RowRounds, "_choose", uneven)
    wanted = make_model("llama", **WIDE).generate(prompt(4, 61), **OPTIONS).sequences
    with session_of(model, 15, split="transfer") as session:
        cache = session.new_cache()
        model.generate(prompt(4, 61), **given(cache), **{**OPTIONS, "max_new_tokens": 2})
        tails = [layer.tail.device_bytes for layer in cache.core.layers if layer.tail is not None]
        cache.crop(61 - 1 - cache.get_seq_length())
        assert torch.equal(model.generate(prompt(4, 61), **given(cache), **OPTIONS).sequences, wanted)
        assert [layer.tail.device_bytes for layer in cache.core.layers if layer.tail is not None] == tails
    most = max(max(slots) for slots in unused if slots)
    assert MOST_LEAD - 4 <= most <= MOST_LEAD


class Changing(LogitsProcessor):
    """A user's processor that no draft follows: every fifth token of the second row is another one."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls.append(tuple(input_ids.shape))
        if input_ids.shape[1] % 5 == 0:
            scores = scores.clone()
            scores[1, scores[1].argmax()] = -torch.inf
        return scores


@pytest.mark.parametrize("number", [6, 15])
@pytest.mark.parametrize("cache", ["window", "int4"])
def test_a_token_that_was_not_expected_takes_back_what_its_row_held(
    cache: Any, number: int, unused: list[tuple[int, ...]], model: PreTrainedModel
) -> None:
    """The others stay no further ahead than their tails have room for."""
    ids, plain, ours = prompt(4, 61), Changing(), Changing()
    wanted = model.generate(ids, logits_processor=[plain], **{**OPTIONS, "output_scores": True})
    with session_with(model, cache, number) as session:
        found = model.generate(ids, logits_processor=[ours], **{**OPTIONS, "output_scores": True})
        assert session.stats is not None
        assert session.stats.tokens_per_pass is not None
        assert session.stats.tokens_per_pass > 1.2
    assert torch.equal(found.sequences, wanted.sequences)
    assert ours.calls == plain.calls
    assert max(max(slots) for slots in unused if slots) <= MOST_LEAD
    for mine, theirs in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_processors_of_the_configuration_are_followed_row_by_row(model: PreTrainedModel) -> None:
    """The token that is expected depends on all tokens of its row, also of those ahead of the others."""
    options = {**OPTIONS, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3}
    wanted = model.generate(prompt(4, 61), **options).sequences
    with session_of(model, 6, split="transfer") as session:
        found = model.generate(prompt(4, 61), **options).sequences
        assert session.stats is not None
        assert session.stats.draft_acceptance == 1.0
        assert session.stats.tokens_per_pass is not None
        assert session.stats.tokens_per_pass > 5
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("after", range(1, 40, 6))
def test_a_loop_that_stops_anywhere_leaves_what_plain_decoding_leaves(
    after: int, monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    """By an exception between two tokens; then rows change, the cache is copied, and another turn follows."""

    class Stop(Exception):
        pass

    def stopping(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] == 61 + after:
            raise Stop
        return torch.zeros(len(input_ids), dtype=torch.bool)

    ids, plain = prompt(4, 61), plain_cache(model)
    with pytest.raises(Stop):
        model.generate(ids, stopping_criteria=[stopping], **given(plain), **OPTIONS)
    text = model.generate(ids, **OPTIONS).sequences[:, : 61 + after]
    longer = torch.cat([text, prompt(4, 9, seed=3)], 1)
    rows = torch.tensor([3, 0, 0, 2])
    wanted = [model.generate(one, **OPTIONS).sequences for one in (longer, longer[rows])]
    with drafts_worse(monkeypatch, 0.7), session_with(model, "window") as session:
        cache = session.new_cache()
        with pytest.raises(Stop):
            model.generate(ids, stopping_criteria=[stopping], **given(cache), **OPTIONS)
        assert cache.get_seq_length() == plain.get_seq_length() == 61 + after - 1
        for mine, theirs in zip(cache.layers, plain.layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-5, rtol=0)
        copied = copy.deepcopy(cache)
        copied.reorder_cache(rows)
        assert torch.equal(model.generate(longer, **given(cache), **OPTIONS).sequences, wanted[0])
        assert torch.equal(model.generate(longer[rows], **given(copied), **OPTIONS).sequences, wanted[1])


def test_another_cache_may_be_used_between_two_tokens(model: PreTrainedModel) -> None:
    """By a criterion that runs the model itself; the engine's buffers are the other cache's then."""
    ids, other_ids = prompt(4, 61), prompt(2, 23, seed=5)
    wanted = model.generate(ids, **OPTIONS).sequences
    with session_with(model, "window") as session, torch.no_grad():
        other, mine = session.new_cache(), session.new_cache()

        def between(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if input_ids.shape[1] % 7 == 0:
                model(other_ids, **given(other))
            return torch.zeros(len(input_ids), dtype=torch.bool)

        found = model.generate(ids, stopping_criteria=[between], **given(mine), **OPTIONS).sequences
        assert other.get_seq_length() > 23
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("owner", "name"), [(Drafting, "_length"), (RowRounds, "_draft")])
def test_a_round_that_fails_inside_the_model_gives_all_memory_back(
    owner: type, name: str, unused: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    """While rows are ahead of each other: the cache is lost, the model is not."""
    ids, original, ahead = prompt(4, 61), getattr(owner, name), list[int]()
    text = model.generate(ids, **OPTIONS).sequences

    def interrupted(self: Any, *args: Any) -> Any:
        if self._cache.core.unused:
            ahead.append(1)
        if len(ahead) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    with drafts_worse(monkeypatch, 0.7), session_with(model, "window") as session:
        cache = session.new_cache()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.generate(ids, **given(cache), **OPTIONS)
        assert any(unused)
        assert cache.is_closed
        assert cache.get_seq_length() == 0
        assert session.pool.used_bytes == 0
        assert torch.equal(model.generate(ids, **OPTIONS).sequences, text)
