"""Measured numbers that say what they are: a scalar, or a duration over a size. Torch-free plain data.

Owns value, unit, spread and provenance, interpolation, and the line through the copies of a link. Does not own what is
measured (`profiler/`) nor what belongs to a machine (`hardware_profile`).
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from kvoffload.errors import ProfileError

Provenance = Literal["measured", "datasheet", "assumed"]

SIZES_BYTES = tuple(2**exponent for exponent in range(12, 27, 2))  # 4 KiB .. 64 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One number."""

    value: float
    unit: str  # e.g. "bytes/s"
    spread_fraction: float | None = None  # (p80 - p20) / p50 of the trials; None where there were none
    provenance: Provenance = "measured"

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Quantity:
        """Inverse of `dataclasses.asdict`; ValueError for what cannot be a quantity."""
        spread = data["spread_fraction"]
        if not math.isfinite(data["value"]) or not (spread is None or spread >= 0):
            raise ValueError(f"{data['value']!r} with spread {spread!r} is no quantity")
        return cls(
            value=data["value"], unit=data["unit"], spread_fraction=spread, provenance=_provenance(data["provenance"])
        )


class Point(NamedTuple):
    """One measured point of a curve."""

    x: tuple[float, ...]  # bytes of a copy; (m, n, k) of a GEMM; bytes of K/V read by attention
    seconds: float
    spread_fraction: float  # (p80 - p20) / p50 of the trials


class Line(NamedTuple):
    """`latency_s + bytes / bytes_per_s`, and how far the worst point lies from it."""

    latency_s: float
    bytes_per_s: float
    error_fraction: float  # of the duration of that point

    def seconds(self, num_bytes: float) -> float:
        """Duration of a copy of that size."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Measured durations over a size, interpolated linearly in between and by the last rate beyond."""

    unit: str  # of x, e.g. "bytes" or "m,n,k"; durations are in seconds
    points: tuple[Point, ...]
    provenance: Provenance = "measured"

    def seconds(self, size: float) -> float:
        """Duration at `size` (same unit as x, one-dimensional curves only)."""
        if not self.points:
            raise ProfileError("a curve without points cannot predict anything; measure the profile again")
        sizes = [point.x[0] for point in self.points]
        idx = bisect.bisect_left(sizes, size)
        if idx == 0:
            return self.points[0].seconds
        if idx == len(sizes):
            last = self.points[-1]
            return last.seconds * size / last.x[0]
        low, high = self.points[idx - 1], self.points[idx]
        share = (size - low.x[0]) / (high.x[0] - low.x[0])
        return low.seconds + share * (high.seconds - low.seconds)

    def rate(self, size: float) -> float:
        """Size per second at `size`."""
        return size / self.seconds(size)

    def line(self) -> Line:
        """Latency and bandwidth with the least sum of squared *relative* errors, so that small copies count as well.

        With u = 1 / t and v = bytes / t that is linear least squares of latency * u + v / bandwidth = 1. A latency
        below zero is taken for none.
        """
        if not self.points:
            raise ProfileError("there is no line through no points; measure the profile again")
        pairs = [(1 / point.seconds, point.x[0] / point.seconds) for point in self.points]
        uu, uv, vv = sum(u * u for u, _ in pairs), sum(u * v for u, v in pairs), sum(v * v for _, v in pairs)
        u_sum, v_sum = sum(u for u, _ in pairs), sum(v for _, v in pairs)
        determinant = uu * vv - uv * uv
        latency_s, s_per_byte = 0.0, v_sum / vv
        if len(pairs) > 1 and determinant > 1e-12 * uu * vv:
            free = (vv * u_sum - uv * v_sum) / determinant, (uu * v_sum - uv * u_sum) / determinant
            if min(free) > 0:
                latency_s, s_per_byte = free
        error = max(abs(latency_s * u + s_per_byte * v - 1) for u, v in pairs)
        return Line(latency_s, 1 / s_per_byte, error)

    def line_quantities(self, name: str) -> dict[str, Quantity]:
        """The line through this curve of copies as quantities, `name` in front of each."""
        line, first, last = self.line(), self.points[0], self.points[-1]
        found = {
            f"{name}_latency_s": (line.latency_s, "s", first.spread_fraction),
            f"{name}_bytes_per_s": (line.bytes_per_s, "bytes/s", last.spread_fraction),
            f"{name}_line_error_fraction": (line.error_fraction, "fraction", None),
        }
        return {
            key: Quantity(value=value, unit=unit, spread_fraction=spread, provenance=self.provenance)
            for key, (value, unit, spread) in found.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data; `columns` says what the numbers of a point are."""
        return dataclasses.asdict(self) | {"columns": [self.unit, "s", "spread_fraction"]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Curve:
        """Inverse of `to_json`; KeyError, TypeError, ValueError or IndexError for what is no curve."""
        points = tuple(Point(tuple(float(v) for v in p[0]), float(p[1]), float(p[2])) for p in data["points"])
        if any(point.seconds <= 0 or not math.isfinite(point.seconds) for point in points):
            raise ValueError("a duration is not positive")
        return cls(unit=data["unit"], points=points, provenance=_provenance(data["provenance"]))


def _provenance(text: str) -> Provenance:
    for known in get_args(Provenance):
        if text == known:
            found: Provenance = known
            return found
    raise ValueError(f"unknown provenance {text!r}")


def given_curve(bytes_per_s: float, latency_s: float) -> Curve:
    """The curve of a link whose speed is a given: `latency_s + bytes / bytes_per_s`."""
    sizes = (*SIZES_BYTES, 2**30)
    points = tuple(Point((float(size),), latency_s + size / bytes_per_s, 0.0) for size in sizes)
    return Curve(unit="bytes", points=points, provenance="assumed")
