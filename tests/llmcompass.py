"""Operations measured by others (`data/llmcompass`), and how far predictions lie from them. No tests here."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvoffload.errors import ProfileError
from kvoffload.machine.fit import Work, gemm_work
from kvoffload.machine.fitting import Observation, fit

DATA = Path(__file__).parent / "data" / "llmcompass"
PEAKS = {"A100": (312e12, 2039e9), "MI210": (181e12, 1638e9)}  # FLOP/s, bytes/s
HIDDEN, HEADS, HEAD_DIM, WAYS, BATCH = 12288, 96, 128, 4, 8  # GPT-3 175B, tensor parallel
NVLINK_BYTES_PER_S = 600e9  # of an A100, both directions together: the datasheet's figure


def elementwise_work(rows: int, width: int, *, reduces: bool = False, itemsize_bytes: float = 2) -> Work:
    """One pass that reads and writes [rows, width]; with `reduces` every row is needed as a whole."""
    num_bytes = rows * width * itemsize_bytes
    return Work(0.0, num_bytes, num_bytes, width * itemsize_bytes if reduces else 0.0)


@dataclass(frozen=True, slots=True)
class Interpolated:
    """Times of a class that no formula fits, such as a collective that changes its protocol with the size.

    Linear between the measured sizes in logarithms; below them as the smallest, beyond at the rate of the largest.
    """

    sizes_bytes: tuple[float, ...]  # ascending
    measured_s: tuple[float, ...]

    def __post_init__(self) -> None:
        pairs = zip(self.sizes_bytes, self.sizes_bytes[1:], strict=False)
        if len(self.sizes_bytes) != len(self.measured_s) or not all(small < large for small, large in pairs):
            raise ProfileError("measured sizes must ascend, with one time for each")
        if not self.sizes_bytes or not all(0 < value < math.inf for value in (*self.sizes_bytes, *self.measured_s)):
            raise ProfileError("measured sizes and times must be above zero: measure again")

    def seconds(self, num_bytes: float) -> float:
        """Seconds for `num_bytes`."""
        sizes, times = self.sizes_bytes, self.measured_s
        idx = bisect.bisect_left(sizes, num_bytes)
        if idx == 0:
            return times[0]
        if idx == len(sizes):
            return times[-1] * num_bytes / sizes[-1]
        share: float = math.log(num_bytes / sizes[idx - 1]) / math.log(sizes[idx] / sizes[idx - 1])
        return float(times[idx - 1] * (times[idx] / times[idx - 1]) ** share)


class Row(NamedTuple):
    """One measured operation beside what was predicted without it."""

    name: str
    measured_s: float
    predicted_s: float
    roofline_s: float  # by the datasheet alone
    low_s: float = math.nan
    high_s: float = math.nan

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1

    @property
    def roofline_error(self) -> float:
        return self.roofline_s / self.measured_s - 1

    @property
    def is_inside(self) -> bool:
        return self.low_s <= self.measured_s <= self.high_s


def mean(errors: Sequence[float]) -> float:
    """Mean of the absolute errors."""
    return sum(map(abs, errors)) / len(errors)


def fields(name: str) -> list[list[str]]:
    lines = (DATA / name).read_text().splitlines()
    return [[field.strip() for field in line.split(",")] for line in lines if line and not line.startswith("size")]


def products(device: str) -> list[Observation]:
    return [
        Observation(gemm_work(int(m), int(n), int(k)), float(ms.removesuffix("ms")) * 1e-3)
        for m, n, k, ms, _ in fields(f"matmul_{device}.csv")
    ]


def passes(kind: str) -> list[Observation]:
    """softmax, layernorm or gelu."""
    found = []
    for *shape, gelem_per_s in fields(f"{kind}_A100.csv"):
        rows, width = (1, int(shape[0])) if len(shape) == 1 else (int(shape[0]), int(shape[1]))
        work = elementwise_work(rows, width, reduces=kind != "gelu")
        found.append(Observation(work, rows * width / float(gelem_per_s) / 1e9))
    return found


def all_reduces() -> list[tuple[float, float]]:
    return [(float(size), float(us) * 1e-6) for size, us in fields("allreduce_A100x4_nvlink3.csv")]


def roofline_s(work: Work, device: str = "A100") -> float:
    flops_per_s, bytes_per_s = PEAKS[device]
    return max(work.flops / flops_per_s, (work.read_bytes + work.written_bytes) / bytes_per_s)


def leave_one_out(observations: list[Observation], device: str = "A100") -> list[Row]:
    """Every operation predicted by a fit to all the others."""
    rows = []
    for idx, one in enumerate(observations):
        others = observations[:idx] + observations[idx + 1 :]
        fitted = fit(others, peak_flops_per_s=PEAKS[device][0], peak_bytes_per_s=PEAKS[device][1])
        seconds, low_s, high_s = fitted.predict(one.work, coverage=0.8)
        rows.append(Row(str(one.work), one.seconds, seconds, roofline_s(one.work, device), low_s, high_s))
    return rows


def left_out_all_reduces() -> list[Row]:
    """Every size but the first and last, interpolated from its neighbours."""
    points = all_reduces()
    rows = []
    for idx in range(1, len(points) - 1):
        size, measured_s = points[idx]
        sizes, times = zip(*(points[:idx] + points[idx + 1 :]), strict=True)
        rows.append(Row(f"{size:g} bytes", measured_s, Interpolated(sizes, times).seconds(size), ring_s(size)))
    return rows


def ring_s(num_bytes: float) -> float:
    """A ring all-reduce at the link's datasheet rate: every byte leaves 2 (n - 1) / n times, in one direction."""
    return 2 * (WAYS - 1) / WAYS * num_bytes / (NVLINK_BYTES_PER_S / 2)


