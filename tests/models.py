"""Tiny random models of many architectures, each with at least one layer whose cache grows without bound."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.gptj.modeling_gptj import GPTJAttention

BASE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}  # heads that forms of few bits can be made of
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FULL = {"layer_types": ["full_attention"] * 3}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 16}

# Architectures whose K/V can be recomputed by calling the attention module, and what their configs need.
RECOMPUTABLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48, "num_key_value_heads": 4, "dropout": 0.0},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 12},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 12},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": None},
    "stablelm": {"partial_rotary_factor": 0.5},
    "olmo": {},
    "olmo2": {},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {**MIXED, "logit_scale": 1.0},
    "starcoder2": {"sliding_window": None},
    "granite": {},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 32},
    "mixtral": {**MOE, "sliding_window": None},
    "smollm3": {**FULL, "no_rope_layers": [1, 1, 0]},
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt_oss": {**MOE, **MIXED},
    "exaone4": {**MIXED},
    "nemotron": {"partial_rotary_factor": 0.5},
    "helium": {},
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "head_dim": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_neox": {"num_key_value_heads": 4},
}
# Architectures whose K/V are always transferred.
TRANSFERRED: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 3, "n_head": 4},
    "mpt": {"d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 256},
}
# Up to 5.23 GPT-J's attention looks up its rotations itself and computes attention in its own code.
GPTJ: dict[str, Any] = {"n_embd": 48, "n_layer": 3, "n_head": 4, "rotary_dim": 8, "n_positions": 256}
GPTJ_IS_LIKE_OTHERS = "position_embeddings" in inspect.signature(GPTJAttention.forward).parameters
(RECOMPUTABLE if GPTJ_IS_LIKE_OTHERS else TRANSFERRED)["gptj"] = GPTJ
# Models with other layers beside attention, or whose layers share K and V; where transformers keeps these, we do too.
OTHERS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {  # the last two layers read the K/V of earlier ones
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", *["full_attention"] * 2, "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "sliding_window": 16,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 96,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 5,
        "altup_num_inputs": 2,
    },
    "qwen3_next": {  # a linear attention layer
        **MOE,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 32,
    },
    "lfm2": {  # a convolution
        "layer_types": ["conv", "full_attention", "full_attention"],
        "full_attn_idxs": [1, 2],
        "block_multiple_of": 16,
    },
    "bamba": {  # a state space layer
        "attn_layer_indices": [1, 2],
        "mamba_n_heads": 4,
        "mamba_d_head": 24,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
}


def make_model(architecture: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny model in float32, in eval mode, with weights large enough to tell tokens apart."""
    values = {**BASE, **{**RECOMPUTABLE, **TRANSFERRED, **OTHERS}[architecture], **overrides}
    config = AutoConfig.for_model(architecture, **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        if architecture == "gptj":
            model.lm_head.bias[0] -= 10  # the token of padding, which would be padding in the next turn
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.use_cache = True
    return model
