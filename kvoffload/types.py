"""The shared nouns: what a workload, a model, a machine and a plan are. Torch-free plain data.

Units are in the names; GB = 1e9 bytes, GiB = 2**30 bytes, fractions are 0..1.
Symbols of the cost model (see docs/architecture.md) are given behind each field.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvoffload import datasheet
from kvoffload.errors import ConfigError, ProfileError
from kvoffload.quantities import Curve as Curve  # as: also importable from here
from kvoffload.quantities import Point as Point
from kvoffload.quantities import Provenance as Provenance
from kvoffload.quantities import Quantity as Quantity

Form = Literal["kv", "activation"]
Schedule = Literal["pipelined", "kvpr"]
Objective = Literal["latency", "throughput"]
Constraint = Literal["link", "device", "host", "device_memory", "host_memory"]

PROFILE_SCHEMA_VERSION = 1
LINK_CURVES = (
    *("both", "h2d_pageable", "d2h_pageable", "both_pageable"),
    *("h2d_achieved", "d2h_achieved", "both_achieved"),
)
_CURVES = ("h2d", "d2h", "gemm", "attention")
_LINE_QUANTITIES = ("latency_s", "bytes_per_s", "line_error_fraction")
_ATTRIBUTE_UNITS = {
    "device_copy_bytes_per_s": "bytes/s",
    "device_memory_bytes": "bytes",
    "host_s_per_layer": "s",
    "host_s_per_chunk": "s",
    "gap_s": "s",
}


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
    latent_width: int = 0  # values cached per token in place of K and V (multi-head latent attention), else 0

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of K and V of one token of one sequence in one layer."""
        values = self.latent_width or 2 * self.num_kv_heads * self.head_dim  # keys and values
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
    def dense_flops(self) -> int:
        """Floating-point operations of the projections and the MLP of one layer for one token."""
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
            raise ConfigError("link bandwidth must be above zero: an unpaced link has none, use split='transfer'")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """What a machine and its link can do, measured once. Describes no model.

    `h2d` and `d2h` are None for an unpaced emulated link: it has no bandwidth, and `split="auto"` then transfers. Plans
    are made with the attributes; `curves` holds what else was measured (the names are those below, and
    `host_attention_<dtype>`, x = bytes of K/V in host memory), and `all_quantities` every scalar with its unit, spread
    and provenance.

        both                                       a copy in each direction at once, x = bytes of either
        h2d_pageable, d2h_pageable, both_pageable  the same three from host memory that is not pinned
        h2d_achieved, d2h_achieved, both_achieved  copies over an emulated link, beside the speed it was given
    """

    device_name: str
    link_name: str  # e.g. "PCIe 4.0 x16" or "emulated 0.15 GB/s"
    emulated_link: bool
    key: str  # device, driver and torch version: what makes a stored profile stale
    h2d: Curve | None
    d2h: Curve | None
    gemm: Curve  # x = (m, n, k)
    attention: Curve  # x = bytes of K/V read
    device_copy_bytes_per_s: float  # within device memory; bytes read plus bytes written
    device_memory_bytes: int
    dtype: str = "float32"  # of the GEMM and attention curves
    host_s_per_layer: float = 2e-4
    host_s_per_chunk: float = 1e-4
    gap_s: float = 2e-3  # between the last attention of a step and the first of the next, as seen with transformers
    created: str = ""
    curves: dict[str, Curve] = field(default_factory=dict)
    quantities: dict[str, Quantity] = field(default_factory=dict)  # scalars that no attribute holds, labels of those
    extra: dict[str, Any] = field(default_factory=dict)
    method: int = 1  # of measuring: a stored profile of an earlier one is stale
    schema_version: int = PROFILE_SCHEMA_VERSION

    def gemm_seconds(self, m: int, n: int, k: int) -> float:
        """Duration of a [m, k] x [k, n] product.

        Taken from the measured weight nearest to [k, n] in log size (counting also how far m is beyond its measured
        sizes) and scaled by n * k; over m linear between the measured sizes, constant below them (reading the weight
        takes that long) and at the last rate beyond.
        """
        if not self.gemm.points:
            raise ProfileError(f"profile of {self.device_name} holds no GEMM measurement; measure it again")
        largest: dict[tuple[float, ...], float] = {}
        for point in self.gemm.points:
            largest[point.x[1:]] = max(point.x[0], largest.get(point.x[1:], 0.0))

        def distance(weight: tuple[float, ...]) -> float:
            beyond = max(0.0, math.log(m / largest[weight]))
            return abs(math.log(weight[0] / n)) + abs(math.log(weight[1] / k)) + beyond

        nearest = min(largest, key=lambda weight: (distance(weight), weight))
        rows = sorted((point.x[0], point.seconds) for point in self.gemm.points if point.x[1:] == nearest)
        scale = n * k / (nearest[0] * nearest[1])
        if len(rows) == 1:
            return rows[0][1] * m / rows[0][0] * scale
        curve = Curve(unit="m", points=tuple(Point((size,), seconds, 0.0) for size, seconds in rows))
        return curve.seconds(m) * scale

    def gemm_flops_per_s(self, m: int, n: int, k: int) -> float:
        """Achieved FLOP/s of a [m, k] x [k, n] product."""
        return 2 * m * n * k / self.gemm_seconds(m, n, k)  # multiply-add

    def quantity(self, name: str) -> Quantity:
        """A scalar with its unit, spread and provenance; an attribute without a label, or changed since, is assumed.

        Raises:
            KeyError: there is none of that name.
        """
        unit = _ATTRIBUTE_UNITS.get(name)
        if unit is None:
            return self.quantities[name]
        value = getattr(self, name)
        label = self.quantities.get(name)
        if label is not None and label.value == value:
            return label
        return Quantity(value=value, unit=unit, provenance="assumed")

    def all_quantities(self) -> dict[str, Quantity]:
        """Every scalar by its name: attributes, the lines through the copies of the link, and what else there is."""
        found = {name: self.quantity(name) for name in _ATTRIBUTE_UNITS}
        for name, curve in self.link_curves().items():
            found |= curve.line_quantities(name)
        return found | {name: one for name, one in self.quantities.items() if name not in found}

    def link_curves(self) -> dict[str, Curve]:
        """The copies over the link that were measured or given, by name."""
        curves = {"h2d": self.h2d, "d2h": self.d2h} | {name: self.curves.get(name) for name in LINK_CURVES}
        return {name: curve for name, curve in curves.items() if curve is not None and curve.points}

    def behind(self, link_name: str, h2d: Curve | None, d2h: Curve | None) -> HardwareProfile:
        """The same machine behind another link; what was measured of the old one is dropped."""
        kept = {name: curve for name, curve in self.curves.items() if name not in LINK_CURVES}
        scalars = {name: one for name, one in self.quantities.items() if not name.startswith("h2d_")}  # power
        return dataclasses.replace(self, link_name=link_name, h2d=h2d, d2h=d2h, curves=kept, quantities=scalars)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file, with every scalar labelled under "quantities"."""
        data = dataclasses.asdict(self)
        for name in _CURVES:
            curve = getattr(self, name)
            data[name] = None if curve is None else curve.to_json()
        data["curves"] = {name: curve.to_json() for name, curve in self.curves.items()}
        data["quantities"] = {name: dataclasses.asdict(one) for name, one in self.all_quantities().items()}
        return data

    @classmethod
    def from_json(cls, data: Any, *, source: str = "profile") -> HardwareProfile:
        """Inverse of `to_json`.

        Raises:
            ProfileError: not a profile, or of another schema version; names `source`.
        """
        if not isinstance(data, dict) or "schema_version" not in data:
            raise ProfileError(f"{source} is not a kvoffload hardware profile; create one with `kvoffload profile`")
        if data["schema_version"] != PROFILE_SCHEMA_VERSION:
            raise ProfileError(
                f"{source} has schema version {data['schema_version']!r}, this release reads "
                f"{PROFILE_SCHEMA_VERSION}; measure again with `kvoffload profile`"
            )
        try:
            values = dict(data)
            for name in _CURVES:
                values[name] = None if values[name] is None else Curve.from_json(values[name])
            values["curves"] = {name: Curve.from_json(curve) for name, curve in values.get("curves", {}).items()}
            labels = values.pop("quantities", None)
            if labels is None:
                values["extra"], labels = _labels_before_quantities(values)
            profile = cls(**values)
            derived = {f"{name}_{end}" for name in ("h2d", "d2h", *LINK_CURVES) for end in _LINE_QUANTITIES}
            for name, label in labels.items():
                quantity = Quantity.from_json(label)
                if name not in derived and not (name in _ATTRIBUTE_UNITS and quantity == profile.quantity(name)):
                    profile.quantities[name] = quantity
            return profile
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ProfileError(
                f"{source} is damaged ({type(error).__name__}: {error}); measure again with `kvoffload profile`"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, creating the folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HardwareProfile:
        """Read a profile written by `save`.

        Raises:
            ProfileError: missing, unreadable, damaged or of another schema version; names the file.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ProfileError(
                f"cannot read the hardware profile {path}: {error}; measure again with `kvoffload profile`"
            ) from error
        return cls.from_json(data, source=str(path))

    @classmethod
    def preset(cls, name: str) -> HardwareProfile:
        """A profile from datasheet figures, e.g. "a100-40gb-pcie4".

        Raises:
            ProfileError: unknown name; lists the near and the known ones.
        """
        return cls.from_json(datasheet.profile_data(datasheet.preset(name)), source=f"preset {name}")


def _labels_before_quantities(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`extra` and the labels of a file from before "quantities", which kept them in `extra`."""
    extra = dict(data.get("extra", {}))
    provenance, spread = extra.pop("provenance", {}), extra.pop("spread_fraction", {})
    labels = {
        name: {
            "value": data[name],
            "unit": _ATTRIBUTE_UNITS[name],
            "spread_fraction": spread.get(name),
            "provenance": provenance[name],
        }
        for name in provenance
        if name in _ATTRIBUTE_UNITS and name in data
    }
    return extra, labels
