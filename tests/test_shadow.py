"""Copies of few bits of all blocks on the host: drafts read these, a pass does not, and they follow what happens."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from drafting import window_gib
from matrix import FAST_LINK, checking_backend, profile
from models import WIDE, make_model
from modes import COMMON, given, padded_prompt, plain_cache, prompt
from quantizing import keys_through, values_through
from transformers import PreTrainedModel

from kvoffload import OffloadConfig
from kvoffload.cache.cache import CacheCore
from kvoffload.config import GIB
from kvoffload.draft.lengths import PlannedLength
from kvoffload.errors import HostMemoryError, InfeasiblePlanError
from kvoffload.session.session import Session

BLOCK = 4


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama", **WIDE)


def shadowed(model: PreTrainedModel, rows: int, tokens: int, share: float = 0.2, **options: Any) -> Session:
    """A session with memory for that share of so many tokens."""
    values: dict[str, Any] = {"block_tokens": BLOCK, "chunk_blocks": 2, "slots": 2, "split": "transfer", **options}
    values.setdefault("device_gib", window_gib(model, rows, tokens, BLOCK, share))
    values = {"speculate": 4, "draft_cache": "int4", "profile": profile(), **values}
    return Session(model, OffloadConfig(link=FAST_LINK, **values), checking_backend())


def check_drafts(model: PreTrainedModel, session: Session, cache: Any, text: torch.Tensor, mask: torch.Tensor) -> None:
    """A draft of the last token gives what plain attention gives to K and V whose copied blocks went through 4 bits."""
    cached = cache.get_seq_length()
    assert cached == text.shape[1] - 1
    more = torch.cat([mask, mask.new_ones(len(text), text.shape[1] - mask.shape[1])], 1)
    positions = (more.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        before = session.backend.link_use("h2d").copies
        cache.record_past(True)
        cache.core.is_drafting = True
        found = model(text[:, -1:], attention_mask=more, position_ids=positions[:, -1:], **given(cache)).logits[:, -1]
        cache.core.is_drafting = False
        cache.crop(-1)
        cache.record_past(False)
        session.backend.synchronize()
        assert session.backend.link_use("h2d").copies - before <= 2 * 3  # what the ring had begun with
        plain = plain_cache(model)
        model(text[:, :-1], attention_mask=more[:, :-1], position_ids=positions[:, :-1], **given(plain))
        for ours, theirs in zip(cache.layers, plain.layers, strict=True):
            layer, has_copy = ours.core, set()
            theirs.keys, theirs.values = ours.keys, ours.values  # to the last bit: it decides how a scale is rounded
            for near in layer._near:
                assert not has_copy & near.copies.keys()
                has_copy |= near.copies.keys()
            assert has_copy == set(range(len(layer.blocks))), "all of them have copies"
            for idx in range(len(layer.blocks)):
                if layer._near[-1].form == "int4" and idx in layer._near[-1].copies:
                    part = slice(BLOCK * idx, BLOCK * idx + BLOCK)
                    theirs.keys[:, :, part] = keys_through("int4", theirs.keys[:, :, part])
                    theirs.values[:, :, part] = values_through("int4", theirs.values[:, :, part])
        wanted = model(text[:, -1:], attention_mask=more, position_ids=positions[:, -1:], **given(plain)).logits[:, -1]
    assert (found - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("new_tokens", [1, 14])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("split", "share"), [("transfer", 0.0), ("transfer", 0.2), ("recompute", 0.5)])
def test_a_draft_attends_to_copies_of_all_blocks(
    split: Any, share: float, padded: bool, new_tokens: int, model: PreTrainedModel
) -> None:
    inputs = padded_prompt(2, 61) if padded else {"input_ids": prompt(2, 61)}
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    options = {**COMMON, "max_new_tokens": new_tokens + 1}
    wanted = model.generate(inputs["input_ids"], attention_mask=mask, **options).sequences
    with shadowed(model, 2, 61 + new_tokens, share, split=split) as session:
        cache = session.new_cache()
        text = model.generate(inputs["input_ids"], attention_mask=mask, **given(cache), **options).sequences
        assert session.stats is not None
        assert session.stats.draft_cache == "int4"
        assert torch.equal(text, wanted)
        check_drafts(model, session, cache, text, mask)


def test_a_pass_reads_no_copy(model: PreTrainedModel) -> None:
    with shadowed(model, 2, 80, 0.2) as session:
        cache = session.new_cache()
        model.generate(prompt(2, 61), **given(cache), **COMMON)
        for layer in cache.core.layers:
            assert {block.form for block in layer.nearest} == {"kv"}
            assert layer.count_read("host")["kv"] == len(layer.blocks) - layer.window_places
            assert len(layer._near) == 2


def test_copies_follow_crops_rows_deep_copies_and_turns(model: PreTrainedModel) -> None:
    ids = prompt(3, 61)
    with shadowed(model, 3, 140, 0.1) as session:
        cache = session.new_cache()
        text = model.generate(ids, **given(cache), **COMMON).sequences
        check_drafts(model, session, cache, text, torch.ones_like(text))
        cache.crop(-(cache.get_seq_length() - 42))  # in the middle of a block
        check_drafts(model, session, cache, text[:, :43], torch.ones_like(text[:, :43]))
        longer = torch.cat([text[:, :42], prompt(3, 37, seed=7)], 1)
        text = model.generate(longer, **given(cache), **COMMON).sequences
        check_drafts(model, session, cache, text, torch.ones_like(text))
        copied = copy.deepcopy(cache)
        rows = torch.tensor([2, 0, 2])
        cache.reorder_cache(rows)
        check_drafts(model, session, cache, text[rows], torch.ones_like(text))
        cache.close()
        more = torch.cat([text, prompt(3, 5, seed=8)], 1)  # it has no copies before it generates
        text = model.generate(more, **given(copied), **COMMON).sequences
        check_drafts(model, session, copied, text, torch.ones_like(text))
    assert torch.equal(text, model.generate(more, **COMMON).sequences)


def test_where_copies_do_not_fit_drafts_read_a_window(model: PreTrainedModel) -> None:
    gib = window_gib(model, 2, 90, BLOCK, -0.255)
    with shadowed(model, 2, 90, device_gib=gib) as session:
        with pytest.warns(UserWarning, match=r"4-bit K/V take .* are missing; drafts read a window"):
            text = model.generate(prompt(2, 61), **COMMON).sequences
        assert session.stats is not None
        assert session.stats.draft_cache == "window"
    assert torch.equal(text, model.generate(prompt(2, 61), **COMMON).sequences)


def test_heads_that_cannot_be_encoded_have_a_window() -> None:
    narrow = make_model("llama")
    with shadowed(narrow, 2, 90, 0.6) as session:
        with pytest.warns(UserWarning, match=r"heads of 12 values cannot be encoded .* drafts read a window"):
            narrow.generate(prompt(2, 61), **COMMON)
        assert session.stats is not None
        assert session.stats.draft_cache == "window"


@pytest.mark.parametrize("switches", [1, 2])
@pytest.mark.parametrize("split", ["transfer", "auto"])
def test_drafts_can_read_the_other_near_cache_from_one_round_to_the_next(
    split: Any, switches: int, monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    """Tokens, memory and copies are right after it, there and back."""
    asked: list[int] = []

    def wants_other(self: PlannedLength, left: int) -> bool:
        asked.append(left)
        return len(asked) in (2, 4)[:switches]

    monkeypatch.setattr(PlannedLength, "wants_other", wants_other)
    ids, options = prompt(2, 301), {**COMMON, "max_new_tokens": 60}
    wanted = model.generate(ids, **options).sequences
    gib = window_gib(model, 2, 360, BLOCK, 0.5)
    with shadowed(model, 2, 0, speculate="auto", draft_cache="auto", device_gib=gib, split=split) as session:
        cache = session.new_cache()
        text = model.generate(ids, **given(cache), **options).sequences
        assert torch.equal(text, wanted)
        assert session.stats is not None
        assert len(asked) > 4
        assert session.stats.draft_cache == ("int4" if switches == 1 else "window")  # it begins with a window
        peak = max(session.stats.device_kv_peak_prefill_bytes, session.stats.device_kv_peak_decode_bytes)
        assert peak <= gib * GIB
        if switches == 1:
            check_drafts(model, session, cache, text, torch.ones_like(text))


@pytest.mark.parametrize("rows", [2, 3])
def test_blocks_on_the_host_may_be_of_8_bits_and_their_copies_of_4(rows: int, model: PreTrainedModel) -> None:
    options = {**COMMON, "max_new_tokens": 40}
    gib = window_gib(model, rows, 110, BLOCK, 0.1)
    values: dict[str, Any] = {"kv_dtype": "int8", "device_gib": gib, "profile": profile(0.02), "block_tokens": 8}
    with shadowed(model, rows, 0, **values) as session:
        cache = session.new_cache()
        text = model.generate(prompt(rows, 61), **given(cache), **options).sequences
        stats = session.stats
        assert stats is not None
        assert stats.lossy_form == "int8"
        assert stats.draft_cache == "int4"
        assert stats.draft_survivals[0] > 0.6
        layer = cache.core.layers[0]
        assert set(layer.count("host")) == {"int8"}
        assert {near.form for near in layer._near} >= {"int4"}
    exact = model.generate(prompt(rows, 61), **options).sequences
    assert (text[:, :70] == exact[:, :70]).float().mean() > 0.95  # 8 bits, not noise


@pytest.mark.parametrize("kv_dtype", ["int4", "int2"])
def test_a_cache_of_few_bits_needs_no_copies(kv_dtype: Any, model: PreTrainedModel) -> None:
    with shadowed(model, 2, 90, 0.3, kv_dtype=kv_dtype, draft_cache="auto", block_tokens=8) as session:
        model.generate(prompt(2, 61), **COMMON)
        assert session.stats is not None
        assert session.stats.draft_cache == "window"
    with (
        shadowed(model, 2, 90, 0.3, kv_dtype=kv_dtype, block_tokens=8) as session,
        pytest.warns(UserWarning, match="the cache itself is stored as .*-bit K/V; drafts read a window"),
    ):
        model.generate(prompt(2, 61), **COMMON)


def test_copies_that_were_not_filled_are_not_read(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """An interrupt while stored blocks cross the link for their copies: the next turn makes them again."""
    ids = prompt(2, 61)
    with shadowed(model, 2, 160, 0.3) as session:
        cache = session.new_cache()
        text = model.generate(ids, **given(cache), **COMMON).sequences
        copied = copy.deepcopy(cache)
        cache.close()
        fetch, calls = session.engine.fetch, []

        def interrupted(cargo: Any) -> Any:
            calls.append(cargo)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return fetch(cargo)

        longer = torch.cat([text, prompt(2, 9, seed=3)], 1)
        with monkeypatch.context() as patch:
            patch.setattr(session.engine, "fetch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.generate(longer, **given(copied), **COMMON)
        assert not copied.core.layers[0]._near
        found = model.generate(longer, **given(copied), **COMMON).sequences
        check_drafts(model, session, copied, found, torch.ones_like(found))
    assert torch.equal(found, model.generate(longer, **COMMON).sequences)


def test_a_cap_near_what_copies_take_is_planned_or_told(model: PreTrainedModel) -> None:
    """Of blocks of any size: the copies fit, or drafts read a window; nothing else fails."""
    found = set()
    for share in torch.linspace(-0.15, 0.6, 41).tolist():
        gib = window_gib(model, 2, 400, BLOCK, share)
        options = {"block_tokens": "auto", "chunk_blocks": "auto", "slots": "auto", "device_gib": gib}
        with shadowed(model, 2, 0, **options) as session, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = session.new_cache()
            with contextlib.suppress(InfeasiblePlanError):
                session._offloaded._plans.lay_out_as_before(cache, 2, 1, 380, 420, drafts=True)
                found.add(session._offloaded._plans[cache].geometry.shadow_form)
    assert found == {"int4", None}


def test_a_near_cache_for_which_the_host_has_no_room_is_not_switched_to(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    monkeypatch.setattr(PlannedLength, "wants_other", lambda self, left: True)
    ids, options = prompt(2, 301), {**COMMON, "max_new_tokens": 40}
    wanted, make_room, calls = model.generate(ids, **options).sequences, CacheCore.make_room, list[int]()

    def failing(self: CacheCore) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise HostMemoryError("no room")
        make_room(self)

    gib = window_gib(model, 2, 360, BLOCK, 0.5)
    with shadowed(model, 2, 0, speculate="auto", draft_cache="auto", device_gib=gib):
        monkeypatch.setattr(CacheCore, "make_room", failing)
        assert torch.equal(model.generate(ids, **options).sequences, wanted)
        assert len(calls) == 2, "it was tried again"
