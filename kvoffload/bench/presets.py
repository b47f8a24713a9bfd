"""Model shapes to decode at, and how fast the link beside each of them is.

Owns the named shapes and the models of random weights made from them. Does not own the measuring.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A shape and how fast the link is."""

    architecture: str
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    layers: int
    batch: int
    cached_tokens: int
    vocab: int = 1024
    dtype: torch.dtype = torch.float32
    h2d_gb_per_s: float | None = None  # emulated; None on CUDA
    max_recompute_to_link: float | None = None  # lower the link until recomputing takes at most this share of it
    recompute_to_link: float | None = None  # set the link so that recomputing takes this multiple of it

    @property
    def is_emulated(self) -> bool:
        """Whether the link is an emulated one, in front of the CPU."""
        return self.h2d_gb_per_s is not None or self.recompute_to_link is not None


def _gpu(architecture: str, hidden: int, heads: int, kv_heads: int, ffn: int, layers: int, vocab: int) -> Preset:
    return Preset(
        architecture=architecture,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        layers=layers,
        batch=32,
        cached_tokens=1024,
        vocab=vocab,
        dtype=torch.float16 if architecture == "opt" else torch.bfloat16,
    )


def _cpu(architecture: str, kv_heads: int, **link: float) -> Preset:
    preset = Preset(
        architecture=architecture,
        hidden=512,
        heads=8,
        kv_heads=kv_heads,
        ffn=1024,
        layers=4,
        batch=8,
        cached_tokens=512,
    )
    return replace(preset, **link)  # type: ignore[arg-type]


PRESETS: dict[str, Preset] = {
    "cpu-mha": _cpu("opt", 8, h2d_gb_per_s=0.15, max_recompute_to_link=0.7),
    "cpu-balanced": _cpu("opt", 8, recompute_to_link=1 / 0.43),
    "cpu-small": replace(_cpu("opt", 8, h2d_gb_per_s=0.15, max_recompute_to_link=0.7), cached_tokens=128),
    "cpu-gqa": _cpu("llama", 2, h2d_gb_per_s=0.05),
    "cpu-gqa-bf16": replace(_cpu("llama", 2, h2d_gb_per_s=0.05), dtype=torch.bfloat16),
    "opt-6.7b": _gpu("opt", 4096, 32, 32, 16384, 32, 50272),
    "opt-13b": _gpu("opt", 5120, 40, 40, 20480, 40, 50272),
    "opt-30b": _gpu("opt", 7168, 56, 56, 28672, 4, 50272),  # 4 of its 48 layers
    "opt-66b": _gpu("opt", 9216, 72, 72, 36864, 4, 50272),  # 4 of its 64 layers
    "llama-2-7b": _gpu("llama", 4096, 32, 32, 11008, 32, 32000),
    "llama-2-13b": _gpu("llama", 5120, 40, 40, 13824, 40, 32000),
    "llama-3.1-8b": _gpu("llama", 4096, 32, 8, 14336, 32, 128256),
    "qwen3-8b": _gpu("qwen3", 4096, 32, 8, 12288, 36, 151936),
}
# Half the prompt: 8.6 GB of K and V instead of 17.2, which is pinned in seconds where a machine pins 2 GB/s.
PRESETS |= {f"{name}-512": replace(PRESETS[name], cached_tokens=512) for name in ("opt-6.7b", "llama-2-7b")}


def make_model(preset: Preset, device: torch.device) -> PreTrainedModel:
    """A model of that shape with random weights, made on the device."""
    common = {
        "hidden_size": preset.hidden,
        "num_attention_heads": preset.heads,
        "num_hidden_layers": preset.layers,
        "vocab_size": preset.vocab,
        "max_position_embeddings": max(2048, 2 * preset.cached_tokens),
    }
    if preset.architecture == "opt":
        config = AutoConfig.for_model(
            "opt", **common, ffn_dim=preset.ffn, word_embed_proj_dim=preset.hidden, dropout=0.0
        )
    else:
        config = AutoConfig.for_model(
            preset.architecture,
            **common,
            head_dim=preset.hidden // preset.heads,
            num_key_value_heads=preset.kv_heads,
            intermediate_size=preset.ffn,
        )
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=preset.dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
