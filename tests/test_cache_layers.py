"""What layers cache, in our words, beside what transformers' own cache says and what its models do."""

from __future__ import annotations

from typing import Any

import pytest
from models import OTHERS, RECOMPUTABLE, TRANSFERRED, make_model
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvoffload import hf
from kvoffload.model.cache_layers import cache_layers
from kvoffload.model.facts import CacheTraits

GROWS, STATE = CacheTraits("grows"), CacheTraits("state")
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def layers_of(name: str, **changes: Any) -> tuple[CacheTraits, ...]:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    return cache_layers(AutoConfig.for_model(name, **changes))


@pytest.mark.parametrize("name", [*RECOMPUTABLE, *TRANSFERRED, *OTHERS])
def test_what_can_be_offloaded_is_what_a_session_offloads(name: str) -> None:
    model = make_model(name)
    found = cache_layers(model.config)
    assert [idx for idx, one in enumerate(found) if one.is_offloadable] == hf.offloadable_layers(model)


def test_layers_grow_or_are_bounded_by_a_window_of_their_own() -> None:
    found = layers_of("gemma2", num_hidden_layers=4, layer_types=KINDS, sliding_window=64)
    assert found == (CacheTraits("window", 64), GROWS, CacheTraits("window", 64), GROWS)
    chunked = layers_of("llama4_text", num_hidden_layers=4, attention_chunk_size=128)
    assert [one.kind for one in chunked] == ["window", "window", "window", "grows"]
    assert chunked[0].window_tokens == 128


@pytest.mark.parametrize(("window", "kind"), [(63, "window"), (64, "grows"), (65, "grows")])
def test_a_window_as_wide_as_the_positions_is_none(window: int, kind: str) -> None:
    (layer,) = set(layers_of("mistral", num_hidden_layers=2, sliding_window=window, max_position_embeddings=64))
    assert (layer.kind, layer.window_tokens) == (kind, window if kind == "window" else 0)


def test_positions_may_be_given_where_the_configuration_object_has_but_a_default() -> None:
    config = AutoConfig.for_model("mistral", num_hidden_layers=1, sliding_window=64, max_position_embeddings=64)
    assert cache_layers(config, positions=100) == (CacheTraits("window", 64),)


def test_layers_that_share_keys_and_values_say_who_lends_and_who_reads() -> None:
    found = layers_of("gemma3n_text", num_hidden_layers=6, num_kv_shared_layers=2, layer_types=[*KINDS, *KINDS[:2]])
    assert [one.kind for one in found] == ["window", "grows", "window", "grows", "shared", "shared"]
    assert [one.is_lent for one in found] == [False, False, True, True, False, False]
    assert [one.window_tokens > 0 for one in found[4:]] == [True, False]


def test_nobody_lends_where_nobody_reads() -> None:
    found = layers_of("gemma4_text", num_hidden_layers=4, layer_types=KINDS, num_kv_shared_layers=0)
    assert not any(one.is_lent for one in found)


def test_states_are_told_apart_from_layers_that_keep_both() -> None:
    hybrid = layers_of("bamba", num_hidden_layers=3, attn_layer_indices=[1])
    assert hybrid == (STATE, GROWS, STATE)
    both = layers_of("falcon_h1", num_hidden_layers=2)
    assert both == (CacheTraits("grows", has_state=True),) * 2
    assert both[0].is_offloadable  # its K and V; the state stays


def test_a_kind_of_layer_that_a_model_brings_itself_is_not_offloaded() -> None:
    pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")  # where its layers are defined
    found = layers_of("deepseek_v4", num_hidden_layers=4)
    assert any(one.is_own_kind for one in found)
    assert not any(one.is_offloadable for one in found if one.is_own_kind)


def test_the_text_part_of_a_configuration_counts() -> None:
    config = AutoConfig.for_model("gemma3")
    assert cache_layers(config) == cache_layers(config.text_config)
