"""The dimensions of a decoder, read from its Hugging Face configuration: a config object, or a plain `config.json`.

Owns the defaults a bare file leaves out, and the count of every weight: exact to the byte for the model types of
`architectures`, about right for others and for quantised weights. Does not own the list of matrices (`matrices`) nor in
which way layers attend (`layer_types`). Does not load models, does not import transformers or torch.

Where a field is looked for: the text configuration of a multimodal model, else the configuration itself; each of its
names in order (`model_config`); then a default of the architecture; then a ConfigError that names the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvoffload.architectures import ARCHITECTURES, Architecture, architecture_of
from kvoffload.errors import ConfigError, UnsupportedModelError
from kvoffload.layer_types import count_layers, window_tokens
from kvoffload.matrices import Matrix, attention_of, gemma3n_of, latent_attention_of, mlp_of
from kvoffload.model_config import Get, first_whole, itemsize_bytes, model_type, reader, whole
from kvoffload.quantization import Quantization, quantization_of
from kvoffload.types import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """Everything a configuration says about the size of a decoder."""

    model_type: str
    num_layers: int
    num_full_layers: int  # whose cache is their own and grows with every token
    num_lending_layers: int  # whose growing cache other layers read as well, so that it stays resident
    num_windowed_layers: int  # whose cache is bounded by `window_tokens`
    num_full_attention_layers: int  # that attend to every token, also to those in another layer's cache
    num_windowed_attention_layers: int
    num_sharing_layers: int  # that read the cache of an earlier layer
    window_tokens: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int  # of a head's values; the same as head_dim but for multi-head latent attention
    latent_width: int  # values cached per token in place of K and V, else 0
    vocab_size: int
    active_width: int  # of the MLP one token goes through
    mlp_matrices: int
    norms_per_layer: int
    is_tied: bool
    itemsize_bytes: int
    matrices: tuple[Matrix, ...]
    embedding_weights: int  # rows of which are read by token number
    vector_weights: int  # norms and the like
    is_exact: bool  # a model type that `architectures` knows
    quantization: Quantization | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters as they are stored."""
        own_bits = 8 * self.itemsize_bytes
        saved_bits = sum(
            matrix.layers * matrix.stored * matrix.inputs * matrix.outputs * (own_bits - matrix.bits)
            for matrix in self.matrices
        )
        return self.num_weights * self.itemsize_bytes - round(saved_bits / 8)

    @property
    def linear_bits(self) -> float:
        """Mean bits of a weight of the linear layers, which leaves out the head."""
        counts = [(one.layers * one.stored * one.inputs * one.outputs, one.bits) for one in self.matrices[:-1]]
        return sum(count * bits for count, bits in counts) / max(1, sum(count for count, _ in counts))

    @property
    def num_weights(self) -> int:
        """All parameters."""
        head = self.matrices[-1]
        counted = sum(matrix.num_weights for matrix in self.matrices)
        if self.is_tied:  # the head's matrix is the embedding's
            counted -= head.inputs * head.outputs
        return counted + self.embedding_weights + self.vector_weights

    @property
    def num_active_weights(self) -> int:
        """Parameters that one token is multiplied with."""
        return sum(matrix.num_weights * matrix.active // matrix.stored for matrix in self.matrices)

    @property
    def cached_values_per_token(self) -> int:
        """Values of K and V of one token in one layer."""
        return self.latent_width or 2 * self.num_kv_heads * self.head_dim  # keys and values


def shape_from_config(config: Any, dtype: Any = None) -> ModelShape:
    """The shape of the decoder that `config` describes.

    Args:
        config: a transformers configuration object, the dict of a `config.json`, or a path to such a file or to the
            folder it is in.
        dtype: of weights, K/V and activations: a torch dtype or its name; by default what the configuration says, else
            float32.

    Raises:
        ConfigError: a needed field is missing or no whole number of at least 1 (names it), or the dtype is unknown.
        UnsupportedModelError: an encoder-decoder or attention-free model.
    """
    dims = dimensions_from_config(config, dtype)
    return ModelShape(
        num_layers=dims.num_layers,
        num_offloaded_layers=dims.num_full_layers,
        hidden_size=dims.hidden_size,
        intermediate_size=dims.active_width,
        num_heads=dims.num_heads,
        num_kv_heads=dims.num_kv_heads,
        head_dim=dims.head_dim,
        vocab_size=dims.vocab_size,
        kv_itemsize_bytes=dims.itemsize_bytes,
        activation_itemsize_bytes=dims.itemsize_bytes,
        weight_bytes=dims.weight_bytes,
        mlp_matrices=dims.mlp_matrices,
        latent_width=dims.latent_width,
    )


def dimensions_from_config(config: Any, dtype: Any = None) -> Dimensions:
    """All dimensions; arguments and errors as of `shape_from_config`."""
    get = reader(config)
    if get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{model_type(get)} is an encoder-decoder model; only decoders can be offloaded")
    arch = architecture_of(get("model_type"))
    num_layers, hidden, heads = whole(get, "num_layers"), whole(get, "hidden_size"), whole(get, "num_heads")
    head_dim = whole(get, "head_dim", arch.head_dim or max(1, hidden // heads))
    is_multi_query = get("multi_query") and not get("new_decoder_architecture")
    kv_heads = 1 if is_multi_query else whole(get, "num_kv_heads", heads)
    if hidden % heads and get("head_dim") is None and not arch.head_dim:
        raise ConfigError(
            f"hidden_size {hidden} of {model_type(get)} is no multiple of its {heads} heads: add head_dim"
        )
    if heads % kv_heads:
        raise ConfigError(f"{heads} heads of {model_type(get)} cannot share {kv_heads} key-value heads evenly")
    latent_rank = first_whole(get, "kv_lora_rank") or 0
    value_dim = head_dim
    if latent_rank:
        head_dim = (first_whole(get, "qk_nope_head_dim") or 0) + (first_whole(get, "qk_rope_head_dim") or 0)
        value_dim = first_whole(get, "v_head_dim") or head_dim
    vocab = whole(get, "vocab_size")
    sharing = min(num_layers, first_whole(get, "num_kv_shared_layers") or 0)
    layers = count_layers(get, num_layers, sharing)
    mlp, active_width = mlp_of(get, arch, num_layers, hidden)
    if latent_rank:
        attention, attention_vectors = latent_attention_of(get, arch, num_layers, hidden, heads, latent_rank, head_dim)
    else:
        attention = attention_of(
            get, arch, num_layers, num_layers - sharing, hidden, heads * head_dim, kv_heads * head_dim
        )
        attention_vectors = 0
    embedding_width = first_whole(get, "word_embed_proj_dim") or hidden
    projected = embedding_width != hidden
    head = Matrix("lm_head", "head", embedding_width, vocab, 1, bias=arch.flag("head_bias", get))
    extra, extra_vectors, extra_embeddings = gemma3n_of(get, num_layers, hidden)
    tied = get("tie_word_embeddings")
    itemsize = itemsize_bytes(dtype if dtype is not None else get("dtype") or get("torch_dtype") or "float32")
    positions = 0
    if arch.position_rows is not None:
        positions = (first_whole(get, "max_position_embeddings", "n_positions") or 0) + arch.position_rows
    norms = _norms_per_layer(get, arch)
    vectors = arch.norm_vectors * hidden * (num_layers * norms + _num_final_norms(get, arch) + arch.embedding_norm)
    vectors += num_layers * (heads * arch.sinks + arch.mlp_numbers) + attention_vectors + extra_vectors
    if arch.flag("qk_norm", get):
        q, k = (heads * head_dim, kv_heads * head_dim) if arch.qk_norm_is_wide else (head_dim, head_dim)
        vectors += arch.qk_norm_vectors * (num_layers * q + (num_layers - sharing) * k)
    quantization = quantization_of(get)
    matrices = (
        *attention,
        *mlp,
        *extra,
        *([Matrix("project_in", "mlp", embedding_width, hidden, 1)] if projected else []),
        *([Matrix("project_out", "mlp", hidden, embedding_width, 1)] if projected else []),
        head,
    )
    return Dimensions(
        model_type=model_type(get),
        num_layers=num_layers,
        num_full_layers=layers.full,
        num_lending_layers=layers.lending,
        num_windowed_layers=layers.windowed,
        num_full_attention_layers=layers.full_attention,
        num_windowed_attention_layers=layers.windowed_attention,
        num_sharing_layers=sharing,
        window_tokens=window_tokens(get),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        latent_width=latent_rank + (first_whole(get, "qk_rope_head_dim") or 0) if latent_rank else 0,
        vocab_size=vocab,
        active_width=active_width,
        mlp_matrices=3 if arch.gated_mlp else 2,
        norms_per_layer=norms,
        is_tied=bool(arch.tied if tied is None else tied),
        itemsize_bytes=itemsize,
        matrices=tuple(_stored_as(one, quantization, 8 * itemsize) for one in matrices),
        embedding_weights=vocab * embedding_width + positions * hidden + extra_embeddings,
        vector_weights=vectors,
        is_exact=get("model_type") in ARCHITECTURES,
        quantization=quantization,
    )


def _stored_as(matrix: Matrix, quantization: Quantization | None, plain_bits: float) -> Matrix:
    """A matrix with the bits of its weights."""
    if quantization is not None:
        name, part, inputs, outputs, layers, *_ = matrix
        return matrix._replace(bits=quantization.bits_of(name, part, inputs, outputs, layers, plain_bits))
    return matrix._replace(bits=plain_bits)


def _norms_per_layer(get: Get, arch: Architecture) -> int:
    """Norms as wide as the hidden state, of one layer."""
    kind = get("model_type")
    if kind == "stablelm" and get("use_parallel_residual"):
        return 1
    if kind == "falcon":
        if get("new_decoder_architecture"):
            return first_whole(get, "num_ln_in_parallel_attn") or 2
        return 2 if get("parallel_attn") is False else 1
    if kind == "opt" and get("layer_norm_elementwise_affine") is False:
        return 0
    return arch.norms


def _num_final_norms(get: Get, arch: Architecture) -> int:
    if get("model_type") == "opt" and (get("do_layer_norm_before") is False or get("_remove_final_layer_norm")):
        return 0
    return int(arch.norms > 0)
