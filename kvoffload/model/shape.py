"""The dimensions of a model that planning needs, from everything that is known of it. Torch-free.

Owns the choice where layers differ. Does not own the facts (`facts`). The cost model's symbols stand
behind the fields.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvoffload.model.facts import KV, Facts
from kvoffload.model.matrix import Matrix

_ALIBI = ("bloom", "mpt")  # whose bias has heads and rows in one


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The dimensions of a decoder that the cost model needs."""

    num_layers: int  # N: of the decoder
    num_offloaded_layers: int  # L: layers with an unbounded cache
    hidden_size: int  # h: values of an activation
    intermediate_size: int  # width of the MLP that a token meets
    num_heads: int  # of queries
    num_kv_heads: int  # n_kv: heads of K and V
    head_dim: int  # d: values of a head
    vocab_size: int  # outputs of the head
    kv_itemsize_bytes: int  # p_kv: of one value of K or V
    activation_itemsize_bytes: int  # p_x: of one value of an activation
    weight_bytes: int  # of all parameters as they are stored
    layers_weight_bytes: int = 0  # of these, in decoder layers; 0: not known
    mlp_matrices: int = 2  # 3 where the MLP is gated
    dtype: str = ""  # of K and V; "": as their size says
    cached_values: int = 0  # of one token in one layer, where they are not 2 x num_kv_heads x head_dim; else 0
    active_layer_weights: int = 0  # that one token meets in a layer on average; 0: those of the dimensions above
    window_tokens: int = 0  # tokens that a layer with a bounded cache holds, the most of any
    window_row_bytes: int = 0  # K and V of one of these tokens in all layers with a bounded cache together
    held_row_bytes: int = 0  # the same of layers whose cache grows but stays on the device
    matrices: tuple[Matrix, ...] = ()  # of the decoder, in the bits they are stored in; (): those of the dimensions
    is_plain: bool = True  # False: layers cache something beside K and V, or take a bias that has no rows of its own
    is_exact: bool = True  # False: guessed by the keys of a configuration that transformers does not know

    @property
    def kv_dtype(self) -> str:
        """The name of K and V's dtype; bfloat16 where only a size of 2 bytes is known."""
        return self.dtype or {8: "float64", 4: "float32"}.get(self.kv_itemsize_bytes, "bfloat16")

    @property
    def goes_by_rows(self) -> bool:
        """Whether some rows of a batch can pass a layer without the others: all cache K and V of every token alone."""
        return self.is_plain and self.num_layers == self.num_offloaded_layers

    @property
    def kv_head_dim(self) -> int:
        """Of keys and values; 0 where these differ, or are no heads."""
        return 0 if self.cached_values else self.head_dim

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of K and V of one token of one sequence in one layer."""
        values = self.cached_values or 2 * self.num_kv_heads * self.head_dim  # keys and values
        return values * self.kv_itemsize_bytes

    @property
    def activation_row_bytes(self) -> int:
        """Bytes of the activation of one token of one sequence in one layer."""
        return self.hidden_size * self.activation_itemsize_bytes

    def other_layers_bytes(self, rows: int, num_tokens: int) -> int:
        """K and V of `rows` sequences of that length in layers that are not offloaded: a window, or lent to others."""
        in_windows = min(self.window_tokens, num_tokens) * self.window_row_bytes
        return rows * (in_windows + num_tokens * self.held_row_bytes)

    @property
    def recompute_flops(self) -> int:
        """Floating-point operations to recompute K and V of one token of one sequence."""
        return 2 * self.hidden_size * 2 * self.num_kv_heads * self.head_dim  # multiply-add, keys and values

    @property
    def dense_width(self) -> int:
        """Outputs of the matrix whose rate stands for a layer's: the MLP's, or where none is known the projections'."""
        return self.intermediate_size or self.hidden_size

    @property
    def dense_flops(self) -> int:
        """Floating-point operations of the projections and the MLP of one layer for one token."""
        if self.active_layer_weights:
            return 2 * self.active_layer_weights  # multiply-add
        q_and_out = 2 * self.hidden_size * self.num_heads * self.head_dim
        kv = 2 * self.hidden_size * self.num_kv_heads * self.head_dim
        mlp = self.mlp_matrices * self.hidden_size * self.intermediate_size
        return 2 * (q_and_out + kv + mlp)  # multiply-add

    @property
    def layer_weights(self) -> int:
        """Weights of one layer that one token meets on average."""
        return self.dense_flops // 2  # multiply-add

    @property
    def head_weights(self) -> int:
        """Weights of the language model's head."""
        return self.hidden_size * self.vocab_size

    def layer_read_bytes(self, tokens: int) -> float:
        """Bytes of weights, as they are stored, that one layer reads on average in a forward of so many tokens."""
        read = sum(one.read_bytes(tokens) for one in self.matrices if one.part != "head")
        return read / self.num_layers if read else float(self.layer_weights * self.activation_itemsize_bytes)

    @property
    def head_read_bytes(self) -> float:
        """Bytes of the language model's head, as they are stored."""
        read = sum(one.read_bytes(1) for one in self.matrices if one.part == "head")
        return read or float(self.head_weights * self.activation_itemsize_bytes)

    @property
    def layer_bits(self) -> float:
        """Mean bits of a weight of the decoder layers, as they are stored."""
        counts = [(one.num_values, one.bits) for one in self.matrices if one.part != "head"]
        if not counts:
            return 8.0 * self.activation_itemsize_bytes
        return sum(count * bits for count, bits in counts) / sum(count for count, _ in counts)

    def with_layer_bytes(self, share: float) -> ModelShape:
        """The same model with so many times the bytes in the weights of its decoder layers: 0.25 for a quarter."""
        in_layers = round(self.layers_weight_bytes * share)
        matrices = tuple(one if one.part == "head" else one._replace(bits=one.bits * share) for one in self.matrices)
        outside = self.weight_bytes - self.layers_weight_bytes
        return replace(self, weight_bytes=outside + in_layers, layers_weight_bytes=in_layers, matrices=matrices)

    def prefill_flops(self, rows: int, prompt_tokens: int) -> float:
        """Operations for the prompts: projections and MLP, and causal attention (half of all pairs)."""
        attention = self._attention_flops * rows * prompt_tokens * prompt_tokens / 2
        return self.num_layers * (rows * prompt_tokens * self.dense_flops + attention)

    def step_flops(self, rows: int, context_tokens: int) -> float:
        """Operations of one decode step of `rows` sequences with so many tokens in their cache, each."""
        layer = self.dense_flops + self._attention_flops * context_tokens
        return rows * (self.num_layers * layer + 2 * self.head_weights)  # multiply-add

    def step_bytes(self, rows: int, context_tokens: int) -> float:
        """Bytes of device memory that such a step cannot do without: the weights it reads and the cache."""
        weights = self.num_layers * self.layer_read_bytes(rows) + self.head_read_bytes
        cached = rows * self.num_offloaded_layers * context_tokens * self.kv_row_bytes
        return weights + cached + self.other_layers_bytes(rows, context_tokens)

    @property
    def _attention_flops(self) -> int:
        """Operations of all heads of one layer for one pair of a query and a key: scores and values."""
        return 4 * self.num_heads * self.head_dim


