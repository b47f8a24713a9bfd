"""To what the fields of configurations shrink: rules by their names, and what single model types need beside these.

Owns names and numbers only. How they are applied is in `tiny_models`.
"""

from __future__ import annotations

import re
from typing import Any

WIDTH = 64  # of the hidden state, and of whatever else is wide
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
LAYERS, OTHER_LAYERS = 4, 2  # of the decoder (more where it has more kinds), and of towers
VOCABULARY, POSITIONS, WINDOW, EXPERTS = 96, 256, 16, 4
FIRST_TOKEN = 24  # of prompts: those below are special to some model type
LOUDNESS = 3.0  # weights times that (embeddings apart), so that tokens differ

# The first that matches a field's whole name says what a whole number shrinks to, unless it is smaller already.
RULES: tuple[tuple[str, int], ...] = (
    (r".*(num|n)_(\w+_)?heads(_per_layer)?|n_head|(\w+_)?attention_heads|num_sliding_attention_heads", HEADS),
    (r"(\w+_)?(head_dim|headdim|d_head|dim_head|head_size|kv_channels)|d_kv|\w*_d_head", HEAD_DIM),
    (r"qk_(nope|rope)_head_dim|v_head_dim", HEAD_DIM),
    (r"rotary_dim", HEAD_DIM // 2),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?(de|en)coder_layers", LAYERS),
    (r"depth|(\w+_)?(num_)?(hidden_|global_)?layers|num_blocks|resampler_depth", OTHER_LAYERS),
    (r"(\w+_)?(num|n)_(\w+_)?experts|num_local_experts|zero_expert_num", EXPERTS),
    (r"(\w+_)?(experts_per_tok|experts_per_token|top_?k|moe_k)(_experts|_blocks)?|moe_topk|index_topk", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|(moe_)?num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", 1),
    (r"(\w+_)?vocab_size(\w*)|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"(\w+_)?(sliding_window|window|window_size|window_len|attention_chunk_size)|local_attention", WINDOW),
    (r"sliding_window_size|keep_window_size|\w+_attn_chunk_length", WINDOW),
    (r"(\w+_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|seq_len", POSITIONS),
    (r"context_length|max_(source|target)_positions|(mamba_)?chunk_size", POSITIONS),
    (r".*(_size|_dims?|_rank|_width|_channels?|_dim\w*)|dim|d_model|d_ff|dff|d_inner|n_embd|n_inner|dim_ff", WIDTH),
    (r"intermediate_size_mlp|(hidden|out)_features|num_(centroids|(position_)?embeddings|embeds)", WIDTH),
)
KV_HEADS_OF = {  # fields that count key and value heads, and those that count the heads they serve
    "num_key_value_heads": "num_attention_heads",
    "num_kv_heads": "num_attention_heads",
    "kv_n_heads": "n_heads",
    "num_query_groups": "num_attention_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
    "linear_num_key_heads": "linear_num_value_heads",
}
# What looks like a width and is none.
KEPT = re.compile(
    r".*(image|patch|kernel|merge|crop|tile|pool|batch|grid|stride|window_kernel|hop|step|feature|pruning|group)\w*_size"
    r"|patch_\w+|in_channels|num_channels|audio_channels|out_channels|conv_L_cache|(\w+_)?conv_kernel\w*|num_image_tokens"
    r"|\w+_(source|rope|scaling|attention)_layers|n_window\w*|input_(dim|feat_size)|num_mel_bins|mel_dim"
    r"|video_patch_dim|type_vocab_size|acoustic_\w+"
)
# Numbers of special tokens.
TOKEN = re.compile(r".*_(id|index)(_list)?")


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}


MROPE = {"rope_parameters": _rope(4, 2, 2)}
STATE = {  # heads of the state space layers: their product is twice the hidden size
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention", "mlp"],
    "mamba_num_heads": 8,
    "n_groups": 1,
    "n_routed_experts": 4,
}
COMPASS = {
    "layer_types": [*["sliding_attention"] * 2, "full_attention", "full_attention"],
    "rope_parameters": {"full_attention": _rope(4, 2, 2), "sliding_attention": _rope(4, 2, 2)},
    "logit_scale": 1.0,
}
INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
GEMMA_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 4,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Their windows are of their first release; in later ones there is none.
NO_WINDOW = {"sliding_window": None}
SHARED = {  # the last two layers read the K and V of the two before
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "intermediate_size": 64,
    "activation_sparsity_pattern": [0.0] * 6,
}

# By the names of fields, nested configurations likewise; `_default` are values that the default of a class needs.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "image_token_offset": 40,
        "audio_token_offset": 72,
        "vision_config": {"codebook_size": 32},
        "audio_config": {"codebook_size": 16},
    },
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    "blenderbot": {"encoder_layers": 4},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2": {
        "text_config": {
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense", *["sparse"] * 3],
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "diffusion_gemma": {
        "canvas_length": 8,
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _rope(3, 3, 2)}},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n_text": SHARED,
    "gemma4_assistant": {"_default": {"text_config": GEMMA_ASSISTANT}, "text_config": GEMMA_ASSISTANT},
    "gemma4_unified_assistant": {"text_config": GEMMA_ASSISTANT},
    "glm46v": {"text_config": MROPE},
    "glm4v": {"text_config": MROPE},
    "glm4v_moe": {"text_config": {"rope_parameters": _rope(2, 1, 1, partial_rotary_factor=0.5)}},
    "glm5_next": {"text_config": {"index_topk": 32}},
    "glm_ocr": {"text_config": MROPE},
    "glmga": {"text_config": MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1]},
    "granitemoehybrid": STATE,
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [2, 2, 2, 2]},
        }
    },
    "idefics2": {"text_config": NO_WINDOW},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 64}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 16, "qk_head_dim": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mistral": NO_WINDOW,
    "mistral3": {"text_config": NO_WINDOW},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}, "text_config": {"rope_scaling_layers": [0, 2]}},
    "muse_spark": {"audio_config": {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}},
    "nemo_speechlm": {"text_config": NEMOTRON_H},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": NEMOTRON_H,
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}, "text_config": NEMOTRON_H},
    "paddleocr_vl": {"text_config": MROPE},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 20,
        "vision_end_token_id": 21,
        "audio_start_token_id": 22,
        "audio_end_token_id": 23,
        "text_config": MROPE,
    },
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen2_vl": {"text_config": MROPE},
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 20,
        "vision_end_token_id": 21,
        "audio_start_token_id": 22,
        "audio_end_token_id": 23,
    },
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "reformer": {
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [32, 32],
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
    "vibevoice_asr": {
        name: {"num_filters": 1, "depths": [1] * 7}
        for name in ("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config")
    },
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": [*["linear_attention"] * 2, "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
    },
}
