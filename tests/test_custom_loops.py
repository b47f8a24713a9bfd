"""Loops of one's own: rows that come, go and change places, crops between, caches used again, steps tried again, other
threads, and models called in other ways than `generate()` does."""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chats import Chat
from matrix import FAST_LINK, TOLERANCE, checking_backend, distance, profile
from models import make_model
from modes import COMMON, emptied, given, outcome, plain_cache, prompt
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from kvoffload import OffloadConfig, UnsupportedModelError
from kvoffload.config import GIB
from kvoffload.hf import given_cache
from kvoffload.session.session import Session

Play = Callable[[Callable[[], Any]], list[torch.Tensor]]
PATHS = ["auto", "whole_layer"]
SPLITS = ["transfer", "recompute", 0.5]


def config(split: Any, attention: Any, **options: Any) -> OffloadConfig:
    values = {"link": FAST_LINK, "profile": profile(), "device_gib": "min", "block_tokens": 4, "chunk_blocks": 1}
    return OffloadConfig(split=split, attention=attention, **{**values, "slots": 2, **options})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama")


def compare(model: PreTrainedModel, play: Play, split: Any, attention: Any, **options: Any) -> None:
    """Plays with a plain cache and with ours."""
    with torch.no_grad():
        wanted = play(lambda: plain_cache(model))
        with Session(model, config(split, attention, **options), checking_backend()) as session:
            found = play(session.new_cache)
            assert session.backend.link_use("h2d").copied_bytes > 0
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert (ours - theirs).abs().max().item() <= TOLERANCE, f"step {step}"


def reorder_and_crop(chat: Chat) -> None:
    chat.reorder(1, 0, 2)
    chat.crop(3)
    chat.go_on(9)
    chat.reorder(2, 0, 1)
    chat.crop(6)
    chat.go_on(9)


def rows_go_and_change_places(chat: Chat) -> None:
    chat.select(0, 2)
    chat.go_on(6)
    chat.reorder(1, 0)
    chat.go_on(6)
    chat.crop(7)
    chat.go_on(6)


def rows_are_repeated(chat: Chat) -> None:
    chat.repeat(2)
    chat.go_on(7)
    chat.reorder(5, 4, 3, 2, 1, 0)
    chat.go_on(3)
    chat.crop(9)
    chat.go_on(7)


