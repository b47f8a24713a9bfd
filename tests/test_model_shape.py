"""Dimensions of decoders from their configurations, against the models transformers builds from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvoffload.errors import ConfigError, UnsupportedModelError
from kvoffload.model_shape import shape_from_config, sliding_window_tokens

# Full-size default configurations; the models are built without memory.
ARCHITECTURES = (
    *("llama", "opt", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "stablelm", "olmo"),
    *("olmo2", "cohere2", "starcoder2", "granite", "qwen2_moe", "mixtral", "gpt_oss", "exaone4", "gpt2", "gpt_neox"),
    *("gptj", "bloom", "falcon", "gpt_bigcode"),
)
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "torch_dtype": "float16",
}
OPT_6_7B = {
    "model_type": "opt",
    "hidden_size": 4096,
    "ffn_dim": 16384,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 4096,
    "torch_dtype": "float16",
}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_widths_and_layers_are_those_of_the_model(name: str) -> None:
    config = AutoConfig.for_model(name)
    shape = shape_from_config(config, "bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert shape.weight_bytes == pytest.approx(weight_bytes, rel=0.01)
    layers = DynamicCache(config=config).layers
    assert shape.num_layers == len(layers)
    assert shape.num_offloaded_layers == sum(type(layer) is DynamicLayer for layer in layers)
    keys = [module for path, module in model.named_modules() if path.endswith("k_proj")]
    if keys:
        assert shape.num_kv_heads * shape.head_dim == keys[0].weight.shape[0]


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3_text", "mixtral", "gpt2"])
def test_a_configuration_object_and_its_dict_are_the_same(name: str) -> None:
    config = AutoConfig.for_model(name)
    assert shape_from_config(config.to_dict()) == shape_from_config(config)


def test_llama_2_7b_from_a_bare_file_without_key_value_heads() -> None:
    shape = shape_from_config(LLAMA_2_7B)
    assert (shape.num_kv_heads, shape.head_dim, shape.mlp_matrices) == (32, 128, 3)
    assert shape.kv_row_bytes == 16384
    assert shape.activation_row_bytes == 8192
    assert shape.weight_bytes == 6_738_415_616 * 2  # untied


def test_opt_6_7b_from_a_bare_file_ties_its_embeddings_and_has_a_plain_mlp() -> None:
    shape = shape_from_config(OPT_6_7B)
    assert shape.mlp_matrices == 2
    assert shape.intermediate_size == 16384
    assert shape.weight_bytes == pytest.approx(13.32e9, rel=2e-3)


def test_the_dtype_is_the_given_one_then_the_files_then_float32() -> None:
    assert shape_from_config(LLAMA_2_7B, torch.float32).kv_itemsize_bytes == 4
    assert shape_from_config(LLAMA_2_7B).kv_itemsize_bytes == 2
    assert shape_from_config(LLAMA_2_7B | {"dtype": "float32"}).activation_itemsize_bytes == 4
    assert shape_from_config(without(LLAMA_2_7B, "torch_dtype")).activation_itemsize_bytes == 4
    with pytest.raises(ConfigError, match=r"int3.*known: bfloat16"):
        shape_from_config(LLAMA_2_7B, "int3")


def test_experts_are_stored_all_and_computed_only_where_active() -> None:
    mixtral = LLAMA_2_7B | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    plain, shape = shape_from_config(LLAMA_2_7B), shape_from_config(mixtral)
    assert shape.intermediate_size == 2 * 11008
    assert shape.weight_bytes - plain.weight_bytes == 32 * 7 * 3 * 4096 * 11008 * 2


@pytest.mark.parametrize(
    ("extra", "full", "window"),
    [
        ({"layer_types": ["sliding_attention"] * 24 + ["full_attention"] * 8, "sliding_window": 128}, 8, 128),
        ({"layer_types": ["linear_attention"] * 24 + ["full_attention"] * 8}, 8, 0),
        ({"sliding_window": 4096}, 0, 4096),
        ({"sliding_window": None}, 32, 0),
        ({"sliding_window": 4096, "use_sliding_window": False}, 32, 0),
        ({"sliding_window": 512, "sliding_window_pattern": 4}, 8, 512),
        ({"model_type": "gemma2", "sliding_window": 4096}, 16, 4096),
        ({"model_type": "gemma3_text", "sliding_window": 512}, 5, 512),
        ({"attention_chunk_size": 256}, 0, 256),
        ({"num_kv_shared_layers": 10}, 21, 0),  # 10 read another's cache, one lends it
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_only_layers_whose_cache_grows_are_offloaded(extra: dict[str, Any], full: int, window: int) -> None:
    config = LLAMA_2_7B | extra
    assert shape_from_config(config).num_offloaded_layers == full
    assert sliding_window_tokens(config) == window


def test_the_text_part_of_a_multimodal_configuration_is_used() -> None:
    config = {"model_type": "llava", "torch_dtype": "bfloat16", "text_config": without(LLAMA_2_7B, "torch_dtype")}
    assert shape_from_config(config) == shape_from_config(LLAMA_2_7B)
    multimodal = AutoConfig.for_model("gemma3")
    assert shape_from_config(multimodal) == shape_from_config(multimodal.text_config)


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"])
def test_a_missing_field_is_named(missing: str) -> None:
    with pytest.raises(ConfigError, match=missing) as caught:
        shape_from_config(without(LLAMA_2_7B, missing))
    assert "llama" in str(caught.value)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "32", True])
def test_a_wrong_number_is_named(wrong: object) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads") as caught:
        shape_from_config(LLAMA_2_7B | {"num_attention_heads": wrong})
    assert repr(wrong) in str(caught.value)


def test_models_without_a_decoders_cache_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        shape_from_config(LLAMA_2_7B | {"is_encoder_decoder": True})
    with pytest.raises(UnsupportedModelError, match="no attention heads"):
        shape_from_config(without(LLAMA_2_7B, "num_attention_heads"))


def test_a_file_or_its_folder_is_read_and_a_bad_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"config\.json"):
        shape_from_config(tmp_path)
    file.write_text(json.dumps(OPT_6_7B))
    assert shape_from_config(file) == shape_from_config(str(tmp_path)) == shape_from_config(OPT_6_7B)
    for text in ("{", "[1]", "\xff"):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=r"config\.json"):
            shape_from_config(tmp_path)
