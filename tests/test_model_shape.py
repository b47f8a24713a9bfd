"""`kvoffload.model_shape`: the dimensions that planning sees, of models and configurations in every form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import CONFIGS, LLAMA_2_7B
from models import make_model
from transformers import AutoConfig

import kvoffload
from kvoffload.errors import ConfigError, UnsupportedModelError
from kvoffload.model.stored_facts import facts_of

OPT_6_7B = json.loads((CONFIGS / "opt-6.7b.json").read_text())


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3_text", "mixtral", "gpt2", "qwen3_next"])
def test_a_configuration_object_and_its_dict_are_the_same(name: str) -> None:
    config = AutoConfig.for_model(name)
    assert kvoffload.model_shape(config.to_dict()) == kvoffload.model_shape(config)


def test_a_file_or_its_folder_is_read_and_a_bad_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"config\.json"):
        kvoffload.model_shape(tmp_path)
    file.write_text(json.dumps(OPT_6_7B))
    shapes = [kvoffload.model_shape(one) for one in (file, str(tmp_path), OPT_6_7B)]
    assert shapes[0] == shapes[1] == shapes[2]
    for text in ("{", "[1]", "\xff"):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=r"config\.json"):
            kvoffload.model_shape(tmp_path)
    with pytest.raises(ConfigError, match="a int is no model configuration"):
        kvoffload.model_shape(3)


def test_llama_2_7b_from_a_bare_file_without_key_value_heads() -> None:
    shape = kvoffload.model_shape(LLAMA_2_7B)
    assert (shape.num_layers, shape.num_offloaded_layers) == (32, 32)
    assert (shape.num_kv_heads, shape.head_dim, shape.mlp_matrices) == (32, 128, 3)
    assert (shape.kv_row_bytes, shape.activation_row_bytes) == (16384, 8192)
    assert shape.weight_bytes == 6_738_415_616 * 2  # untied
    assert shape.dense_flops == 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert shape.is_exact


def test_opt_6_7b_ties_its_embeddings_and_has_a_plain_mlp() -> None:
    shape = kvoffload.model_shape(OPT_6_7B)
    assert (shape.mlp_matrices, shape.intermediate_size) == (2, 16384)
    assert shape.weight_bytes == 6_658_473_984 * 2


def test_the_dtype_is_the_given_one_then_the_files_then_float32() -> None:
    assert facts_of(LLAMA_2_7B, torch.float32).itemsize_bytes == 4
    assert facts_of(LLAMA_2_7B, torch.float32).weight_bytes == 4 * 6_738_415_616
    assert kvoffload.model_shape(LLAMA_2_7B).kv_itemsize_bytes == 2
    assert kvoffload.model_shape(LLAMA_2_7B | {"dtype": "float32"}).activation_itemsize_bytes == 4
    bare = without(LLAMA_2_7B, "torch_dtype")
    assert kvoffload.model_shape(bare).activation_itemsize_bytes == 4
    quantised = bare | {"quantization_config": {"load_in_4bit": True}}
    assert kvoffload.model_shape(quantised).activation_itemsize_bytes == 2  # its loaders take 16 bits then
    with pytest.raises(ConfigError, match=r"int3.*known: bfloat16"):
        facts_of(LLAMA_2_7B, "int3")


def test_the_widest_growing_layer_counts_where_they_differ() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = {
        "model_type": "gemma4_text",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 48,
        "attention_k_eq_v": True,
        "layer_types": kinds,
        "sliding_window": 32,
        "vocab_size": 100,
        "hidden_size_per_layer_input": 0,
        "dtype": "bfloat16",
    }
    shape = kvoffload.model_shape(config)
    assert (shape.num_offloaded_layers, shape.kv_row_bytes) == (2, 2 * 1 * 48 * 2)
    assert (shape.window_tokens, shape.window_row_bytes) == (32, 2 * (2 * 2 * 16 * 2))
    assert shape.held_row_bytes == 0


def test_layers_whose_cache_others_read_stay_on_the_device() -> None:
    config = AutoConfig.for_model("gemma3n_text")
    shape, facts = kvoffload.model_shape(config), facts_of(config)
    assert shape.num_offloaded_layers == sum(one.cache.is_offloadable for one in facts.layers) == 3
    assert shape.held_row_bytes == 2 * 2 * 256 * shape.kv_itemsize_bytes  # one of them, K and V, heads x dimension


def test_latent_attention_caches_one_narrow_vector() -> None:
    shape = kvoffload.model_shape(AutoConfig.for_model("deepseek_v3", dtype="bfloat16"))
    assert shape.kv_row_bytes == (512 + 64) * 2
    assert shape.num_kv_heads == 128


def test_experts_are_stored_all_and_met_only_where_active() -> None:
    shape = kvoffload.model_shape(CONFIGS / "mixtral-8x7b.json")
    assert shape.weight_bytes == 2 * 46_702_792_704
    assert shape.intermediate_size == 2 * 14336
    attention, router, expert = 2 * 4096 * (4096 + 1024), 8 * 4096, 3 * 4096 * 14336
    assert shape.active_layer_weights == attention + router + 2 * expert


def test_a_guess_says_that_it_is_one() -> None:
    assert not kvoffload.model_shape(LLAMA_2_7B | {"model_type": "brandnew"}).is_exact


def test_a_model_has_its_own_weights_and_dtype() -> None:
    model = make_model("llama")
    own, described = kvoffload.model_shape(model), kvoffload.model_shape(model.config)
    assert own == described
    half = kvoffload.model_shape(model.bfloat16())
    assert (half.weight_bytes, half.kv_row_bytes) == (own.weight_bytes // 2, own.kv_row_bytes // 2)


def test_models_without_a_decoder_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        kvoffload.model_shape({"model_type": "t5"})
    with pytest.raises(UnsupportedModelError, match="no attention heads"):
        kvoffload.model_shape(without(LLAMA_2_7B, "num_attention_heads") | {"model_type": "brandnew"})