@pytest.mark.parametrize("attention", PATHS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("change", [reorder_and_crop, rows_go_and_change_places, rows_are_repeated])
def test_padded_rows_come_go_and_change_places(
    change: Callable[[Chat], None], split: Any, attention: Any, model: PreTrainedModel
) -> None:
    """Positions of a token follow its row, also of tokens that a crop brings back from a block."""

    def play(new_cache: Callable[[], Any]) -> list[torch.Tensor]:
        chat = Chat(model, new_cache(), 3)
        chat.feed(is_padded=True)
        change(chat)
        return chat.logits

    compare(model, play, split, attention)


@pytest.mark.parametrize("attention", PATHS)
@pytest.mark.parametrize("split", ["transfer", "recompute"])
@pytest.mark.parametrize("crops", [False, True])
def test_room_for_resident_blocks_that_comes_back_is_not_used(
    crops: bool, split: Any, attention: Any, model: PreTrainedModel
) -> None:
    """Blocks went to the host while there were too many rows; what attention reads as resident are the first ones."""

    def play(new_cache: Callable[[], Any]) -> list[torch.Tensor]:
        cache = new_cache()
        logits = [model(prompt(2, 9), **given(cache)).logits[:, -1]]
        cache.batch_repeat_interleave(2)
        if crops:
            cache.crop(-3)
        logits.append(model(prompt(4, 8, seed=2), **given(cache)).logits[:, -1])
        cache.batch_select_indices(torch.tensor([0, 2]))
        logits += [model(prompt(2, 2, seed=3 + i), **given(cache)).logits[:, -1] for i in range(8)]
        return logits

    compare(model, play, split, attention, device_gib=(150_000 if attention == "auto" else 400_000) / GIB)


@pytest.mark.parametrize("attention", PATHS)
@pytest.mark.parametrize("split", ["transfer", "recompute"])
def test_resident_blocks_of_fewer_rows_behind_those_of_more(split: Any, attention: Any, model: PreTrainedModel) -> None:
    """They stand at equal distances, but what is between them is not theirs."""

    def play(new_cache: Callable[[], Any]) -> list[torch.Tensor]:
        cache = new_cache()
        logits = [model(prompt(3, 13), **given(cache)).logits[:, -1]]
        cache.batch_select_indices(torch.tensor([2]))
        logits += [model(prompt(1, 9, seed=i), **given(cache)).logits[:, -1] for i in range(20)]
        return logits

    device_gib = (150_000 if attention == "auto" else 400_000) / GIB
    compare(model, play, split, attention, device_gib=device_gib, chunk_blocks=3)


@pytest.mark.parametrize("attention", PATHS)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_cache_is_reset_and_used_with_other_rows(rows: int, attention: Any, model: PreTrainedModel) -> None:
    def play(new_cache: Callable[[], Any]) -> list[torch.Tensor]:
        cache, logits = new_cache(), []
        for batch in (2, rows):
            for tokens in (21, 1, 1):
                logits.append(model(prompt(batch, tokens), **given(cache)).logits[:, -1])
            cache = emptied(cache)
        return logits

    compare(model, play, 0.5, attention)


@pytest.mark.parametrize("attention", PATHS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_decoder_alone_with_a_mask_that_the_caller_writes_over(
    split: Any, attention: Any, model: PreTrainedModel
) -> None:
    """No forward of the whole model tells that a new step begins."""
    decoder: Any = model.model

    def play(new_cache: Callable[[], Any]) -> list[torch.Tensor]:
        cache, mask = new_cache(), torch.ones(2, 1, 1, 22, dtype=torch.bool)
        logits = [decoder(prompt(2, 21), **given(cache)).last_hidden_state[:, -1]]
        for step in range(6):
            mask = torch.cat([mask, torch.ones(2, 1, 1, 1, dtype=torch.bool)], 3) if step else mask
            mask[:, :, :, step] = False
            out = decoder(prompt(2, 1, seed=step), attention_mask=mask, **given(cache))
            logits.append(out.last_hidden_state[:, -1])
        return logits

    compare(model, play, split, attention)


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", PATHS)
@pytest.mark.parametrize("split", ["transfer", "recompute"])
@pytest.mark.parametrize("at", [1, 6, 17])
def test_a_copy_that_fails_does_not_take_the_session_with_it(
    at: int, split: Any, attention: Any, model: PreTrainedModel
) -> None:
    wanted = outcome([model.generate(prompt(2), **COMMON)])
    with Session(model, config(split, attention), checking_backend()) as session:
        copy, count = session.backend.copy_to_device, 0

        def fail_once(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise RuntimeError("the link is down")
            return copy(*args)

        session.backend.copy_to_device = fail_once  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="the link is down"):
            model.generate(prompt(2), **COMMON)
        assert "stages" not in session.engine.account.held_bytes
        for _ in range(2):
            assert distance(outcome([model.generate(prompt(2), **COMMON)]), wanted) <= TOLERANCE


@pytest.mark.parametrize("attention", PATHS)
def test_a_step_that_failed_in_its_first_layer_can_be_tried_again(
    attention: Any, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvoffload.store.forms import activation

    with torch.no_grad():
        plain = plain_cache(model)
        model(prompt(2), **given(plain))
        wanted = model(prompt(2, 1), **given(plain)).logits
        with Session(model, config("recompute", attention), checking_backend()) as session:
            cache = session.new_cache()
            model(prompt(2), **given(cache))
            with monkeypatch.context() as patch:

                def out_of_memory(*args: Any) -> None:
                    raise torch.OutOfMemoryError("simulated")

                patch.setattr(activation.Stored, "restore", out_of_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    model(prompt(2, 1), **given(cache))
            assert (model(prompt(2, 9)).logits - model(prompt(2, 9)).logits).abs().max() == 0  # without our cache
            found = model(prompt(2, 1), **given(cache)).logits
            assert (found - wanted).abs().max().item() <= TOLERANCE
            for step in range(9):  # the failed try left no position behind: later blocks are rotated by their own
                ids = prompt(2, 1, seed=step)
                error = model(ids, **given(cache)).logits - model(ids, **given(plain)).logits
                assert error.abs().max().item() <= TOLERANCE, f"step {step}"


def test_buffers_that_could_not_be_made_are_made_for_the_next_cache(model: PreTrainedModel) -> None:
    with torch.no_grad(), Session(model, config("transfer", "auto"), checking_backend()) as session:
        first, plain = session.new_cache(), plain_cache(model)
        for cache in (first, plain):
            model(prompt(2), **given(cache))
        allocate = session.backend.allocate_device

        def fail(num_bytes: int) -> Any:
            raise torch.OutOfMemoryError("simulated")

        session.backend.allocate_device = fail  # type: ignore[method-assign]
        with pytest.raises(torch.OutOfMemoryError):
            model(prompt(5, 60), **given(session.new_cache()))
        session.backend.allocate_device = allocate  # type: ignore[method-assign]
        wanted = model(prompt(2, 1), **given(plain)).logits
        assert (model(prompt(2, 1), **given(first)).logits - wanted).abs().max().item() <= TOLERANCE


# ---- other callers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", PATHS)
def test_another_thread_runs_the_model_without_a_cache_meanwhile(attention: Any, model: PreTrainedModel) -> None:
    wanted = outcome([model.generate(prompt(2), **COMMON)])
    errors: list[BaseException] = []
    over = threading.Event()

    def meanwhile() -> None:
        with torch.no_grad():
            while not over.is_set():
                try:
                    model(prompt(1, 9, seed=5))
                except BaseException as error:
                    errors.append(error)

    with Session(model, config(0.5, attention), checking_backend()):
        thread = threading.Thread(target=meanwhile)
        thread.start()
        try:
            found = [outcome([model.generate(prompt(2), **COMMON)]) for _ in range(3)]
        finally:
            over.set()
            thread.join()
    assert not errors
    for one in found:
        assert distance(one, wanted) <= TOLERANCE


def attends_twice(self: Any, hidden_states: torch.Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
    """Differential attention of a kind: two maps over the same K and V."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
    q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
    if (cache := given_cache((), kwargs)) is not None:
        k, v = cache.update(k, v, self.layer_idx)
    attend = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, modeling_llama.eager_attention_forward
    )
    mask = kwargs.get("attention_mask")
    one, other = (attend(self, q, k, v, mask, scaling=self.scaling * factor)[0] for factor in (1.0, 0.5))
    return self.o_proj((one - 0.3 * other).flatten(2)), None


def test_a_module_that_attends_twice_gets_whole_layers() -> None:
    twice = make_model("llama")
    for layer in twice.model.layers:
        layer.self_attn.forward = types.MethodType(attends_twice, layer.self_attn)
    wanted = outcome([twice.generate(prompt(2), **COMMON)])
    with Session(twice, config("transfer", "auto"), checking_backend()) as session:
        with pytest.warns(UserWarning, match="whole layers are put together"):
            found = outcome([twice.generate(prompt(2), **COMMON)])
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            cache = session.new_cache()
            for layer in twice.model.layers:
                del layer.self_attn.forward
            twice(prompt(2), **given(cache))
            twice.model.layers[0].self_attn.forward = types.MethodType(attends_twice, twice.model.layers[0].self_attn)
            with pytest.raises(UnsupportedModelError, match="attends twice in one forward"):
                twice(prompt(2, 1), **given(cache))
    assert distance(found, wanted) <= TOLERANCE


# ---- memory and figures ----------------------------------------------------------------------------------------------


def test_what_a_prefill_is_staged_in_goes_when_decoding_begins(model: PreTrainedModel) -> None:
    with torch.no_grad(), Session(model, config("transfer", "auto"), checking_backend()) as session:
        cache = session.new_cache()
        model(prompt(2, 60), **given(cache))
        assert session.engine.account.held_bytes["stages"] > 0
        model(prompt(2, 1), **given(cache))
        assert "stages" not in session.engine.account.held_bytes
        model.generate(prompt(2, 60), **{**COMMON, "max_new_tokens": 1})
        assert "stages" not in session.engine.account.held_bytes
        assert session.stats is not None
        assert session.stats.device_kv_peak_prefill_bytes > session.stats.device_kv_peak_decode_bytes > 0
        first = session.stats.device_kv_peak_prefill_bytes
        model.generate(prompt(2, 20), **COMMON)
        assert session.stats.device_kv_peak_prefill_bytes < first


def test_bytes_written_back_are_counted_with_the_run_that_wrote_them(model: PreTrainedModel) -> None:
    """Also those that are still on their way when it returns."""
    from kvoffload import EmulatedLink
    from kvoffload.backend import EmulatedBackend

    link = EmulatedLink(h2d_gb_per_s=2.0, d2h_gb_per_s=0.0005)
    with Session(model, config("transfer", "auto"), EmulatedBackend(link)) as session:
        written = []
        for _ in range(3):
            model.generate(prompt(2, 36), **{**COMMON, "max_new_tokens": 1})
            assert session.stats is not None
            written.append(session.stats.d2h_bytes)
    assert written == [9 * 4 * 2 * 3 * 2 * 2 * 12 * 4] * 3  # blocks, tokens, rows, layers, K and V, heads, dim, float32


@pytest.mark.parametrize("attention", PATHS)
@pytest.mark.parametrize("split", [*SPLITS, "auto"])
@pytest.mark.parametrize("heads", [(1, 4, 2), (4, 1, 2), (2, 4, 4)])
def test_layers_with_other_numbers_of_heads_than_the_first(heads: tuple[int, ...], split: Any, attention: Any) -> None:
    """Buffers are made for the first layer's K and V."""
    model: Any = make_model("llama", num_key_value_heads=4)
    for layer, count in zip(model.model.layers, heads, strict=True):
        layer.self_attn.num_key_value_groups = 4 // count
        for name in ("k_proj", "v_proj"):
            setattr(layer.self_attn, name, torch.nn.Linear(48, 12 * count, bias=False))

    def play(new_cache: Callable[[], Any]) -> list[torch.Tensor]:
        cache = new_cache()
        logits = [model(prompt(2, 41), **given(cache)).logits[:, -1]]
        return logits + [model(prompt(2, 1, seed=i), **given(cache)).logits[:, -1] for i in range(9)]

    compare(model, play, split, attention)
