"""What a machine and its link can do: the profile that plans are made with. Torch-free plain data.

Owns the curves and scalars of a machine by name, the duration of a matrix product between measured shapes, and the file
of a profile. Does not own single numbers (`quantities`), presets (`datasheet`), measuring, nor where profiles are kept
(`profiler/`). It describes no model: `rates` makes the rates of one from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvoffload.errors import ProfileError
from kvoffload.machine import datasheet
from kvoffload.machine.quantities import Curve, Point, Quantity

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
class HardwareProfile:
    """What a machine and its link can do, measured once. Describes no model.

    `h2d` and `d2h` are None for an unpaced emulated link: it has no bandwidth, and `split="auto"` then transfers. Plans
    are made with the attributes; `curves` holds what else was measured (the names are those below, and
    `host_attention_<dtype>`, x = bytes of K/V in host memory), and `all_quantities` every scalar with its unit, spread
    and provenance. Of a GPU's host the time per chunk is that of chunks of both forms in turn, and
    `host_s_per_activation_chunk` and `host_s_per_kv_chunk` that of either.

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

    def host_s_per_chunk_of(self, form: str) -> float:
        """Host seconds to issue a chunk of a form; of any chunk, where the forms were not timed apart."""
        found = self.quantities.get(f"host_s_per_{form}_chunk")
        return self.host_s_per_chunk if found is None else found.value

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