def shape_of(facts: Facts) -> ModelShape:
    """That of a model with these facts."""
    own = [layer for layer in facts.layers if layer.cache.is_offloadable]
    caching = own or [layer for layer in facts.layers if layer.cache.kind in ("grows", "window")]
    kv = max((layer.kv for layer in caching if layer.kv), key=lambda one: one.values, default=KV(0, 0, 0))
    heads, head_dim = (kv.num_heads, kv.key_dim) if not facts.latent_width else (facts.num_heads, facts.head_dim)
    others = [layer for layer in facts.layers if not layer.cache.is_offloadable]
    windows = [layer for layer in others if layer.cache.kind == "window"]
    num_layers = max(1, facts.num_layers)
    return ModelShape(
        num_layers=facts.num_layers,
        num_offloaded_layers=facts.num_offloaded_layers,
        hidden_size=facts.hidden_size,
        intermediate_size=facts.active_width,
        num_heads=facts.num_heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        vocab_size=facts.vocab_size,
        kv_itemsize_bytes=facts.itemsize_bytes,
        activation_itemsize_bytes=facts.itemsize_bytes,
        dtype=facts.dtype,
        weight_bytes=facts.weight_bytes,
        layers_weight_bytes=facts.layers_weight_bytes,
        mlp_matrices=facts.mlp_matrices,
        cached_values=0 if kv.values == 2 * heads * head_dim else kv.values,
        active_layer_weights=facts.active_layer_weights // num_layers,
        window_tokens=facts.window_tokens,
        window_row_bytes=sum(layer.cached_values for layer in windows) * facts.itemsize_bytes,
        held_row_bytes=sum(layer.cached_values for layer in others if layer.cache.kind == "grows")
        * facts.itemsize_bytes,
        matrices=facts.matrices,
        is_plain=facts.model_type not in _ALIBI and not any(layer.cache.has_state for layer in facts.layers),
        is_exact=facts.is_exact,
    )
