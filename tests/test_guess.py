"""What the keys of a configuration tell where transformers does not know the model."""

from __future__ import annotations

from typing import Any

import pytest
from configs import LLAMA_2_7B

from kvoffload.errors import ConfigError
from kvoffload.model.guess import guessed
from kvoffload.model.learn import learned

LLAMA_LIKE = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "vocab_size": 500,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}
LATENT = {
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "q_lora_rank": 48,
    "num_key_value_heads": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 48},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["down_proj"]}},
        {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
        {"model_type": "deepseek_v3"} | LATENT,
    ],
    ids=["plain", "tied", "heads", "quantised", "experts", "latent"],
)
def test_a_guess_comes_close_to_the_model_for_decoders_like_llama(changes: dict[str, Any]) -> None:
    known, guess = learned(LLAMA_LIKE | changes), guessed(LLAMA_LIKE | changes, "a test")
    assert (known.doubt, guess.doubt) == ("", "a test")
    assert [one.kv for one in guess.layers] == [one.kv for one in known.layers]
    assert guess.num_weights == pytest.approx(known.num_weights, rel=0.002)
    assert guess.weight_bytes == pytest.approx(known.weight_bytes, rel=0.002)
    assert guess.active_layer_weights == known.active_layer_weights
    names = (
        "hidden_size",
        "vocab_size",
        "num_heads",
        "head_dim",
        "value_dim",
        "latent_width",
        "mlp_matrices",
        "is_tied",
    )
    for name in names:
        assert getattr(guess, name) == getattr(known, name), name


@pytest.mark.parametrize(
    ("extra", "kinds", "window"),
    [
        ({"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 128}, "wwwg", 128),
        ({"layer_types": ["linear_attention", "mlp", "full_attention", "mamba"]}, "sngs", 0),
        ({"sliding_window": 4096}, "wwww", 4096),
        ({"sliding_window": None}, "gggg", 0),
        ({"sliding_window": 4096, "use_sliding_window": False}, "gggg", 0),
        ({"sliding_window": 512, "sliding_window_pattern": 2}, "wgwg", 512),
        ({"attention_chunk_size": 256}, "wwww", 256),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_layers_are_told_by_their_types_or_by_what_stands_for_them(
    extra: dict[str, Any], kinds: str, window: int
) -> None:
    facts = guessed(LLAMA_LIKE | extra, "a test")
    assert "".join(one.cache.kind[0] for one in facts.layers) == kinds
    assert facts.window_tokens == window


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"])
def test_a_missing_field_is_named(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"llama lacks {missing}"):
        guessed({name: value for name, value in LLAMA_2_7B.items() if name != missing}, "a test")


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "32", True])
def test_a_wrong_number_is_named(wrong: object) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads") as caught:
        guessed(LLAMA_2_7B | {"num_attention_heads": wrong}, "a test")
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
        guessed(LLAMA_2_7B | changes, "a test")


def test_the_text_part_of_a_configuration_is_used() -> None:
    nested = {"model_type": "brandnew", "torch_dtype": "bfloat16", "text_config": LLAMA_LIKE | {"dtype": None}}
    assert guessed(nested, "a test") == guessed(LLAMA_LIKE, "a test")
