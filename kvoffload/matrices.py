"""The weight matrices of a decoder, part by part: their names and sizes, and how many layers have them.

Owns attention, multi-head latent attention, dense and expert MLPs, and what Gemma 3n has more. Does not own the
dimensions they are made of, embeddings, norms and the head (`model_shape`), what an architecture has by default
(`architectures`), nor the bits of a weight (`quantization`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from kvoffload.architectures import Architecture
from kvoffload.errors import ConfigError
from kvoffload.model_config import Get, first_whole, model_type, whole

Part = Literal["attention", "mlp", "experts", "head"]


class Matrix(NamedTuple):
    """One weight matrix that activations are multiplied with, of every layer that has it."""

    name: str
    part: Part
    inputs: int
    outputs: int
    layers: int  # how many layers have it
    stored: int = 1  # copies per layer: experts
    active: int = 1  # of these, how many one token goes through
    bias: bool = False
    bits: float = 16.0  # of each weight as it is stored, scales of quantised ones included; biases apart

    @property
    def num_weights(self) -> int:
        """All copies in all layers, with biases."""
        return self.layers * self.stored * self.outputs * (self.inputs + self.bias)


def attention_of(
    get: Get, arch: Architecture, num_layers: int, num_kv_layers: int, hidden: int, q_width: int, kv_width: int
) -> list[Matrix]:
    """The four projections; `num_kv_layers` of the layers have keys and values of their own."""
    qkv_bias, out_bias = arch.flag("qkv_bias", get), arch.flag("out_bias", get)
    return [
        Matrix("q_proj", "attention", hidden, q_width, num_layers, bias=qkv_bias),
        Matrix("k_proj", "attention", hidden, kv_width, num_kv_layers, bias=qkv_bias),
        Matrix("v_proj", "attention", hidden, kv_width, num_kv_layers, bias=qkv_bias),
        Matrix("o_proj", "attention", q_width, hidden, num_layers, bias=out_bias),
    ]


def latent_attention_of(
    get: Get, arch: Architecture, num_layers: int, hidden: int, heads: int, rank: int, head_dim: int
) -> tuple[list[Matrix], int]:
    """Multi-head latent attention: K and V through a narrow matrix, queries perhaps too; and values of its norms."""
    q_rank = first_whole(get, "q_lora_rank") or 0
    rope, nope = first_whole(get, "qk_rope_head_dim") or 0, first_whole(get, "qk_nope_head_dim") or 0
    value_dim = first_whole(get, "v_head_dim") or head_dim
    bias = arch.flag("out_bias", get)
    if q_rank:
        queries = [
            Matrix("q_a_proj", "attention", hidden, q_rank, num_layers, bias=bias),
            Matrix("q_b_proj", "attention", q_rank, heads * head_dim, num_layers),
        ]
    else:
        queries = [Matrix("q_proj", "attention", hidden, heads * head_dim, num_layers)]
    others = [
        Matrix("kv_a_proj", "attention", hidden, rank + rope, num_layers, bias=bias),
        Matrix("kv_b_proj", "attention", rank, heads * (nope + value_dim), num_layers),
        Matrix("o_proj", "attention", heads * value_dim, hidden, num_layers, bias=bias),
    ]
    return [*queries, *others], num_layers * (q_rank + rank)


def mlp_of(get: Get, arch: Architecture, num_layers: int, hidden: int) -> tuple[list[Matrix], int]:
    """The matrices of the dense MLP and of the experts, and the width that one token goes through.

    Raises:
        ConfigError: a needed field is missing, or a token goes through more experts than there are.
    """
    width = whole(get, "intermediate_size", None if arch.gated_mlp else _plain_width(get, hidden))
    num_experts = first_whole(get, "num_local_experts", "num_experts", "n_routed_experts")
    num_sparse = _num_expert_layers(get, num_layers) if num_experts else 0
    found: list[Matrix] = []
    if num_sparse < num_layers:
        found += _mlp_matrices(arch, "mlp", "", hidden, width, num_layers - num_sparse, arch.flag("mlp_bias", get))
    if not num_experts:
        return found, width
    expert_width = first_whole(get, "moe_intermediate_size") or width
    active = first_whole(get, "num_experts_per_tok", "moe_k") or 1
    if active > num_experts:
        raise ConfigError(f"{model_type(get)} sends a token through {active} experts, but has {num_experts}")
    shared = first_whole(get, "shared_expert_intermediate_size") or 0
    if shared:
        found.append(Matrix("shared_expert_gate", "mlp", hidden, 1, num_sparse))
    shared += expert_width * (first_whole(get, "n_shared_experts") or 0)
    if shared:
        found += _mlp_matrices(arch, "mlp", "shared_", hidden, shared, num_sparse, False)
    found.append(Matrix("router", "mlp", hidden, num_experts, num_sparse, bias=arch.expert_bias))
    for one in _mlp_matrices(arch, "experts", "expert_", hidden, expert_width, num_sparse, arch.expert_bias):
        found.append(one._replace(stored=num_experts, active=active))
    return found, shared + expert_width * active


def _mlp_matrices(
    arch: Architecture, part: Part, prefix: str, hidden: int, width: int, layers: int, bias: bool
) -> list[Matrix]:
    names = ("gate_proj", "up_proj") if arch.gated_mlp else ("up_proj",)
    found = [Matrix(prefix + name, part, hidden, width, layers, bias=bias) for name in names]
    return [*found, Matrix(f"{prefix}down_proj", part, width, hidden, layers, bias=bias)]


def _plain_width(get: Get, hidden: int) -> int:
    return (first_whole(get, "expansion_ratio") or 4) * hidden


def _num_expert_layers(get: Get, num_layers: int) -> int:
    """Layers whose MLP is a mixture of experts."""
    kinds = get("mlp_layer_types")
    if isinstance(kinds, (list, tuple)) and len(kinds) == num_layers:
        return sum(kind == "sparse" for kind in kinds)
    dense = first_whole(get, "first_k_dense_replace") or 0
    only = get("mlp_only_layers") or ()
    step = first_whole(get, "decoder_sparse_step", "moe_layer_freq") or 1
    return sum(idx >= dense and idx not in only and (idx + 1) % step == 0 for idx in range(num_layers))


def gemma3n_of(get: Get, num_layers: int, hidden: int) -> tuple[list[Matrix], int, int]:
    """What Gemma 3n has more: alternating updates, a low-rank residual and an embedding per layer.

    Returns:
        Matrices, the values of its vectors, and the values of its embeddings; nothing for any other model.
    """
    per_layer = first_whole(get, "hidden_size_per_layer_input")
    if not per_layer or get("model_type") not in ("gemma3n_text", "gemma3n"):
        return [], 0, 0
    inputs, rank = first_whole(get, "altup_num_inputs") or 1, first_whole(get, "laurel_rank") or 1
    matrices = [
        Matrix("altup_router", "mlp", hidden, inputs, num_layers),
        Matrix("altup_prediction", "mlp", inputs, inputs * inputs, num_layers),
        Matrix("altup_correction", "mlp", inputs, inputs, num_layers),
        Matrix("laurel_left", "mlp", hidden, rank, num_layers),
        Matrix("laurel_right", "mlp", rank, hidden, num_layers),
        Matrix("per_layer_input_gate", "mlp", hidden, per_layer, num_layers),
        Matrix("per_layer_projection", "mlp", per_layer, hidden, num_layers),
        Matrix("per_layer_model_projection", "mlp", hidden, num_layers * per_layer, 1),
        Matrix("altup_projections", "mlp", hidden, hidden, 2 * (inputs - 1)),
    ]
    vectors = num_layers * 4 * hidden + per_layer  # output scale, and three norms
    return matrices, vectors, (first_whole(get, "vocab_size_per_layer_input") or 0) * num_layers * per_layer
