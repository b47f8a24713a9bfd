"""Everything that is known of a model's size, in plain data that a file can hold.

Owns the numbers and what follows from them alone. Does not own where they come from (`learn`, `guess`, `live`), nor the
part of them that the planner takes (`shape`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kvoffload.model.matrix import Matrix

SCHEMA = 2
# grows    K and V of every token            window  those of the newest `window_tokens`
# state    something of a fixed size alone   shared  reads K and V of an earlier layer, caches nothing
# none     caches nothing and reads nothing
CacheKind = Literal["grows", "window", "state", "shared", "none"]


class CacheTraits(NamedTuple):
    """What one decoder layer caches."""

    kind: CacheKind
    window_tokens: int = 0  # of a layer with a window, also where it reads another's cache; else 0
    has_state: bool = False  # keeps something else beside K and V
    is_lent: bool = False  # later layers read it as well
    is_own_kind: bool = False  # a class that the model brings itself: what else it does is not known

    @property
    def is_offloadable(self) -> bool:
        """Whether K and V grow with every token and belong to this layer alone."""
        return self.kind == "grows" and not self.is_lent and not self.is_own_kind


class KV(NamedTuple):
    """Keys and values of one token in one layer, as they are cached."""

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def values(self) -> int:
        """Numbers, not bytes."""
        return self.num_heads * (self.key_dim + self.value_dim)


class Layer(NamedTuple):
    """One decoder layer: what it caches, and how wide."""

    cache: CacheTraits
    kv: KV | None = None  # what it attends to; None where that is nothing, or not known

    @property
    def cached_values(self) -> int:
        """K and V that one token adds to this layer's own cache."""
        return self.kv.values if self.kv and self.cache.kind in ("grows", "window") else 0


