"""Facts of models against the classes that transformers builds, and what is said where there are none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from configs import CONFIGS, LLAMA_2_7B
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvoffload.errors import ConfigError, UnsupportedModelError
from kvoffload.model.learn import learned

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "models.json").read_text())
CALLED = {
    "grows": "DynamicLayer",
    "window": "DynamicSlidingWindowLayer",
    "state": "LinearAttentionLayer",
    "none": "DummyLayer",
}
# Full-size default configurations; the models are built without memory.
ARCHITECTURES = (
    *("llama", "opt", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "stablelm", "olmo"),
    *("olmo2", "cohere", "cohere2", "starcoder2", "granite", "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "exaone4"),
    *("gpt2", "gpt_neox", "gptj", "bloom", "falcon", "gpt_bigcode", "mpt", "smollm3", "glm", "glm4", "helium"),
    *("deepseek_v2", "deepseek_v3", "gemma3n_text", "olmoe", "phimoe", "granitemoe", "persimmon", "apertus", "biogpt"),
    *("falcon_h1", "zamba2", "jamba", "bamba", "lfm2", "ernie4_5", "jetmoe", "xglm", "codegen", "gpt_neo"),
)
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (  # what a configuration may say otherwise than the defaults
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    (
        "opt",
        {"hidden_size": 1024, "word_embed_proj_dim": 512, "do_layer_norm_before": False, "num_attention_heads": 16},
    ),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64, "hidden_size": 4096}),
    ("qwen2_moe", {"mlp_only_layers": [0, 5], "decoder_sparse_step": 2}),
    ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 1, "attention_bias": True}),
    ("gemma3n_text", {"num_kv_shared_layers": 10}),
)
PARAMETERS = {
    "opt-6.7b": 6_658_473_984,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_exact_in_weights_layers_and_widths_of_keys_and_values(name: str) -> None:
    config, expected = PUBLISHED[name]["config"], PUBLISHED[name]["expected"]
    if config["model_type"] not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {config['model_type']}")
    facts = learned(config)
    assert facts.is_exact
    assert facts.num_weights == expected["parameters"]
    assert Counter(CALLED[layer.cache.kind] for layer in facts.layers) == expected["layers"]
    widths = {2 * layer.kv.values for layer in facts.layers if layer.kv}
    assert sorted(widths) == expected["kv_bytes_per_token_of_growing_layers"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_their_published_size_from_a_file_alone(name: str) -> None:
    facts = learned(json.loads((CONFIGS / f"{name}.json").read_text()))
    assert facts.num_weights == PARAMETERS[name]
    assert facts.weight_bytes == 2 * PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in ARCHITECTURES), *VARIANTS],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_weights_and_layers_are_those_of_the_class(name: str, changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model(name, **changes)
    facts = learned(config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert facts.num_weights == sum(parameter.numel() for parameter in model.parameters())
    layers = DynamicCache(config=config).layers
    limit = getattr(config, "max_position_embeddings", 2**62)
    bounded = [isinstance(one, DynamicSlidingWindowLayer) and one.sliding_window < limit for one in layers]
    found = [layer.cache.kind == "window" for layer in facts.layers]
    assert found[: len(layers)] == bounded
    grows = [isinstance(one, DynamicLayer) and not is_bounded for one, is_bounded in zip(layers, bounded, strict=True)]
    assert [layer.cache.kind == "grows" for layer in facts.layers][: len(layers)] == grows
    # every matrix, the embeddings, and vectors: nothing is counted twice
    known = sum(one.num_values for one in facts.matrices if not (facts.is_tied and one.part == "head"))
    embeddings = sum(
        weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for weight in [module.weight]
    )
    assert known + embeddings <= facts.num_weights
    assert known + embeddings >= 0.98 * facts.num_weights


def test_what_a_file_leaves_out_is_what_the_class_takes() -> None:
    bare = {"model_type": "gemma2"}
    assert learned(bare).num_weights == learned(AutoConfig.for_model("gemma2").to_dict()).num_weights
    assert learned(bare).position_limit is None  # the file says nothing of it


def test_towers_are_weights_and_no_operations() -> None:
    facts = learned(PUBLISHED["gemma-3-4b-it"]["config"])
    text = learned(PUBLISHED["gemma-3-4b-it"]["config"]["text_config"] | {"torch_dtype": "bfloat16"})
    assert facts.matrices[:-1] == text.matrices[:-1]  # the heads' vocabularies differ
    assert facts.num_weights > text.num_weights + 400_000_000


def test_a_class_for_text_alone_takes_the_text_part_of_a_configuration() -> None:
    facts = learned(AutoConfig.for_model("llama4").to_dict())
    assert (facts.class_name, facts.model_type) == ("Llama4ForCausalLM", "llama4")
    assert facts.is_exact


def test_an_unknown_type_is_guessed_by_its_keys_and_said_to_be() -> None:
    facts = learned(LLAMA_2_7B | {"model_type": "brandnew"})
    assert facts.num_weights == PARAMETERS["llama-2-7b"]
    assert not facts.is_exact
    release = transformers.__version__
    assert facts.doubt == (
        f"model type 'brandnew' is not known to transformers {release}: its sizes are guessed by the keys of its "
        "configuration"
    )


def test_code_that_comes_with_a_model_is_never_executed(tmp_path: Path) -> None:
    config = LLAMA_2_7B | {
        "model_type": "brandnew",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    program = "import kvoffload, sys; print(kvoffload.model_shape(sys.argv[1]).is_exact)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
    assert not (tmp_path / "executed").exists()
    assert "comes with code of its own (trust_remote_code), which is not executed" in learned(config).doubt


def test_code_that_comes_with_a_known_type_is_not_needed() -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"}
    plain = PUBLISHED["DeepSeek-V2-Lite"]["config"]
    assert learned(plain | {"auto_map": auto_map}) == learned(plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": "many"},
            r"refuses this configuration of llama \(.*num_attention_heads.*\): correct it",
        ),
        ({"num_attention_heads": 2.5}, "refuses this configuration of llama .*num_attention_heads"),
        ({"hidden_size": 4097}, "refuses this configuration of llama .*4097"),
        ({"vocab_size": -1}, r"cannot build LlamaForCausalLM from this configuration \(.*negative"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of llama is 1000000000, which no decoder has"),
        ({"torch_dtype": "int3"}, "int3.*known: bfloat16"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_configuration_that_transformers_refuses_is_told_with_its_reason(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        learned(LLAMA_2_7B | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("t5", "t5 is an encoder-decoder"), ("vit", "no class that generates text from a configuration of vit")],
)
def test_models_without_a_decoder_are_refused(kind: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        learned({"model_type": kind})


def test_a_tower_that_cannot_be_built_here_leaves_the_text_model_and_a_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ImportError("the tower needs a library")

    monkeypatch.setattr(transformers.Gemma3ForConditionalGeneration, "__init__", fail)
    config = PUBLISHED["gemma-3-4b-it"]["config"]
    facts = learned(config)
    assert facts.class_name == "Gemma3ForCausalLM"
    assert "(the tower needs a library), so that its text model alone is counted" in facts.doubt
    assert facts.num_weights < PUBLISHED["gemma-3-4b-it"]["expected"]["parameters"]


def test_a_model_without_a_cache_of_keys_and_values_has_states_alone() -> None:
    facts = learned({"model_type": "mamba", "num_hidden_layers": 3, "hidden_size": 64, "state_size": 4})
    assert [layer.cache.kind for layer in facts.layers] == ["state"] * 3
    assert facts.num_offloaded_layers == 0
