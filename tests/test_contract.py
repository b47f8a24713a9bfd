"""What we rely on of transformers, and what it relies on of a cache: the same at both ends of the supported range.

Run with the oldest release as tests/test_matrix.py says. A release that changes one of these needs a look at hf.py and
session.py before its version is allowed in setup.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from matrix import FAST_LINK, checking_backend, profile
from models import make_model
from modes import plain_cache, prompt
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from kvoffload import OffloadConfig
from kvoffload.hf import OffloadedHFCache, OffloadedLayer
from kvoffload.session import Session


def public(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_") and callable(getattr(cls, name))}


def test_the_release_is_in_the_supported_range() -> None:
    assert (5, 17) <= tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)


def test_generate_prepares_its_cache_as_the_session_expects() -> None:
    names = list(inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters)
    ours = list(inspect.signature(Session._prepare_cache).parameters)
    assert (
        names
        == ours
        == [
            "self",
            "generation_config",
            "model_kwargs",
            "generation_mode",
            "batch_size",
            "max_cache_length",
        ]
    )


def test_every_method_of_a_growing_layer_is_answered_by_ours() -> None:
    for_the_whole_cache = {"crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"}
    wanted = public(CacheLayerMixin) | public(DynamicLayer)
    assert wanted - public(OffloadedLayer) <= for_the_whole_cache
    assert for_the_whole_cache <= public(OffloadedHFCache)


def test_layers_are_asked_in_ways_that_ours_are_prepared_for() -> None:
    for name in ("update", "get_mask_sizes", "get_seq_length"):
        theirs = list(inspect.signature(getattr(DynamicLayer, name)).parameters)
        ours = list(inspect.signature(getattr(OffloadedLayer, name)).parameters)
        assert ours == theirs, name
    assert {"activate_past_recording", "get_query_offset", "get_max_length"} <= public(Cache)


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
                model(prompt(2, tokens), past_key_values=cache)
            assert answers(ours) == answers(theirs)
        ours, theirs = session.new_cache(), plain_cache(model)
        for cache in (ours, theirs):
            cache.activate_past_recording()
            model(prompt(2, 30), past_key_values=cache)
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
        model(prompt(2, 19), past_key_values=cache)
        with pytest.raises(ValueError, match="minus the number of tokens to remove, got 3"):
            cache.crop(3)
        cache.crop(torch.tensor(-3))  # as transformers 5.17 counts rejected candidates
        assert cache.get_seq_length() == 16
        assert type(cache.get_seq_length()) is int