class QuantizedWeights(NamedTuple):
    """What a quantised checkpoint stores instead of its weights."""

    method: str
    is_known: bool  # else weights are counted as not quantised
    num_weights: int = 0  # that are quantised
    num_bytes: int = 0  # of these, with scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything known of a model's size."""

    model_type: str
    class_name: str  # of transformers; "" where it has none
    doubt: str = ""  # why these numbers are a guess; "" where they are the model's own
    num_weights: int  # parameters of the whole model, towers included, tied ones once
    itemsize_bytes: int  # of a weight that is not quantised, of K and V, of activations
    layers: tuple[Layer, ...]
    hidden_size: int
    vocab_size: int
    num_heads: int  # of queries
    head_dim: int  # of queries and of the keys they meet; with latent attention not that of the cache
    value_dim: int  # of a head's values as they are attended to
    latent_width: int = 0  # values cached per token in place of K and V, else 0
    active_width: int  # of the MLP that one token goes through, experts together
    mlp_matrices: int  # 3 where the MLP is gated, else 2
    norms_per_layer: int
    is_tied: bool  # embedding and head are one matrix
    matrices: tuple[Matrix, ...]  # of the decoder; the head, if there is one, is the last
    position_limit: int | None = None  # tokens there are positions for, as the configuration says
    quantized: QuantizedWeights | None = None
    dtype: str = ""  # of a weight that is not quantised, of K and V; "" where only its size is known

    @property
    def is_exact(self) -> bool:
        """Whether these numbers are those of the class that transformers builds."""
        return not self.doubt

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def num_offloaded_layers(self) -> int:
        """Layers whose cache grows and is their own."""
        return sum(layer.cache.is_offloadable for layer in self.layers)

    @property
    def num_attention_layers(self) -> int:
        """Layers that attend to keys and values, also to those of another layer."""
        return sum(layer.cache.kind in ("grows", "window", "shared") for layer in self.layers)

    @property
    def unknown_layers(self) -> int:
        """Layers that compute something else than attention over a cache and an MLP, or beside it."""
        return sum(layer.cache.kind == "state" or layer.cache.has_state for layer in self.layers)

    @property
    def window_tokens(self) -> int:
        """Tokens that a layer with a bounded cache holds, the most of any; 0 where none is bounded."""
        return max((one.cache.window_tokens for one in self.layers if one.cache.kind == "window"), default=0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters as they are stored."""
        quantized = self.quantized or QuantizedWeights("", True)
        return (self.num_weights - quantized.num_weights) * self.itemsize_bytes + quantized.num_bytes

    @property
    def layers_weight_bytes(self) -> int:
        """Of these, bytes of the matrices of the decoder's layers, experts included; norms and biases left out."""
        return min(
            self.weight_bytes, round(sum(one.num_values * one.bits / 8 for one in self.matrices if one.part != "head"))
        )

    @property
    def linear_bits(self) -> float:
        """Mean bits of a weight of the decoder's matrices, which leaves out the head."""
        counts = [(one.num_values, one.bits) for one in self.matrices if one.part != "head"]
        return sum(count * bits for count, bits in counts) / max(1, sum(count for count, _ in counts))

    @property
    def active_layer_weights(self) -> int:
        """Weights that one token is multiplied with in all layers together, without biases."""
        return sum(one.num_values * one.active // one.stored for one in self.matrices if one.part != "head")

    def cached_values(self, num_tokens: int) -> int:
        """Numbers in the whole cache of one sequence of so many tokens."""
        return sum(
            layer.cached_values * min(num_tokens, layer.cache.window_tokens or num_tokens) for layer in self.layers
        )

    def in_dtype(self, itemsize_bytes: int, dtype: str = "") -> Facts:
        """The same model with weights, K/V and activations of so many bytes; what is quantised stays as it is."""
        plain = 8.0 * self.itemsize_bytes
        matrices = tuple(one._replace(bits=8.0 * itemsize_bytes) if one.bits == plain else one for one in self.matrices)
        return dataclasses.replace(self, itemsize_bytes=itemsize_bytes, matrices=matrices, dtype=dtype)

    def in_weight_bits(self, bits: float) -> Facts:
        """The same model with the matrices of its decoder layers in so many bits for each weight, scales included."""
        matrices = tuple(one if one.part == "head" else one._replace(bits=bits) for one in self.matrices)
        num_weights = sum(one.num_values for one in matrices if one.part != "head")
        num_bytes = sum(one.num_values * one.bits / 8 for one in matrices if one.part != "head")
        quantized = QuantizedWeights(f"{bits:g} bits", True, num_weights, round(num_bytes))
        return dataclasses.replace(self, matrices=matrices, quantized=quantized)

    def to_json(self) -> dict[str, Any]:
        """Plain data; layers that are alike in a row are told once."""
        data = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        runs: list[list[Any]] = []
        for layer in self.layers:
            if runs and runs[-1][1] == layer:
                runs[-1][0] += 1
            else:
                runs.append([1, layer])
        layers = [[count, list(one.cache), one.kv and list(one.kv)] for count, one in runs]
        matrices = [list(matrix) for matrix in self.matrices]
        quantized = self.quantized and list(self.quantized)
        return {"schema": SCHEMA} | data | {"layers": layers, "matrices": matrices, "quantized": quantized}

    @classmethod
    def from_json(cls, data: Any) -> Facts:
        """What `to_json` gave, also after it was in a file.

        Raises:
            ValueError: it is something else, or of another schema version; says what.
        """
        try:
            if data["schema"] != SCHEMA:
                raise ValueError(f"its schema is {data['schema']!r}, not {SCHEMA}")
            layers = tuple(
                Layer(CacheTraits(*cache), None if kv is None else KV(*kv))
                for count, cache, kv in data["layers"]
                for _ in range(count)
            )
            others = {name: value for name, value in data.items() if name not in ("schema", "layers", "matrices")}
            quantized = others.pop("quantized")
            return cls(
                layers=layers,
                matrices=tuple(Matrix(*matrix) for matrix in data["matrices"]),
                quantized=None if quantized is None else QuantizedWeights(*quantized),
                **others,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it holds no facts of a model ({type(error).__name__}: {error})") from error
