"""Which operations one forward of a decoder consists of, and what each computes and moves.

Owns the counting: floating-point operations and bytes of every operation, by what is moved (weights, activations, K and
V). Does not own how long they take (`roofline`) nor the facts of a model (`facts`). Torch-free.

Two conventions of attention:

    fused     one operation that reads queries, keys and values once and writes its output; a prompt attends causally
    unfused   scores, softmax and values one after another through memory, a prompt attends to all of itself; what the
              LLM-Viewer tool counts (hahnyuan/LLM-Viewer, 2024)

Norms count 7 operations per value, softmax 5, the activation of the MLP 2 and a residual 1; rotary embeddings and the
lookup of embeddings are left out, as there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kvoffload.errors import ConfigError
from kvoffload.machine.fit import OperationClass
from kvoffload.model.facts import KV, Facts
from kvoffload.model.matrix import Matrix

AttentionConvention = Literal["fused", "unfused"]
CONVENTIONS = ("fused", "unfused")
NORM_FLOPS, SOFTMAX_FLOPS, ACTIVATION_FLOPS = 7, 5, 2  # per value


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bits per value. Fractions are allowed, such as 4.5 for groups of 32 with a scale of 16 bits.

    `weight_bits` is None for weights as the model stores them, which quantised ones do in several widths.
    """

    weight_bits: float | None = 16
    activation_bits: float = 16
    kv_bits: float = 16

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "kv_bits"):
            value = getattr(self, name)
            if value is None and name == "weight_bits":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= 64:
                raise ConfigError(f"{name} must be a number of bits from 1 to 64, e.g. 16, 8 or 4, got {value!r}")

    def bits_of(self, matrix: Matrix) -> float:
        """Width of its weights."""
        return matrix.bits if self.weight_bits is None else self.weight_bits

    @property
    def attention_bits(self) -> float:
        """Width that attention is computed in."""
        return max(self.activation_bits, self.kv_bits)


class Operation(NamedTuple):
    """One operation of `layers` layers; all other numbers are those of one layer."""

    name: str
    kind: OperationClass
    layers: int
    flops: float
    bits: float  # of the wider operand
    weight_bytes: float
    read_bytes: float  # activations
    written_bytes: float
    kv_read_bytes: float = 0.0
    kv_written_bytes: float = 0.0

    @property
    def memory_bytes(self) -> float:
        """Everything that is read and written."""
        return self.weight_bytes + self.read_bytes + self.written_bytes + self.kv_read_bytes + self.kv_written_bytes


def forward(
    dims: Facts,
    precision: Precision,
    *,
    batch: int,
    queries: int,
    context: int,
    convention: AttentionConvention = "fused",
) -> list[Operation]:
    """The operations of one forward.

    Args:
        dims: the model.
        precision: bits of weights, activations and cache.
        batch: sequences.
        queries: tokens of each that go through: the prompt's, or 1 when decoding.
        context: tokens of each that are attended to, the new ones included.
        convention: how attention is counted.
    """
    tokens = batch * queries
    found = [
        _product(dims, matrix, precision, tokens)
        for matrix in dims.matrices
        if matrix.part != "head" and not matrix.expands
    ]
    found += attending(dims, precision, batch=batch, queries=queries, context=context, convention=convention)
    found += _passes(dims, precision, tokens)
    heads = [matrix for matrix in dims.matrices if matrix.part == "head"]
    found += [_product(dims, matrix, precision, batch) for matrix in heads]  # only the last token of each sequence
    return found


def attending(
    dims: Facts,
    precision: Precision,
    *,
    batch: int,
    queries: int,
    context: int,
    convention: AttentionConvention = "fused",
) -> list[Operation]:
    """Those operations of `forward` that depend on the context."""
    found = []
    for matrix in dims.matrices:
        if matrix.expands:  # latent attention: every cached token is expanded again
            expanded = _product(dims, matrix, precision, batch * context)
            latent_bytes = batch * context * dims.latent_width * precision.kv_bits / 8
            found.append(expanded._replace(read_bytes=0.0, kv_read_bytes=latent_bytes))
    kinds = Counter((one.cache.window_tokens, one.kv) for one in dims.layers if one.kv is not None)
    for (window, kv), layers in sorted(kinds.items()):
        suffix = " (window)" if window else ""
        if sum(bool(other) == bool(window) for other, _ in kinds) > 1:
            suffix = f" ({f'window {window}, ' if window else ''}{kv.num_heads}x{kv.key_dim})"
        attended = min(context, window or context)
        found += _attention(dims, kv, precision, suffix, layers, batch, queries, attended, convention)
    return found


