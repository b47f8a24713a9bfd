"""Matrices, MLPs and norms of decoders, as their modules have them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from configs import CONFIGS
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvoffload.model.facts import Facts
from kvoffload.model.learn import learned
from kvoffload.model.matrix import Matrix

PUBLISHED: dict[str, Any] = json.loads((CONFIGS.parent / "models.json").read_text())


def facts_of(name: str, **changes: Any) -> Facts:
    if name in PUBLISHED:
        return learned(PUBLISHED[name]["config"])
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    return learned(AutoConfig.for_model(name, **changes).to_dict())


def by_name(facts: Facts) -> dict[str, Matrix]:
    found = {matrix.name: matrix for matrix in facts.matrices}
    assert len(found) == len(facts.matrices)
    return found


def test_projections_gates_and_the_head_in_their_order() -> None:
    facts = learned(json.loads((CONFIGS / "llama-3.1-8b.json").read_text()))
    kinds = [(one.name, one.part, one.inputs, one.outputs, one.layers, one.cached) for one in facts.matrices]
    assert kinds == [
        ("q_proj", "attention", 4096, 4096, 32, 0),
        ("k_proj", "attention", 4096, 1024, 32, 1024),
        ("v_proj", "attention", 4096, 1024, 32, 1024),
        ("o_proj", "attention", 4096, 4096, 32, 0),
        ("gate_proj", "mlp", 4096, 14336, 32, 0),
        ("up_proj", "mlp", 4096, 14336, 32, 0),
        ("down_proj", "mlp", 14336, 4096, 32, 0),
        ("lm_head", "head", 4096, 128256, 1, 0),
    ]
    assert facts.norms_per_layer == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", Matrix("c_attn", "attention", 768, 2304, 12, bias=True, bits=32, cached=2 * 768)),  # a Conv1D
        ("bloom", Matrix("query_key_value", "attention", 64, 192, 2, bias=True, bits=32, cached=128)),
        ("Phi-3-mini-4k", Matrix("qkv_proj", "attention", 3072, 9216, 32, cached=6144)),
        ("dbrx", Matrix("w1", "experts", 6144, 10752, 40, 16, 4)),  # experts below one another in two dimensions
        ("dbrx", Matrix("w2", "experts", 10752, 6144, 40, 16, 4)),
        ("dbrx", Matrix("router.layer", "mlp", 6144, 16, 40)),
        ("gpt-oss-20b", Matrix("experts.gate_up_proj", "experts", 2880, 5760, 24, 32, 4, bias=True, bits=4.25)),
        ("gpt-oss-20b", Matrix("router", "mlp", 2880, 32, 24, bias=True)),  # a parameter of its own module
        ("ERNIE-4.5-21B-A3B", Matrix("o_proj", "attention", 2560, 2560, 28)),  # of an Ernie4_5_MoeAttention
        ("Qwen3-Next-80B", Matrix("in_proj_qkvz", "mixer", 2048, 12288, 36)),
        ("Qwen3-Next-80B", Matrix("shared_expert.up_proj", "mlp", 2048, 512, 48)),
        ("Nemotron-H-8B", Matrix("up_proj", "mlp", 4096, 21504, 24)),  # everything in a layer is its mixer there
        ("DeepSeek-V2-Lite", Matrix("kv_b_proj", "attention", 512, 4096, 27, expands=True)),
        ("DeepSeek-V2-Lite", Matrix("kv_a_proj_with_mqa", "attention", 2048, 576, 27, cached=576)),
        ("gemma-4-31B", Matrix("k_proj 5376x2048", "attention", 5376, 2048, 10, cached=2048)),
        ("opt-350m", Matrix("project_in", "mlp", 512, 1024, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_matrices_of_every_make(name: str, expected: Matrix) -> None:
    assert by_name(facts_of(name))[expected.name] == expected


@pytest.mark.parametrize(
    ("name", "width", "matrices", "norms"),
    [
        ("gpt2", 3072, 2, 2),
        ("falcon-40b", 32768, 2, 2),
        ("gemma-3-4b-it", 10240, 3, 4),
        ("command-r7b", 14336, 3, 1),
        ("dbrx", 4 * 10752, 3, 1),
        ("gpt-oss-20b", 4 * 2880, 3, 2),
        ("GLM-4.5-Air", 9 * 1408, 3, 2),  # a shared expert and eight others, more than its dense layer has
        ("ERNIE-4.5-21B-A3B", 12288, 3, 2),  # its dense layer
        ("granite-4.0-h-1b", 4096, 3, 2),
        ("Nemotron-H-8B", 21504, 2, 1),
        ("bert-generation", 4096, 2, 0),  # an MLP in two modules
    ],
)
def test_the_width_that_one_token_goes_through(name: str, width: int, matrices: int, norms: int) -> None:
    facts = facts_of(name, **({"is_decoder": True} if name == "bert-generation" else {}))
    assert (facts.active_width, facts.mlp_matrices, facts.norms_per_layer) == (width, matrices, norms)


def test_a_token_meets_only_its_experts() -> None:
    facts = learned(json.loads((CONFIGS / "mixtral-8x7b.json").read_text()))
    layer = 2 * 4096 * (4096 + 1024) + 8 * 4096 + 2 * 3 * 4096 * 14336
    assert facts.active_layer_weights == 32 * layer


def test_a_tied_head_is_multiplied_with_but_stored_once() -> None:
    tied, untied = (facts_of("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert (tied.is_tied, untied.is_tied) == (True, False)
    assert untied.num_weights - tied.num_weights == 32000 * 4096
    assert by_name(tied)["lm_head"] == by_name(untied)["lm_head"]


def test_layers_that_share_a_cache_project_no_keys_and_values_of_their_own() -> None:
    facts = facts_of("gemma3n_text")
    found = by_name(facts)
    assert (found["q_proj"].layers, found["k_proj"].layers) == (35, 20)
    assert facts.num_attention_layers == 35
    assert (facts.num_offloaded_layers, facts.window_tokens) == (3, 512)
    assert all(layer.kv is not None for layer in facts.layers)
