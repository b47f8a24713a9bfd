"""What we rely on of transformers, and what it relies on of a cache: the same over the whole range of releases.

`scripts/test --oldest` and `--latest` run these with the oldest release of the range and with the registry's newest.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from matrix import FAST_LINK, checking_backend, profile
from models import make_model
from modes import given, plain_cache, prompt
from packaging.version import Version
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM

import kvoffload
from kvoffload import OffloadConfig, UnsupportedModelError
from kvoffload.hf import contract
from kvoffload.hf.arguments import generation_name, given_cache, name_of_cache
from kvoffload.hf.contract import PROMISES, Promise, check_release
from kvoffload.session.generate_calls import GenerateCalls
from kvoffload.session.session import Session


@pytest.mark.parametrize("promise", PROMISES, ids=[promise.name for promise in PROMISES])
def test_the_installed_release_keeps_a_promise(promise: Promise) -> None:
    assert promise.holds()


def test_a_release_of_the_tested_range_goes_without_a_word() -> None:
    for version in ("5.17.0", "5.20.2", "5.24.0", "5.24.7"):
        check_release(version)


@pytest.mark.parametrize("version", ["5.25.0", "6.0.0", "5.16.1", "5.25.0.dev0"])
def test_a_release_that_was_not_tested_but_keeps_the_promises_works_with_one_warning(version: str) -> None:
    with pytest.warns(UserWarning, match=f"tested with transformers 5.17 to 5.24, and this is {version}") as seen:
        check_release(version)
    assert len(seen) == 1


# What a release may move, and the word of the promise that it breaks.
MOVED: dict[str, tuple[str, Any, str, Any]] = {
    "_prepare_cache_for_generation": (
        *("_prepare_cache_for_generation", GenerationMixin, "_prepare_cache_for_generation"),
        lambda self, generation_config, model_kwargs: None,
    ),
    "the cache of generate": (
        *("prepare_inputs_for_generation", GenerationMixin, "prepare_inputs_for_generation"),
        lambda self, input_ids, memory: None,
    ),
    "the cache of attention": (
        *("attention modules", LlamaAttention, "forward"),
        lambda self, hidden_states, position_embeddings, memory: None,
    ),
    "a new method of layers": ("methods of DynamicLayer", DynamicLayer, "compact", lambda self: None),
    "an argument of update": (
        *("arguments of update", DynamicLayer, "update"),
        lambda self, key_states, value_states, positions: None,
    ),
    "get_decoder": ("get_decoder", PreTrainedModel, "get_decoder", None),
}


@pytest.mark.parametrize("moved", MOVED)
def test_a_release_that_moved_something_is_refused_and_says_what(moved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    word, owner, name, value = MOVED[moved]
    if value is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, value, raising=False)
    with pytest.raises(UnsupportedModelError, match=r"6\.0\.0 moved what .*5\.17 to 5\.24.*<5\.25") as error:
        check_release("6.0.0")
    assert word in str(error.value)


def test_offload_checks_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "TESTED", (Version("5.0"), Version("5.1")))
    with pytest.warns(UserWarning, match="what it relies on is still there"):
        kvoffload.offload(make_model("llama")).close()


def test_the_session_prepares_caches_with_the_arguments_of_transformers() -> None:
    assert tuple(inspect.signature(GenerateCalls.prepare_cache).parameters) == contract.PREPARE_CACHE


# ---- names of the cache ----------------------------------------------------------------------------------------------


def test_a_cache_is_found_under_any_of_its_names_by_name_or_position() -> None:
    assert [given_cache((), {name: 1}) for name in ("cache", "past_key_values", "layer_past")] == [1, 1, 1]
    assert given_cache((0, 5), {}, ("x", "layer_past")) == 5
    assert given_cache((0,), {"cache": None, "past_key_values": 7}, ("x", "cache")) == 7
    assert given_cache((0, 5), {}, ("x", "mask")) is None


def test_a_method_says_by_which_name_it_takes_its_cache() -> None:
    assert name_of_cache(lambda hidden_states, layer_past: None) == "layer_past"
    assert name_of_cache(lambda hidden_states, **kwargs: None) is None
    assert name_of_cache(LlamaForCausalLM.forward) == generation_name()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_spellings_serve_where_the_release_takes_them(name: str) -> None:
    """generate(), a model and its decoder; a release without a spelling refuses it itself, with or without us."""
    model, tokens = make_model("llama"), prompt(2)
    takes_it = name == generation_name() or generation_name() == "cache"
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # transformers on its older spelling
        if not takes_it:
            with pytest.raises(ValueError, match=name):
                model.generate(tokens, **{name: plain_cache(model)}, **options)
            return
        wanted = model.generate(tokens, **options)
        config = OffloadConfig(split=0.5, link=FAST_LINK, profile=profile(), device_gib="min", block_tokens=4)
        with Session(model, config, checking_backend()) as session:
            assert torch.equal(model.generate(tokens, **{name: session.new_cache()}, **options), wanted)
            assert session.stats is not None
            assert session.stats.h2d_bytes > 0
            cache, before = session.new_cache(), session.num_forwards
            logits = model(tokens, **{name: cache}).logits
            assert session.num_forwards == before + 1
            assert torch.equal(logits[:, -1].argmax(-1), wanted[:, tokens.shape[1]])
            model.model(wanted[:, tokens.shape[1] :][:, :1], **{name: cache})
            assert cache.get_seq_length() == tokens.shape[1] + 1


def answers(cache: Any) -> dict[str, Any]:
    """Everything that generation may ask."""
    layers = range(len(cache))
    return {
        "length": [cache.get_seq_length(idx) for idx in layers],
        "mask_sizes": [cache.get_mask_sizes(3, idx) for idx in layers],
        "query_offset": [cache.get_query_offset(idx) for idx in layers],
        "max_length": [cache.get_max_length(idx) for idx in layers],
        "max_length of all": cache.get_max_length(),
        "is_sliding": cache.is_sliding,
        "is_linear": cache.is_linear,
        "is_compileable": cache.is_compileable,
        "is_croppable": cache.is_croppable,
        "is_initialized": cache.is_initialized,
        "batch_size": cache.batch_size,
        "records": [getattr(layer, "record_past", False) for layer in cache.layers if not layer.is_sliding],
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_our_cache_answers_as_transformers_own(architecture: str) -> None:
    model = make_model(architecture)
    config = OffloadConfig(split=0.5, link=FAST_LINK, profile=profile(), device_gib="min", block_tokens=4)
    with Session(model, config, checking_backend()) as session, torch.no_grad():
        ours, theirs = session.new_cache(), plain_cache(model)
        assert answers(ours) == answers(theirs)
        for tokens in (21, 1, 5):
            for cache in (ours, theirs):
                model(prompt(2, tokens), **given(cache))
            assert answers(ours) == answers(theirs)
        ours, theirs = session.new_cache(), plain_cache(model)
        for cache in (ours, theirs):
            cache.activate_past_recording()
            model(prompt(2, 30), **given(cache))
            cache.crop(-4)
        found, wanted = answers(ours), answers(theirs)
        assert all(found.pop("records"))
        wanted.pop("records")  # their growing layers need no record to be cropped
        assert found == wanted


def test_a_positive_crop_has_no_meaning_any_more() -> None:
    model = make_model("llama")
    config = OffloadConfig(split=0.5, link=FAST_LINK, profile=profile())
    with Session(model, config, checking_backend()) as session, torch.no_grad():
        cache = session.new_cache()
        model(prompt(2, 19), **given(cache))
        with pytest.raises(ValueError, match="minus the number of tokens to remove, got 3"):
            cache.crop(3)
        cache.crop(torch.tensor(-3))  # as transformers 5.17 counts rejected candidates
        assert cache.get_seq_length() == 16
        assert type(cache.get_seq_length()) is int