def layer(phase: str) -> list[Row]:
    """The operations of one GPT-3 layer ("prefill" or "decode"), predicted from the single operations alone."""
    rows, context = (BATCH * 2048, 2048) if phase == "prefill" else (BATCH, 3072)
    queries, heads, width = rows // BATCH, HEADS // WAYS, HIDDEN // WAYS
    works = {
        "Q_K_V": ("gemm", 3, gemm_work(rows, width, HIDDEN)),
        "Q_mul_K": ("gemm", 1, gemm_work(queries, context, HEAD_DIM, count=BATCH * heads)),
        "A_mul_V": ("gemm", 1, gemm_work(queries, HEAD_DIM, context, count=BATCH * heads)),
        "Wo": ("gemm", 1, gemm_work(rows, HIDDEN, width)),
        "W1": ("gemm", 1, gemm_work(rows, 4 * HIDDEN // WAYS, HIDDEN)),
        "W2": ("gemm", 1, gemm_work(rows, HIDDEN, 4 * HIDDEN // WAYS)),
        "Softmax": ("softmax", 1, elementwise_work(BATCH * heads * queries, context, reduces=True)),
        "LN_MHA": ("layernorm", 1, elementwise_work(rows, HIDDEN, reduces=True)),
        "LN_FFN": ("layernorm", 1, elementwise_work(rows, HIDDEN, reduces=True)),
        "GeLU": ("gelu", 1, elementwise_work(rows, 4 * HIDDEN // WAYS)),
    }
    flops_per_s, bytes_per_s = PEAKS["A100"]
    fits = {
        kind: fit(
            products("A100") if kind == "gemm" else passes(kind),
            peak_flops_per_s=flops_per_s,
            peak_bytes_per_s=bytes_per_s,
        )
        for kind in ("gemm", "softmax", "layernorm", "gelu")
    }
    measured = [float(line[0]) for line in fields(f"transformer{'AR' if phase == 'decode' else ''}_A100.csv")]
    found = []
    for (name, (kind, count, work)), measured_s in zip(works.items(), measured, strict=False):
        seconds, low_s, high_s = (count * value for value in fits[kind].predict(work, coverage=0.8))
        found.append(Row(name, measured_s, seconds, count * roofline_s(work), low_s, high_s))
    reduced = Interpolated(*zip(*all_reduces(), strict=True))
    num_bytes = rows * HIDDEN * 2
    for name, measured_s in zip(("AR_MHA", "AR_FFN"), measured[len(works) :], strict=True):
        found.append(Row(name, measured_s, reduced.seconds(num_bytes), ring_s(num_bytes)))
    return found