def _product(dims: Facts, matrix: Matrix, precision: Precision, tokens: int) -> Operation:
    """One weight matrix with the activations of all tokens."""
    activation_bytes, weight_bits = precision.activation_bits / 8, precision.bits_of(matrix)
    rows = tokens * matrix.active
    return Operation(
        name=matrix.name,
        kind="gemm",
        layers=matrix.layers,
        flops=2.0 * rows * matrix.inputs * matrix.outputs,  # multiply-add
        bits=max(weight_bits, precision.activation_bits),  # that of the wider operand
        weight_bytes=matrix._replace(bits=weight_bits).read_bytes(tokens) / matrix.layers,
        read_bytes=rows * matrix.inputs * activation_bytes,
        written_bytes=rows * (matrix.outputs - matrix.cached) * activation_bytes,
        kv_written_bytes=rows * matrix.cached * precision.kv_bits / 8,
    )


def _attention(
    dims: Facts,
    kv: KV,
    precision: Precision,
    suffix: str,
    layers: int,
    batch: int,
    queries: int,
    attended: int,
    convention: AttentionConvention,
) -> list[Operation]:
    """Scores, softmax and values of the layers that attend to `attended` tokens at most."""
    activation_bytes, bits = precision.activation_bits / 8, precision.attention_bits
    rows = batch * dims.num_heads  # of scores, per query
    key_dim, value_dim = (dims.head_dim, dims.value_dim) if dims.latent_width else (kv.key_dim, kv.value_dim)
    query_bytes = rows * queries * key_dim * activation_bytes
    output_bytes = rows * queries * value_dim * activation_bytes
    if dims.latent_width:  # keys and values were expanded, they are activations
        each_bytes = rows * attended * activation_bytes
        key_bytes, value_bytes = each_bytes * key_dim, each_bytes * value_dim
        cached = False
    else:
        each_bytes = batch * attended * kv.num_heads * precision.kv_bits / 8
        key_bytes, value_bytes = each_bytes * key_dim, each_bytes * value_dim
        cached = True

    def one(name: str, kind: OperationClass, flops: float, read: float, written: float, kv: float) -> Operation:
        return Operation(
            name + suffix,
            kind,
            layers,
            flops,
            bits,
            0.0,
            read + (0.0 if cached else kv),
            written,
            kv if cached else 0.0,
        )

    if convention == "unfused":
        pairs = float(rows) * queries * attended
        scores_bytes = pairs * activation_bytes
        return [
            one("qk_matmul", "gemm", 2 * pairs * key_dim, query_bytes, scores_bytes, key_bytes),
            one("softmax", "softmax", SOFTMAX_FLOPS * pairs, scores_bytes, scores_bytes, 0.0),
            one("sv_matmul", "gemm", 2 * pairs * value_dim, scores_bytes, output_bytes, value_bytes),
        ]
    pairs = float(rows) * _causal_pairs(queries, attended)
    flops = pairs * (2 * key_dim + 2 * value_dim + SOFTMAX_FLOPS)
    return [one("attention", "attention", flops, query_bytes, output_bytes, key_bytes + value_bytes)]


def _causal_pairs(queries: int, attended: int) -> float:
    """Pairs of a query and a key at or before it, for the last `queries` tokens; at most `attended` keys each."""
    if queries == 1:
        return attended
    growing = min(queries, attended)  # a prompt: query i attends to i + 1 keys until the window is full
    return growing * (growing + 1) / 2 + (queries - growing) * attended


def _passes(dims: Facts, precision: Precision, tokens: int) -> list[Operation]:
    """Norms, residuals and the activation of the MLP."""
    bits = precision.activation_bits
    hidden_bytes, width_bytes = (tokens * width * bits / 8 for width in (dims.hidden_size, dims.active_width))
    inputs = dims.mlp_matrices - 1  # gate and up, or up alone
    layers = dims.num_layers
    hidden_values, width_values = float(tokens * dims.hidden_size), float(tokens * dims.active_width)
    found = [
        Operation(
            "mlp_act",
            "elementwise",
            layers,
            ACTIVATION_FLOPS * width_values,
            bits,
            0.0,
            inputs * width_bytes,
            width_bytes,
        )
    ]
    if dims.norms_per_layer:
        norms = dims.norms_per_layer
        found.append(
            Operation("norm", "norm", layers * norms, NORM_FLOPS * hidden_values, bits, 0.0, hidden_bytes, hidden_bytes)
        )
    found.append(Operation("add", "elementwise", 2 * layers, hidden_values, bits, 0.0, 2 * hidden_bytes, hidden_bytes))
    return found
