"""The facts of a model that the installed transformers does not know, as far as the keys of its configuration tell.

Owns the guess: a decoder like LLaMA (two norms, a gated MLP, no biases unless the configuration says so), with grouped
queries, windows, experts and latent attention where keys name them. Does not own the keys (`fields`). Needs neither
torch nor transformers. What comes out says that it is a guess, and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvoffload.errors import ConfigError, UnsupportedModelError
from kvoffload.model.facts import KV, CacheTraits, Facts, Layer
from kvoffload.model.fields import (
    Get,
    dtype_name,
    dtype_of,
    first_whole,
    itemsize_bytes,
    model_type,
    reader,
    stated_positions,
    whole,
)
from kvoffload.model.matrix import Group, Kind, Matrix, Part, Weight
from kvoffload.model.quantization import quantization_of, stored

_STATES = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid_linear")
_WITHOUT = ("mlp", "moe", "none")


def guessed(said: Mapping[str, Any], doubt: str) -> Facts:
    """The facts of the decoder that a configuration describes.

    Args:
        said: the whole configuration.
        doubt: why these are guessed.

    Raises:
        ConfigError: a needed field is missing or makes no sense; names it.
        UnsupportedModelError: an encoder-decoder or attention-free model.
    """
    get = reader(said)
    if get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{model_type(get)} is an encoder-decoder; only decoder-only models are planned")
    heads, hidden = whole(get, "num_heads"), whole(get, "hidden_size")
    num_layers, vocab = whole(get, "num_layers"), whole(get, "vocab_size")
    kv_heads = whole(get, "num_kv_heads", heads)
    if hidden % heads and get("head_dim") is None:
        raise ConfigError(
            f"hidden_size {hidden} of {model_type(get)} is no multiple of its {heads} heads: add head_dim"
        )
    if heads % kv_heads:
        raise ConfigError(f"{heads} heads of {model_type(get)} cannot share {kv_heads} key-value heads evenly")
    head_dim = whole(get, "head_dim", max(1, hidden // heads))
    kv, value_dim = KV(kv_heads, head_dim, head_dim), head_dim
    rank, rope = first_whole(get, "kv_lora_rank") or 0, first_whole(get, "qk_rope_head_dim") or 0
    if rank:  # keys and values are made of one narrow vector and a rotated part
        head_dim = (first_whole(get, "qk_nope_head_dim") or 0) + rope
        kv, value_dim = KV(1, rank, rope), first_whole(get, "v_head_dim") or head_dim
    layers = [Layer(cache, kv if cache.kind in ("grows", "window") else None) for cache in _caches(get, num_layers)]
    attending = [idx for idx, layer in enumerate(layers) if layer.kv is not None]
    attention = _latent(get, hidden, heads, rank, rope, head_dim, value_dim) if rank else _plain(get, hidden, heads, kv)
    mlp, active_width = _mlp(get, hidden, num_layers)
    groups = [_group(one, attending) for one in attention]
    groups += [_group(one, where) for one, where in mlp]
    is_tied = bool(get("tie_word_embeddings"))
    groups.append(
        Group(Matrix("lm_head", "head", hidden, vocab, 1), (Weight("lm_head", "weight", "head", hidden, vocab),))
    )
    weights = [one for group in groups for one in group.weights if not (is_tied and one.kind == "head")]
    weights.append(Weight("model.embed_tokens", "weight", "embedding", hidden, vocab))
    itemsize = itemsize_bytes(dtype_of(get))
    names = _names
    quantization = quantization_of(get("quantization_config"), model_type(get), names)
    matrices, quantized = stored(quantization, names, weights, groups, 8.0 * itemsize)
    biases = sum(one.bias * one.outputs * one.layers * one.stored for one in matrices)
    return Facts(
        model_type=model_type(get),
        class_name="",
        doubt=doubt,
        num_weights=sum(one.num_values for one in weights) + biases + (2 * num_layers + 1) * hidden,
        itemsize_bytes=itemsize,
        dtype=dtype_name(dtype_of(get)),
        layers=tuple(layers),
        hidden_size=hidden,
        vocab_size=vocab,
        num_heads=heads,
        head_dim=head_dim,
        value_dim=value_dim,
        latent_width=rank + rope if rank else 0,
        active_width=active_width,
        mlp_matrices=3,
        norms_per_layer=2,
        is_tied=is_tied,
        matrices=matrices,
        position_limit=stated_positions(get),
        quantized=quantized,
    )


def _names(one: Weight) -> Sequence[str]:
    return (one.module, f"{one.module}.{one.name}", f"{one.module}.0.{one.name}") if one.copies > 1 else (one.module,)


def _caches(get: Get, num_layers: int) -> list[CacheTraits]:
    """What each layer caches, by `layer_types` or what stands for it."""
    window = (
        0 if get("use_sliding_window") is False else first_whole(get, "sliding_window", "attention_chunk_size") or 0
    )
    kinds = get("layer_types")
    if not isinstance(kinds, (list, tuple)) or not kinds:
        pattern = first_whole(get, "sliding_window_pattern")
        kinds = [
            "sliding_attention" if window and not (pattern and (idx + 1) % pattern == 0) else "full_attention"
            for idx in range(num_layers)
        ]
    if len(kinds) != num_layers:
        raise ConfigError(f"layer_types of {model_type(get)} names {len(kinds)} layers of {num_layers}")
    found = []
    for kind in map(str, kinds):
        if kind in _STATES:
            found.append(CacheTraits("state"))
        elif kind in _WITHOUT:
            found.append(CacheTraits("none"))
        elif window and kind.startswith(("sliding", "chunked", "local")):
            found.append(CacheTraits("window", window))
        else:
            found.append(CacheTraits("grows"))
    return found


def _plain(get: Get, hidden: int, heads: int, kv: KV) -> Iterator[Matrix]:
    """The four projections of one layer."""
    bias, width, kv_width = bool(get("attention_bias")), heads * kv.key_dim, kv.num_heads * kv.key_dim
    yield Matrix("q_proj", "attention", hidden, width, 1, bias=bias)
    yield Matrix("k_proj", "attention", hidden, kv_width, 1, bias=bias, cached=kv_width)
    yield Matrix("v_proj", "attention", hidden, kv_width, 1, bias=bias, cached=kv_width)
    yield Matrix("o_proj", "attention", width, hidden, 1, bias=bias)


def _latent(get: Get, hidden: int, heads: int, rank: int, rope: int, head_dim: int, value_dim: int) -> Iterator[Matrix]:
    """Multi-head latent attention: K and V through a narrow matrix, queries perhaps too."""
    q_rank = first_whole(get, "q_lora_rank") or 0
    if q_rank:
        yield Matrix("q_a_proj", "attention", hidden, q_rank, 1)
        yield Matrix("q_b_proj", "attention", q_rank, heads * head_dim, 1)
    else:
        yield Matrix("q_proj", "attention", hidden, heads * head_dim, 1)
    yield Matrix("kv_a_proj_with_mqa", "attention", hidden, rank + rope, 1, cached=rank + rope)
    yield Matrix("kv_b_proj", "attention", rank, heads * (head_dim - rope + value_dim), 1, expands=True)
    yield Matrix("o_proj", "attention", heads * value_dim, hidden, 1)


def _mlp(get: Get, hidden: int, num_layers: int) -> tuple[list[tuple[Matrix, list[int]]], int]:
    """The matrices of dense MLPs and experts with the layers that have them, and the width one token goes through."""
    width = whole(get, "intermediate_size")
    num_experts = first_whole(get, "num_local_experts", "num_experts", "n_routed_experts")
    sparse = _expert_layers(get, num_layers) if num_experts else []
    dense = [idx for idx in range(num_layers) if idx not in sparse]
    found = [(one, dense) for one in _gated("", "mlp", hidden, width, bool(get("mlp_bias")))] if dense else []
    if not num_experts:
        return found, width
    expert_width = first_whole(get, "moe_intermediate_size") or width
    active = first_whole(get, "num_experts_per_tok", "moe_k") or 1
    if active > num_experts:
        raise ConfigError(f"{model_type(get)} sends a token through {active} experts, but has {num_experts}")
    shared = first_whole(get, "shared_expert_intermediate_size") or 0
    shared += expert_width * (first_whole(get, "n_shared_experts") or 0)
    if shared:
        found += [(one, sparse) for one in _gated("shared_experts.", "mlp", hidden, shared, False)]
    found.append((Matrix("gate", "mlp", hidden, num_experts, 1), sparse))
    for one in _gated("experts.", "experts", hidden, expert_width, False):
        found.append((one._replace(stored=num_experts, active=active), sparse))
    return found, shared + expert_width * active


def _gated(prefix: str, part: Part, hidden: int, width: int, bias: bool) -> Iterator[Matrix]:
    yield Matrix(f"{prefix}gate_proj", part, hidden, width, 1, bias=bias)
    yield Matrix(f"{prefix}up_proj", part, hidden, width, 1, bias=bias)
    yield Matrix(f"{prefix}down_proj", part, width, hidden, 1, bias=bias)


def _expert_layers(get: Get, num_layers: int) -> list[int]:
    """Layers whose MLP is a mixture of experts."""
    kinds = get("mlp_layer_types")
    if isinstance(kinds, (list, tuple)) and len(kinds) == num_layers:
        return [idx for idx, kind in enumerate(kinds) if kind == "sparse"]
    first, only = first_whole(get, "first_k_dense_replace") or 0, get("mlp_only_layers") or ()
    step = first_whole(get, "decoder_sparse_step", "moe_layer_freq") or 1
    return [idx for idx in range(num_layers) if idx >= first and idx not in only and (idx + 1) % step == 0]


def _group(matrix: Matrix, layers: Sequence[int]) -> Group:
    """A matrix of some layers, under names that LLaMA would give it."""
    inside = "self_attn" if matrix.part == "attention" else "mlp"
    kind: Kind = "experts" if matrix.stored > 1 else "matrix" if matrix.name == "gate" else "linear"
    leaf = matrix.name if kind != "experts" else "experts"
    name = "weight" if kind != "experts" else matrix.name.rpartition(".")[2]
    weights = tuple(
        Weight(
            f"model.layers.{idx}.{inside}.{leaf}", name, kind, matrix.inputs, matrix.outputs, matrix.stored, matrix.bias
        )
        for idx in layers
    )
    return Group(matrix._replace(layers=len(layers)), weights)
