"""The shared nouns: what a workload, a model, its rates on a machine and a plan are. Torch-free plain data.

Does not own what a machine can do (`hardware_profile`) nor measured numbers (`quantities`), which have names here too.
Units are in the names; GB = 1e9 bytes, GiB = 2**30 bytes, fractions are 0..1.
Symbols of the cost model (see docs/architecture.md) are given behind each field.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from kvoffload.errors import ConfigError
from kvoffload.machine.hardware_profile import HardwareProfile as HardwareProfile  # as: also importable from here
from kvoffload.machine.quantities import Curve as Curve
from kvoffload.machine.quantities import Point as Point
from kvoffload.machine.quantities import Provenance as Provenance
from kvoffload.machine.quantities import Quantity as Quantity

Form = Literal["kv", "activation"]
Schedule = Literal["pipelined", "kvpr"]
Objective = Literal["latency", "throughput"]
Constraint = Literal["link", "device", "host", "device_memory", "host_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one `generate()` call is asked to do."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens", "new_tokens", "num_beams"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"Workload.{name} must be a whole number of at least 1, got {value!r}")

    @property
    def rows(self) -> int:
        """Sequences decoded at once, beams included."""
        return self.batch * self.num_beams

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache when the last token is sampled (which is never fed back)."""
        return self.prompt_tokens + self.new_tokens - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The dimensions of a decoder that the cost model needs."""

    num_layers: int  # N
    num_offloaded_layers: int  # L: layers with an unbounded cache
    hidden_size: int  # h
    intermediate_size: int
    num_heads: int
    num_kv_heads: int  # n_kv
    head_dim: int  # d
    vocab_size: int
    kv_itemsize_bytes: int  # p_kv
    activation_itemsize_bytes: int  # p_x
    weight_bytes: int
    mlp_matrices: int = 2  # 3 where the MLP is gated
    cached_values: int = 0  # of one token in one layer, where they are not 2 x num_kv_heads x head_dim; else 0
    active_layer_weights: int = 0  # that one token meets in a layer on average; 0: those of the dimensions above
    window_tokens: int = 0  # tokens that a layer with a bounded cache holds, the most of any
    window_row_bytes: int = 0  # K and V of one of these tokens in all layers with a bounded cache together
    held_row_bytes: int = 0  # the same of layers whose cache grows but stays on the device
    is_exact: bool = True  # False: guessed by the keys of a configuration that transformers does not know

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of K and V of one token of one sequence in one layer."""
        values = self.cached_values or 2 * self.num_kv_heads * self.head_dim  # keys and values
        return values * self.kv_itemsize_bytes

    @property
    def activation_row_bytes(self) -> int:
        """Bytes of the activation of one token of one sequence in one layer."""
        return self.hidden_size * self.activation_itemsize_bytes

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machine does with one layer of one model at one batch: the coefficients of the cost model.

    "Token" means one position of the whole batch.
    """

    h2d_activation_bytes_per_s: float  # B_x, at the activation chunk's size
    h2d_kv_bytes_per_s: float  # B_kv, at the kv chunk's size
    recompute_s_per_token: float  # gamma_r, at the chunk's GEMM shape
    attention_s_per_token: float  # gamma_a
    dense_s: float  # t_dense: the rest of one layer
    head_s: float = 0.0  # t_head: final norm, LM head and sampling on the device
    gap_s: float = 0.0  # t_gap: host time between the last attention of a step and the first of the next
    host_s_per_layer: float = 0.0  # o_layer
    host_s_per_chunk: float = 0.0  # o_chunk

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if not value >= 0 or math.isinf(value):
                raise ConfigError(f"Rates.{spec.name} must be finite and not negative, got {value!r}")
        if self.h2d_activation_bytes_per_s <= 0 or self.h2d_kv_bytes_per_s <= 0:
            raise ConfigError("link bandwidth must be above zero: an unpaced link has none")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """One instance of the planning problem. All token counts are in blocks of `block_tokens`."""

    num_layers: int  # N
    num_offloaded_layers: int  # L
    num_blocks: int  # s: cached blocks to place (the tail is not among them)
    block_tokens: int
    kv_bytes_per_token: int  # beta_kv, whole batch, one layer
    activation_bytes_per_token: int  # beta_x, whole batch, one layer; with the position embeddings that blocks carry
    rates: Rates
    chunk_blocks: int
    num_slots: int
    device_bytes: int  # cap on everything held on the device
    fixed_device_bytes: int  # tail + ring + D2H ring + layer buffers + sliding layers
    host_bytes: int  # cap on host memory for the cache
    stored_activation_blocks: int = 0  # x >= x_stored when re-planning
    stored_kv_blocks: int = 0  # t >= t_stored when re-planning
    stored_resident_blocks: int = 0  # r >= r_stored when re-planning
    stored_resident_activation_blocks: int = 0
    split: float | None = None  # None: free; else x is this share of x + t (rounded to a block), and r_x = 0
    schedule: Schedule = "pipelined"
    weight_bytes_per_step: int = 0  # streamed weights, over the same link
    num_micro_batches: int = 1
    objective: Objective = "latency"
    is_segmented: bool = False  # attention takes chunks one by one, so kv chunks use the ring as well

    @property
    def ring_bytes(self) -> int:
        """Bytes of K/V or activation that can be on the device before they are needed."""
        token_bytes = self.activation_bytes_per_token
        if self.is_segmented:  # slots have room for either form
            token_bytes = max(token_bytes, self.kv_bytes_per_token)
        return self.num_slots * self.chunk_blocks * self.block_tokens * token_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where the cached blocks of every offloaded layer live, and what the cost model expects of it."""

    num_layers: int
    num_offloaded_layers: int
    block_tokens: int
    chunk_blocks: int
    num_slots: int
    resident_kv_blocks: int  # r
    resident_activation_blocks: int  # r_x
    kv_blocks: int  # t: transferred
    activation_blocks: int  # x: transferred as activations and recomputed
    kv_bytes_per_token: int
    activation_bytes_per_token: int
    predicted_step_s: float
    full_transfer_step_s: float  # the same model's prediction with x = r_x = 0
    binding_constraint: Constraint
    schedule: Schedule = "pipelined"
    weight_bytes_per_step: int = 0
    num_micro_batches: int = 1
    objective: Objective = "latency"
    is_segmented: bool = False
    device_bytes: int = 0  # predicted use
    host_bytes: int = 0  # predicted use
    recommendation: str = ""  # what a person should do, with the reason; empty inside the runtime
    version: int = 0

    @property
    def num_blocks(self) -> int:
        """All cached blocks of one layer."""
        return self.resident_kv_blocks + self.resident_activation_blocks + self.kv_blocks + self.activation_blocks

    @property
    def split_fraction(self) -> float:
        """Share of the offloaded blocks stored as activations, 0..1."""
        offloaded = self.kv_blocks + self.activation_blocks
        return self.activation_blocks / offloaded if offloaded else 0.0

    @property
    def link_bytes_per_step(self) -> int:
        """Bytes from host to device in one decode step."""
        per_layer = self.block_tokens * (
            self.activation_blocks * self.activation_bytes_per_token + self.kv_blocks * self.kv_bytes_per_token
        )
        return self.num_offloaded_layers * per_layer + self.weight_bytes_per_step

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the derived values included."""
        data = dataclasses.asdict(self)
        data["split_fraction"] = self.split_fraction
        data["link_bytes_per_step"] = self.link_bytes_per_step
        return data
