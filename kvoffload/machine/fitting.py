"""The numbers of the formula in `fit`, found from a handful of timed operations.

Owns which of the timed operations are used, the least squares, the priors and the choice of how many numbers a class
gets. Does not own the formula (`fit`) nor measuring (`compute`).

What makes it valid: the squared error is that of the logarithm of the time, so that a microsecond and a second count
alike; shares of the peaks cannot exceed 1; weak priors decide only what the points leave open (e_f of an operation that
computes nothing, e_b where every point is bound by computing); further numbers are kept only where the points pay for
them (Bayes' information criterion).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from kvoffload.errors import ProfileError
from kvoffload.machine.dtypes import ITEMSIZE_BYTES
from kvoffload.machine.fit import Fit, OperationClass, Work, gemm_work
from kvoffload.machine.hardware_profile import HardwareProfile

_Array = npt.NDArray[np.float64]

MIN_POINTS = 3
MAX_SHAPES = 10  # of a profile's many, used for a fit
UNKNOWN_PEAK_FRACTION = 0.8  # what the best measured rate is taken for where no datasheet is known
NOISE_FRACTION = 0.05  # spread of log(measured / formula) that the priors are weighed against
MIN_NOISE_FRACTION = 0.01  # the trials of one point are no closer together
# Typical value and spread of every parameter, both of its logarithm; a share of a peak is 1 / (1 + excess).
_PRIORS = {
    "overhead_s": (math.log(1e-5), 2.0),  # a launch: one microsecond to a few hundred
    "flops_excess": (math.log(0.25), 1.0),  # 0.8 of the peak; two devices of three between 0.6 and 0.92
    "bytes_excess": (math.log(0.25), 1.0),
    "sharpness_excess": (0.0, 1.0),  # p - 1
    "host_s": (math.log(2e-5), 2.0),
    "spill": (0.0, 1.0),
}
_FIELDS = {"flops_excess": "flops_per_s", "bytes_excess": "bytes_per_s", "sharpness_excess": "sharpness"}
_SHARES = ("flops_excess", "bytes_excess")  # a larger excess is a smaller rate
_ALWAYS = ("overhead_s", "flops_excess", "bytes_excess", "sharpness_excess")


class Observation(NamedTuple):
    """One timed operation."""

    work: Work
    seconds: float


class _Points(NamedTuple):
    """The observations in units of time at the peaks."""

    flops_s: _Array
    read_s: _Array
    written_s: _Array
    seconds: _Array
    ramp: _Array  # 0..1: how much of a row no longer fits


class _Solution(NamedTuple):
    names: tuple[str, ...]
    parameters: _Array  # logarithms, in the order of `names`
    rows: tuple[float, float]  # the longest that fits and the shortest that does not
    jacobian: _Array  # of the weighted residuals, priors included
    error: float  # sum of squares of log(measured / formula)
    criterion: float  # the less the better


def choose_points(points: Sequence[Observation], ridge: float, limit: int = MAX_SHAPES) -> list[Observation]:
    """At most `limit` of many timed operations: half from each side of the `ridge` (FLOP per byte) where there are.

    On each side those whose logarithms of FLOPs and bytes lie furthest from the ones already taken, beginning with the
    smallest and the largest.
    """
    sides: list[list[Observation]] = [[], []]
    for point in points:
        sides[point.work.flops > ridge * (point.work.read_bytes + point.work.written_bytes)].append(point)
    halves = [min(len(side), limit // 2) for side in sides]
    for one in (0, 1):
        halves[one] = min(len(sides[one]), limit - halves[1 - one])
    return [point for side, count in zip(sides, halves, strict=True) for point in _spread(side, count)]


def fit(observations: Iterable[Observation], *, peak_flops_per_s: float, peak_bytes_per_s: float) -> Fit:
    """The formula for one class of operations.

    Args:
        observations: at least three timed operations of one class, better ten.
        peak_flops_per_s: of the device, at the dtype of the operations.
        peak_bytes_per_s: of its memory.

    Raises:
        ProfileError: too few observations, one without a positive duration, or a peak that is not above zero.
    """
    points = list(observations)
    if len(points) < MIN_POINTS:
        raise ProfileError(f"a fit needs {MIN_POINTS} timed operations or more, got {len(points)}: time more shapes")
    wrong = [point.seconds for point in points if not (math.isfinite(point.seconds) and point.seconds > 0)]
    if wrong:
        raise ProfileError(f"an operation is said to have taken {wrong[0]!r} s: measure the profile again")
    for name, peak in (("FLOP/s", peak_flops_per_s), ("bytes/s", peak_bytes_per_s)):
        if not (math.isfinite(peak) and peak > 0):
            raise ProfileError(f"a peak must be above zero, got {peak!r} {name}")
    columns = np.array([point.work for point in points], dtype=float).T
    seconds = np.array([point.seconds for point in points])
    at_peak = _Points(
        columns[0] / peak_flops_per_s,
        columns[1] / peak_bytes_per_s,
        columns[2] / peak_bytes_per_s,
        seconds,
        0 * seconds,
    )
    best = min((_solve(at_peak, names) for names in (_ALWAYS, (*_ALWAYS, "host_s"))), key=lambda one: one.criterion)
    names = (*best.names, "spill")
    for rows in pairwise(sorted({float(row) for row in columns[3] if row > 0})):
        ramp = np.interp(np.log(np.maximum(columns[3], rows[0])), np.log(rows), (0.0, 1.0))
        best = min(best, _solve(at_peak._replace(ramp=ramp), names, rows), key=lambda one: one.criterion)
    return _as_fit(best, len(points), peak_flops_per_s, peak_bytes_per_s)


def fit_profile(profile: HardwareProfile) -> dict[OperationClass, Fit]:
    """The formula for matrix products and for attention, from at most ten measured points each.

    Peaks are the datasheet's where the profile knows them, else the best measured rate is taken for 0.8 of the peak.

    Raises:
        ProfileError: the profile holds too few points.
    """
    itemsize = ITEMSIZE_BYTES.get(profile.dtype, 2)
    products = [
        Observation(gemm_work(*(int(size) for size in point.x), itemsize_bytes=itemsize), point.seconds)
        for point in profile.gemm.points
    ]
    attended = [Observation(Work(0.0, point.x[0], 0.0), point.seconds) for point in profile.attention.points]
    if len(products) < MIN_POINTS or len(attended) < MIN_POINTS:
        raise ProfileError(
            f"the profile of {profile.device_name} holds {len(products)} matrix products and {len(attended)} sizes of "
            f"attention, a fit needs {MIN_POINTS} of each: measure again with `kvoffload profile`"
        )
    best_flops_per_s = max(point.work.flops / point.seconds for point in products)
    best_bytes_per_s = max(sum(point.work[1:3]) / point.seconds for point in products + attended)
    best_bytes_per_s = max(best_bytes_per_s, profile.device_copy_bytes_per_s)
    flops_per_s = float(profile.extra.get("peak_flops_per_s") or best_flops_per_s / UNKNOWN_PEAK_FRACTION)
    bytes_per_s = float(profile.extra.get("peak_bytes_per_s") or best_bytes_per_s / UNKNOWN_PEAK_FRACTION)

    def fitted(points: list[Observation]) -> Fit:
        chosen = choose_points(points, flops_per_s / bytes_per_s)
        return fit(chosen, peak_flops_per_s=flops_per_s, peak_bytes_per_s=bytes_per_s)

    return {"gemm": fitted(products), "attention": fitted(attended)}


def _solve(points: _Points, names: tuple[str, ...], rows: tuple[float, float] = (0.0, 0.0)) -> _Solution:
    """Least squares, from the typical values and the shortest time seen."""
    shortest = math.log(float(points.seconds.min()))
    typical = np.array([_PRIORS[name][0] for name in names])
    spread = np.array([_PRIORS[name][1] for name in names])
    parameters = typical.copy()
    parameters[0] = shortest - 0.4  # the launch is most of it
    if "host_s" in names:
        parameters[names.index("host_s")] = shortest

    def residuals(at: _Array) -> _Array:
        error = np.log(_formula(points, dict(zip(names, np.exp(at), strict=True))) / points.seconds)
        return np.concatenate((error / NOISE_FRACTION, (at - typical) / spread))

    # MINPACK's Levenberg-Marquardt (More 1978): few numbers, no bounds, priors among the residuals
    found = least_squares(residuals, parameters, method="lm")
    now: _Array = found.fun
    num = len(points.seconds)
    error = float(np.sum(now[:num] ** 2)) * NOISE_FRACTION**2
    criterion = num * math.log(error / num + MIN_NOISE_FRACTION**2) + (len(names) + (rows[1] > 0)) * math.log(num)
    return _Solution(names, found.x, rows, found.jac, error, criterion)


def _formula(points: _Points, values: dict[str, float]) -> _Array:
    """As `Fit.seconds`, over all points."""
    fetched = (1 + values["bytes_excess"]) * (1 + values.get("spill", 0.0) * points.ramp)
    x = points.flops_s * (1 + values["flops_excess"])
    r = points.read_s * fetched
    p = 1 + values["sharpness_excess"]
    longer = np.maximum(np.maximum(x, r), 1e-30)
    overlapped: _Array = longer * ((x / longer) ** p + (r / longer) ** p) ** (1 / p)
    return np.maximum(values.get("host_s", 0.0), values["overhead_s"] + overlapped + points.written_s * fetched)


def _as_fit(one: _Solution, num_points: int, peak_flops_per_s: float, peak_bytes_per_s: float) -> Fit:
    """From excesses to rates; the covariance with them, by the derivative of every logarithm."""
    values = dict(zip(one.names, (float(value) for value in np.exp(one.parameters)), strict=True))
    noise = max(MIN_NOISE_FRACTION, math.sqrt(one.error / max(1, num_points - len(one.names))))
    shares = {name: values[name] / (1 + values[name]) for name in one.names if name.endswith("_excess")}
    scale = np.diag([shares.get(name, 1.0) * (-1.0 if name in _SHARES else 1.0) for name in one.names])
    # the residuals were weighed by NOISE_FRACTION; where the points lie further apart, so do the numbers
    covariance = np.linalg.inv(one.jacobian.T @ one.jacobian) * max(1.0, (noise / NOISE_FRACTION) ** 2)
    return Fit(
        overhead_s=values["overhead_s"],
        flops_per_s=peak_flops_per_s / (1 + values["flops_excess"]),
        bytes_per_s=peak_bytes_per_s / (1 + values["bytes_excess"]),
        sharpness=1 + values["sharpness_excess"],
        host_s=values.get("host_s", 0.0),
        spill=values.get("spill", 0.0),
        row_fit_bytes=one.rows[0],
        row_over_bytes=one.rows[1],
        noise_fraction=noise,
        num_points=num_points,
        free=tuple(_FIELDS.get(name, name) for name in one.names),
        covariance=tuple(tuple(float(value) for value in row) for row in scale @ covariance @ scale),
    )


def _spread(points: Sequence[Observation], count: int) -> list[Observation]:
    """`count` points far from each other: the smallest, the largest, then whatever is furthest from those taken."""

    def place(point: Observation) -> tuple[float, float]:
        return math.log(1 + point.work.flops), math.log(1 + point.work.read_bytes + point.work.written_bytes)

    left = sorted(points, key=lambda point: (place(point), point.seconds))
    taken: list[Observation] = []
    while left and len(taken) < count:
        if len(taken) < 2:
            one = left[-1] if taken else left[0]
        else:
            one = max(left, key=lambda point: min(math.dist(place(point), place(other)) for other in taken))
        left.remove(one)
        taken.append(one)
    return taken
