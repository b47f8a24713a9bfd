"""The time of any shape from a formula with a few numbers per class of operations, and how far it may be off.

Owns the formula, its numbers and the interval of a prediction. Does not own where the numbers come from (`fitting`),
nor which operations a model consists of. An operation of F floating-point operations that reads R bytes and writes W
takes

    t = max(t_host, o + (x^p + r^p)^(1/p) + w)     x = F / (e_f * peak), r = R * s / (e_b * bw), w = W * s / (e_b * bw)

    o           seconds of a launch, paid once
    e_f, e_b    shares of the peaks that are reached, above 0 and at most 1: nothing is faster than its datasheet
    p           how far computing and reading overlap: 1 not at all, towards infinity completely
    w           stands outside the overlap: a tile of the result is stored when its own products are done
    t_host      what issuing from the host takes, the floor of short operations
    s           rows longer than what the chip holds are fetched again: 1 up to a row of row_fit bytes, 1 + c from
                row_over on, and in between linear in the logarithm of the row

Source: the roofline model (Williams et al. 2009) with a p-norm for its corner; w, t_host, s and the limit on e_f and
e_b are ours, each because shapes left out of a fit were predicted better with it (docs/adr/0009-*.md).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from kvoffload.errors import ProfileError

FIT_SCHEMA_VERSION = 1
OperationClass = Literal["gemm", "attention", "softmax", "norm", "elementwise"]


class Work(NamedTuple):
    """What one operation does, on whatever machine."""

    flops: float
    read_bytes: float
    written_bytes: float
    row_bytes: float = 0.0  # of one row that is reduced (softmax, norms); 0 where there is none


class Prediction(NamedTuple):
    """Seconds, and between which limits a measurement lies with the probability asked for."""

    seconds: float
    low_s: float
    high_s: float


class _Parts(NamedTuple):
    """The formula taken apart: x and r over the longer of them, their overlap, w and s."""

    x_share: float
    r_share: float
    overlapped: float
    w: float
    fetched: float


def gemm_work(m: int, n: int, k: int, *, count: int = 1, itemsize_bytes: float = 2) -> Work:
    """`count` products [m, k] x [k, n] in one launch, each with operands of its own."""
    return Work(
        2.0 * count * m * n * k,  # multiply-add
        count * (m * k + k * n) * itemsize_bytes,
        count * m * n * itemsize_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The formula with the numbers of one class of operations on one machine."""

    overhead_s: float  # o
    flops_per_s: float  # e_f * peak
    bytes_per_s: float  # e_b * bw
    sharpness: float  # p
    host_s: float = 0.0  # t_host
    spill: float = 0.0  # c
    row_fit_bytes: float = 0.0
    row_over_bytes: float = 0.0
    noise_fraction: float = 0.05  # spread of log(measured / formula) over the fitted points
    num_points: int = 0
    free: tuple[str, ...] = ()  # those of the fields above that were fitted
    covariance: tuple[tuple[float, ...], ...] = ()  # of the logarithms of `free`
    schema_version: int = FIT_SCHEMA_VERSION

    def seconds(self, work: Work) -> float:
        """Seconds of `work`."""
        parts = self._parts(work)
        return max(self.host_s, self.overhead_s + parts.overlapped + parts.w)

    def predict(self, work: Work, *, coverage: float = 0.8) -> Prediction:
        """Seconds of `work`, with the limits that hold with probability `coverage`.

        The width counts how far the fitted points lie from the formula, and how well they determine its numbers at
        `work`: it grows where `work` is unlike anything measured. It cannot know of effects the formula lacks.
        """
        if not 0 < coverage < 1:
            raise ProfileError(f"coverage must lie between 0 and 1, got {coverage!r}")
        slopes = self._slopes(work)
        gradient = [slopes[name] for name in self.free]
        rows = zip(gradient, self.covariance, strict=True)
        variance = sum(g * sum(c * h for c, h in zip(row, gradient, strict=True)) for g, row in rows)
        quantile = _student_t(coverage, self.num_points - len(self.free))
        width = math.exp(quantile * math.sqrt(self.noise_fraction**2 + max(0.0, variance)))
        seconds = self.seconds(work)
        return Prediction(seconds, seconds / width, seconds * width)

    def _parts(self, work: Work) -> _Parts:
        fetched = 1.0
        if self.spill and work.row_bytes > self.row_fit_bytes:
            longer = math.log(work.row_bytes / self.row_fit_bytes)
            fetched += self.spill * min(1.0, longer / math.log(self.row_over_bytes / self.row_fit_bytes))
        x = work.flops / self.flops_per_s
        r = work.read_bytes * fetched / self.bytes_per_s
        w = work.written_bytes * fetched / self.bytes_per_s
        bound = max(x, r)
        if not bound:
            return _Parts(0.0, 0.0, 0.0, w, fetched)
        x_share, r_share = x / bound, r / bound
        power = x_share**self.sharpness + r_share**self.sharpness
        return _Parts(x_share, r_share, bound * power ** (1 / self.sharpness), w, fetched)

    def _slopes(self, work: Work) -> dict[str, float]:
        """How the logarithm of the time follows that of every number."""
        p, parts = self.sharpness, self._parts(work)
        total = self.overhead_s + parts.overlapped + parts.w
        if self.host_s > total:
            return dict.fromkeys(self.free, 0.0) | {"host_s": 1.0}
        x_power, r_power = parts.x_share**p, parts.r_share**p
        power = x_power + r_power or 1.0
        computing = parts.overlapped * x_power / power
        moving = parts.overlapped * r_power / power + parts.w
        logs = sum(y * math.log(share) for y, share in ((x_power, parts.x_share), (r_power, parts.r_share)) if y)
        return {
            "overhead_s": self.overhead_s / total,
            "flops_per_s": -computing / total,
            "bytes_per_s": -moving / total,
            "sharpness": parts.overlapped * (logs / power - math.log(power) / p) / total,
            "host_s": 0.0,
            "spill": moving * (parts.fetched - 1) / parts.fetched / total,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any, *, source: str = "the fit") -> Fit:
        """Inverse of `to_json`.

        Raises:
            ProfileError: not a fit, damaged, or of another schema version; names `source`.
        """
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != FIT_SCHEMA_VERSION:
            raise ProfileError(
                f"{source} has schema version {version!r}, this release reads {FIT_SCHEMA_VERSION}: fit it again"
            )
        try:
            values = dict(data)
            values["free"] = tuple(str(name) for name in values["free"])
            values["covariance"] = tuple(tuple(float(value) for value in row) for row in values["covariance"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"{source} is damaged ({type(error).__name__}: {error}): fit it again") from error


@lru_cache(maxsize=256)
def _student_t(coverage: float, degrees: int) -> float:
    """Quantile of Student's t on both sides."""
    from scipy.special import stdtrit  # half a second, which machines without a fit do without

    return float(stdtrit(max(2, degrees), (1 + coverage) / 2))
