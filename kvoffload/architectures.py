"""What model types differ in where their configuration does not say it: biases, norms, ties, widths.

Owns one line per model type. Does not own the reading of a configuration nor the counting (`model_shape`). A type that
is not listed is taken to be like LLaMA: two norms without bias, a gated MLP, no biases unless `attention_bias` or
`mlp_bias` says so, separate embedding and head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Flag = bool | tuple[str, bool]  # a constant, or the field that says it and its default


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The parameters of one model type beside its matrices."""

    gated_mlp: bool = True
    tied: bool = False  # embedding and head are one matrix, unless `tie_word_embeddings` says otherwise
    norms: int = 2  # per layer, as wide as the hidden state
    norm_vectors: int = 1  # of each norm: 2 with a bias, 0 without parameters
    qkv_bias: Flag = ("attention_bias", False)
    out_bias: Flag = ("attention_bias", False)
    mlp_bias: Flag = ("mlp_bias", False)
    head_bias: Flag = False
    qk_norm: Flag = False
    qk_norm_is_wide: bool = False  # over all heads together, not over each with shared parameters
    qk_norm_vectors: int = 1
    position_rows: int | None = None  # learned positions: rows beyond the largest position
    embedding_norm: bool = False
    head_dim: int = 0  # where it is not the hidden size over the heads
    sinks: bool = False  # one number per head
    expert_bias: bool = False  # of the experts and their router
    mlp_numbers: int = 0  # of the activation function

    def flag(self, name: str, get: Any) -> bool:
        """A constant, or what the configuration says."""
        value: Flag = getattr(self, name)
        if isinstance(value, bool):
            return value
        said = get(value[0])
        return value[1] if said is None else bool(said)


_LLAMA = Architecture()
_BARE = Architecture(qkv_bias=False, out_bias=False, mlp_bias=False)
_GPT = Architecture(gated_mlp=False, norm_vectors=2, qkv_bias=True, out_bias=True, mlp_bias=True)
_PHI = replace(_GPT, norms=1, head_bias=True)
_GPT2 = replace(_GPT, tied=True, position_rows=0)
_BIASED = ("use_bias", True)
_OPT_BIAS = ("enable_bias", True)
_NEOX_BIAS = ("attention_bias", True)
_FALCON_BIAS = ("bias", False)
_GEMMA = replace(_LLAMA, tied=True, head_dim=256, mlp_bias=False)
_COHERE = replace(_LLAMA, tied=True, norms=1, mlp_bias=False)
_QWEN2 = replace(_BARE, qkv_bias=True)
_QWEN3 = replace(_LLAMA, qk_norm=True, head_dim=128, mlp_bias=False)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "granitemoe": _LLAMA,
    "smollm3": replace(_LLAMA, tied=True),
    "mistral": _BARE,
    "mixtral": _BARE,
    "phi3": _BARE,
    "deepseek_v2": replace(_LLAMA, mlp_bias=False),
    "deepseek_v3": replace(_LLAMA, mlp_bias=False),
    "qwen2": _QWEN2,
    "qwen2_moe": replace(_QWEN2, qkv_bias=("qkv_bias", True)),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, head_dim=0),
    "olmo": replace(_LLAMA, norm_vectors=0, mlp_bias=False),
    "olmo2": replace(_LLAMA, qk_norm=True, qk_norm_is_wide=True, mlp_bias=False),
    "olmoe": replace(_LLAMA, qk_norm=True, qk_norm_is_wide=True, mlp_bias=False),
    "exaone4": replace(_BARE, qk_norm=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=4),
    "gemma3_text": replace(_GEMMA, norms=4, qk_norm=True),
    "gemma3n_text": replace(_GEMMA, norms=4, qk_norm=True),
    "cohere": replace(_COHERE, qk_norm=("use_qk_norm", False), qk_norm_is_wide=True),
    "cohere2": _COHERE,
    "glm": replace(_LLAMA, out_bias=False, mlp_bias=False, qkv_bias=_NEOX_BIAS, head_dim=128),
    "glm4": replace(_LLAMA, out_bias=False, mlp_bias=False, qkv_bias=_NEOX_BIAS, norms=4, head_dim=128),
    "helium": replace(_LLAMA, out_bias=False, head_dim=128),
    "arcee": replace(_LLAMA, gated_mlp=False),
    "apertus": replace(_LLAMA, gated_mlp=False, qk_norm=True, mlp_bias=False, mlp_numbers=2),
    "nemotron": replace(_LLAMA, gated_mlp=False, norm_vectors=2),
    "stablelm": replace(
        _BARE,
        norm_vectors=2,
        qkv_bias=("use_qkv_bias", False),
        qk_norm=("qk_layernorm", False),
        qk_norm_is_wide=True,
    ),
    "phimoe": replace(_LLAMA, norm_vectors=2, mlp_bias=False, head_bias=("lm_head_bias", False)),
    "gpt_oss": replace(
        _LLAMA, qkv_bias=_NEOX_BIAS, out_bias=_NEOX_BIAS, mlp_bias=False, sinks=True, expert_bias=True, head_dim=64
    ),
    "opt": replace(_GPT2, qkv_bias=_OPT_BIAS, out_bias=_OPT_BIAS, mlp_bias=_OPT_BIAS, position_rows=2),
    "biogpt": replace(_GPT2, position_rows=2),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": replace(_GPT2, qkv_bias=False),
    "xglm": replace(_GPT, tied=True),
    "bloom": replace(_GPT, tied=True, embedding_norm=True),
    "gpt_neox": replace(_GPT, qkv_bias=_NEOX_BIAS, out_bias=_NEOX_BIAS),
    "persimmon": replace(_GPT, qk_norm=("qk_layernorm", True), qk_norm_vectors=2),
    "phi": replace(_PHI, qk_norm=("qk_layernorm", False), qk_norm_vectors=2),
    "gptj": replace(_PHI, qkv_bias=False, out_bias=False),
    "codegen": replace(_PHI, qkv_bias=False, out_bias=False),
    "starcoder2": replace(_GPT, tied=True, qkv_bias=_BIASED, out_bias=_BIASED, mlp_bias=_BIASED),
    "falcon": replace(_GPT, tied=True, qkv_bias=_FALCON_BIAS, out_bias=_FALCON_BIAS, mlp_bias=_FALCON_BIAS),
    "mpt": replace(_GPT, tied=True, norm_vectors=1, qkv_bias=False, out_bias=False, mlp_bias=False),
    "ctrl": replace(_GPT, tied=True),
    "openai-gpt": _GPT2,
}
ARCHITECTURES |= {"gemma3": ARCHITECTURES["gemma3_text"], "gemma3n": ARCHITECTURES["gemma3n_text"]}


def architecture_of(model_type: Any) -> Architecture:
    """That of a model type, or LLaMA's where it is not known."""
    return ARCHITECTURES.get(str(model_type), _LLAMA)
