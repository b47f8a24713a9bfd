"""Dimensions of decoders from their configurations, against the models transformers builds from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import CONFIGS, LLAMA_2_7B
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvoffload.errors import ConfigError, UnsupportedModelError
from kvoffload.layer_types import sliding_window_tokens
from kvoffload.model_shape import dimensions_from_config, shape_from_config

# Full-size default configurations; the models are built without memory.
ARCHITECTURES = (
    *("llama", "opt", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "stablelm", "olmo"),
    *("olmo2", "cohere", "cohere2", "starcoder2", "granite", "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "exaone4"),
    *("gpt2", "gpt_neox", "gptj", "bloom", "falcon", "gpt_bigcode", "mpt", "smollm3", "glm", "glm4", "helium"),
    *("deepseek_v2", "deepseek_v3", "gemma3n_text", "olmoe", "phimoe", "granitemoe", "persimmon", "apertus", "biogpt"),
)
# What a configuration may say otherwise than the defaults.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("nemotron", {"num_key_value_heads": 8, "attention_bias": True, "mlp_bias": True}),
    (
        "opt",
        {"hidden_size": 1024, "word_embed_proj_dim": 512, "do_layer_norm_before": False, "num_attention_heads": 16},
    ),
    ("opt", {"enable_bias": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64, "hidden_size": 4096}),
    ("falcon", {"parallel_attn": False, "bias": True}),
    ("phi", {"qk_layernorm": True}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True, "num_key_value_heads": 8}),
    ("qwen2_moe", {"mlp_only_layers": [0, 5]}),
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    ("cohere", {"use_qk_norm": True, "num_key_value_heads": 8}),
    ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 1, "attention_bias": True}),
    ("gemma3n_text", {"num_kv_shared_layers": 10}),
    ("gpt2", {"n_inner": 1000}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt_oss", {"attention_bias": False, "num_local_experts": 32}),
    ("phimoe", {"lm_head_bias": True, "attention_bias": True}),
    ("starcoder2", {"use_bias": False}),
)
PARAMETERS = {  # as published
    "opt-6.7b": 6_658_473_984,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-8b": 8_190_735_360,
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


def built(name: str, **changes: Any) -> tuple[Any, torch.nn.Module]:
    """A configuration and its model, without memory."""
    config = AutoConfig.for_model(name, **changes)
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_widths_and_layers_are_those_of_the_model(name: str) -> None:
    config, model = built(name)
    dims, shape = dimensions_from_config(config, "bfloat16"), shape_from_config(config, "bfloat16")
    assert dims.is_exact
    assert dims.num_weights == sum(parameter.numel() for parameter in model.parameters())
    assert shape.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    layers = DynamicCache(config=config).layers
    assert shape.num_layers == len(layers)
    if not config.to_dict().get("num_kv_shared_layers"):  # those are counted below
        assert shape.num_offloaded_layers == sum(type(layer) is DynamicLayer for layer in layers)
        assert dims.num_windowed_layers == sum(type(layer) is DynamicSlidingWindowLayer for layer in layers)
    keys = [module for path, module in model.named_modules() if path.endswith("k_proj")]
    if keys:
        assert shape.num_kv_heads * shape.head_dim == keys[0].weight.shape[0]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_weights_are_exact_where_a_configuration_differs_from_the_defaults(name: str, changes: dict[str, Any]) -> None:
    config, model = built(name, **changes)
    for one in (config, config.to_dict()):
        assert dimensions_from_config(one).num_weights == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_published_size_from_a_file_alone(name: str) -> None:
    dims = dimensions_from_config(CONFIGS / f"{name}.json")
    assert dims.num_weights == PARAMETERS[name]
    assert dims.itemsize_bytes == 2
    assert shape_from_config(CONFIGS / f"{name}.json").weight_bytes == 2 * PARAMETERS[name]


def test_matrices_are_named_and_counted_by_what_one_token_uses() -> None:
    dims = dimensions_from_config(CONFIGS / "mixtral-8x7b.json")
    by_name = {matrix.name: matrix for matrix in dims.matrices}
    assert by_name["k_proj"][:5] == ("k_proj", "attention", 4096, 1024, 32)
    assert (by_name["expert_up_proj"].stored, by_name["expert_up_proj"].active) == (8, 2)
    assert dims.num_active_weights == pytest.approx(12.75e9, rel=0.005)  # with the head, without the embedding
    assert dims.matrices[-1].name == "lm_head"
    assert dims.active_width == 2 * 14336
    dense = dimensions_from_config(CONFIGS / "llama-3.1-8b.json")
    assert dense.num_active_weights == dense.num_weights - 128256 * 4096 - 65 * 4096


def test_a_tied_head_is_multiplied_with_but_stored_once() -> None:
    tied, untied = (dimensions_from_config(LLAMA_2_7B | {"tie_word_embeddings": tie}) for tie in (True, False))
    assert untied.num_weights - tied.num_weights == 32000 * 4096
    assert untied.num_active_weights == tied.num_active_weights


def test_layers_that_share_a_cache_project_no_keys_and_values_of_their_own() -> None:
    dims = dimensions_from_config(AutoConfig.for_model("gemma3n_text"))
    layers = {matrix.name: matrix.layers for matrix in dims.matrices}
    assert (layers["q_proj"], layers["k_proj"], dims.num_sharing_layers) == (35, 20, 15)
    assert (dims.num_full_layers, dims.num_windowed_layers, dims.window_tokens) == (3, 16, 512)


def test_an_unknown_model_type_is_counted_like_llama_and_said_to_be() -> None:
    dims = dimensions_from_config(LLAMA_2_7B | {"model_type": "brandnew"})
    assert dims.num_weights == 6_738_415_616
    assert not dims.is_exact
    assert dimensions_from_config(LLAMA_2_7B).is_exact


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
    assert shape.weight_bytes == 6_658_473_984 * 2


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
    router = 32 * 8 * 4096
    assert shape.weight_bytes - plain.weight_bytes == (32 * 7 * 3 * 4096 * 11008 + router) * 2


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of llama is 1000000000, which no decoder has"),
        ({"num_local_experts": -8}, "num_local_experts of llama is -8"),
        ({"sliding_window": -4096}, "sliding_window of llama is -4096"),
        ({"hidden_size": 4097}, "4097 of llama is no multiple of its 32 heads: add head_dim"),
        ({"num_key_value_heads": 5}, "32 heads of llama cannot share 5 key-value heads"),
        ({"num_local_experts": 4, "num_experts_per_tok": 6}, "through 6 experts, but has 4"),
        ({"layer_types": ["full_attention"] * 31}, "names 31 layers of 32"),
    ],
)
def test_numbers_that_do_not_go_together_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_from_config(LLAMA_2_7B | changes)


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
