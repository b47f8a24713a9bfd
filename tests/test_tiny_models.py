from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from campaign.model_types import LAYERS, OVERRIDES, VOCABULARY, WIDTH, WINDOW
from campaign.tiny_models import model_types, tiny_config, tiny_model


def test_every_list_of_text_models_is_there_and_a_composite_type_is_made_whole() -> None:
    found = model_types()
    assert {"causal", "image-text", "multimodal"} == set(found.values())
    assert (found["llama"], found["gemma3_text"], found["gemma3"]) == ("causal", "causal", "multimodal")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "qwen3_moe", "gemma3", "qwen2_vl", "mllama"])
def test_a_model_is_small_whatever_its_fields_are_called(model_type: str) -> None:
    model = tiny_model(model_type)
    text = model.config.get_text_config(decoder=True)
    assert (text.hidden_size, text.vocab_size) == (WIDTH, VOCABULARY)
    assert sum(parameter.numel() for parameter in model.parameters()) < 4e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def test_key_value_heads_stay_shared_where_they_were_shared_and_only_there() -> None:
    assert (tiny_config("llama").num_key_value_heads, tiny_config("mistral").num_key_value_heads) == (4, 2)
    latent = tiny_config("deepseek_v3")
    assert latent.num_key_value_heads == latent.num_attention_heads


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "qwen3_next", "gemma4_text", "minimax", "lfm2"])
def test_layers_of_every_kind_of_the_default_are_kept(model_type: str) -> None:
    default, small = AutoConfig.for_model(model_type), tiny_config(model_type)
    assert list(dict.fromkeys(default.layer_types)) == list(dict.fromkeys(small.layer_types))
    assert len(small.layer_types) == small.num_hidden_layers >= LAYERS


def test_a_window_closes_within_the_prompt_unless_it_never_does() -> None:
    assert tiny_config("gemma2").sliding_window == WINDOW
    assert AutoConfig.for_model("moshi").sliding_window == AutoConfig.for_model("moshi").max_position_embeddings
    assert tiny_config("moshi").sliding_window == tiny_config("moshi").max_position_embeddings


def test_special_tokens_are_distinct_and_below_those_of_prompts() -> None:
    config = tiny_config("gemma3")
    special = [config.image_token_id, config.boi_token_id, config.eoi_token_id]
    assert len(set(special)) == 3
    assert all(0 <= token < 24 for token in special)


def test_layers_named_by_their_index_are_among_those_that_are_kept() -> None:
    config = tiny_config("mllama").get_text_config()
    assert config.cross_attention_layers == [3]
    assert config.num_hidden_layers == 4


def test_gates_that_start_closed_are_opened_and_biases_are_set() -> None:
    model = tiny_model("mllama")
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith("attn_gate")]
    assert gates
    assert all(bool(gate.any()) for gate in gates)
    assert all(bool(p.any()) for name, p in tiny_model("opt").named_parameters() if name.endswith("bias"))


def test_the_same_seed_makes_the_same_model_and_embeddings_are_not_louder() -> None:
    first, again, loud = (tiny_model("gpt2", loudness=loudness) for loudness in (3.0, 3.0, 6.0))
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    ours, theirs = (dict(model.named_parameters()) for model in (first, loud))
    assert torch.equal(ours["transformer.wte.weight"], theirs["transformer.wte.weight"])
    attention = "transformer.h.0.attn.c_attn.weight"
    assert torch.allclose(2 * ours[attention], theirs[attention])


def test_overrides_come_last_and_reach_nested_configurations() -> None:
    assert tiny_config("llama", hidden_size=32).hidden_size == 32
    config = tiny_config("gemma3", text_config={"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    assert config.text_config.layer_types == ["full_attention"] * 2
    assert config.text_config.hidden_size == WIDTH


def test_each_override_is_of_a_type_and_says_something() -> None:
    def is_empty(values: Any) -> bool:
        return isinstance(values, dict) and (not values or any(map(is_empty, values.values())))

    assert not [kind for kind, values in OVERRIDES.items() if is_empty(values)]


def test_shared_keys_and_values_leave_a_layer_that_grows_alone() -> None:
    layers = DynamicCache(config=tiny_config("gemma3n_text")).layers
    assert len([layer for layer in layers if type(layer).__name__ == "DynamicLayer"]) == 2
