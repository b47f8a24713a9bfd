"""What the device computes: matrix products, attention over cached keys and values, copies within its memory.

Owns the GEMM and attention curves. Does not own what a model needs of them: shapes here only span the range, the
cost model interpolates.

Timeline of one point:

    operands are views into one pool of random numbers larger than the caches            not timed
    burst(n):  clock | the operation n times, each on other operands of the pool | clock

The clock is the wall clock on a CPU (PyTorch's CPU operations are synchronous) and a pair of CUDA events on a GPU,
read after the second has completed. What makes it valid:

- decoding reads every weight and every cached token once per step, so an operand still in a cache from the trial
  before would promise a rate that no step sees: hence the rotation;
- numbers are random, since zeros draw less power and clock higher;
- every point is timed in two rounds some seconds apart, of which the undisturbed one counts, and again while its
  trials disagree (see `trials`) and there is time.

The generator is our own: the user's random numbers are the same with and without a measurement.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from kvoffload.profiler.trials import Trials, better, time_trials
from kvoffload.types import Curve, Point

logger = logging.getLogger(__name__)

POOL_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
WEIGHTS = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (1024, 2048, 4096, 8192)}  # n = k
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)  # m: a batch when decoding, a chunk's tokens when recomputing
TRIAL_S = {"cpu": 2e-5, "cuda": 2e-3}  # CUDA events and launches need longer stretches than the wall clock
MAX_ROUNDS = 4
MAX_GEMM_S = 0.04  # shapes expected to take longer are left out
ATTENTION_SHAPE = {"cpu": (8, 8, 64), "cuda": (8, 32, 128)}  # rows, heads, head_dim
ATTENTION_BYTES = {
    "cpu": tuple(2**exponent for exponent in range(17, 27, 2)),  # 128 KiB .. 32 MiB
    "cuda": tuple(2**exponent for exponent in range(20, 30, 2)),  # 1 MiB .. 256 MiB
}


class ComputeCurves(NamedTuple):
    """What `measure_compute` found."""

    gemm: Curve  # x = (m, n, k)
    attention: Curve  # x = bytes of K/V read
    device_copy_bytes_per_s: float  # bytes read plus bytes written
    noisy: tuple[str, ...]  # points whose trials disagree, as text


class _Timed(NamedTuple):
    """One point and how to time it again."""

    x: tuple[float, ...]
    what: str
    work: Callable[[], object]
    trials: Trials

    @property
    def seconds(self) -> float:
        return self.trials.seconds

    @property
    def point(self) -> Point:
        return Point(self.x, self.trials.seconds, self.trials.spread_fraction)


class _Bench:
    """The pool of operands and the clock of one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        generator = torch.Generator(device=device)
        generator.manual_seed(0)
        num_bytes = POOL_BYTES[device.type]
        if device.type == "cuda":  # a model may be there already
            num_bytes = min(num_bytes, torch.cuda.mem_get_info(device)[0] // 4)
        num = num_bytes // dtype.itemsize
        seed = torch.randn(2**18, generator=generator, device=device, dtype=torch.float32).to(dtype)
        self.pool = seed.repeat(max(1, num // seed.numel()))
        self._offset = 0

    def take(self, *shape: int) -> torch.Tensor:
        """The next operand of the pool, contiguous."""
        num = 1
        for size in shape:
            num *= size
        if self._offset + num > self.pool.numel():
            self._offset = 0
        view = self.pool[self._offset : self._offset + num].view(shape)
        self._offset += num
        return view

    def seconds(self, work: Callable[[], object], n: int) -> float:
        """Duration of `n` calls of `work` on the device."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            for _ in range(n):
                work()
            return time.perf_counter() - began
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(n):
            work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3  # milliseconds

    def time(self, x: tuple[float, ...], what: str, work: Callable[[], object], budget_s: float) -> _Timed:
        """Time `work` at the size `x`."""
        trial_s = TRIAL_S[self.device.type]
        trials = time_trials(lambda n: self.seconds(work, n), trial_s=trial_s, budget_s=budget_s, max_burst=512)
        logger.debug("%s: %.3g s, spread %.2f", what, trials.seconds, trials.spread_fraction)
        return _Timed(x, what, work, trials)

    def repeat(self, timed: list[_Timed], deadline: float) -> None:
        """Another round of all points, in place, then of those whose trials disagree, while there is time."""
        pending = list(range(len(timed)))
        for _ in range(MAX_ROUNDS - 1):
            for idx in pending:
                old = timed[idx]
                if time.perf_counter() + 8 * old.seconds < deadline:
                    again = self.time(old.x, old.what, old.work, 0.05)
                    timed[idx] = old._replace(trials=better(old.trials, again.trials))
            pending = [idx for idx in pending if not timed[idx].trials.is_valid]


def measure_compute(device: torch.device, dtype: torch.dtype, *, budget_s: float = 9.0) -> ComputeCurves:
    """Measure matrix products, attention and copies on `device`.

    Args:
        device: where to compute.
        dtype: of all operands.
        budget_s: wall-clock seconds for everything but the first touch of the device.
    """
    with torch.inference_mode(False), torch.no_grad():
        bench = _Bench(device, dtype)
        began = time.perf_counter()
        copied = bench.pool.numel() // 2
        copies = [bench.time((), "device copy", lambda: bench.pool[:copied].copy_(bench.pool[copied:]), 0.1)]
        attention = _attention(bench, dtype, began + 0.15 * budget_s)
        gemm = _gemm(bench, dtype, began + 0.5 * budget_s)
        timed = [*copies, *attention, *gemm]
        bench.repeat(timed, began + budget_s)
        copies, attention, gemm = timed[:1], timed[1 : 1 + len(attention)], timed[1 + len(attention) :]
    copy_bytes = 2 * copied * dtype.itemsize  # read and written
    return ComputeCurves(
        Curve(unit="m,n,k", points=tuple(one.point for one in gemm)),
        Curve(unit="bytes", points=tuple(one.point for one in attention)),
        copy_bytes / copies[0].seconds,
        tuple(f"{one.what} (spread {one.trials.spread_fraction:.2f})" for one in timed if not one.trials.is_valid),
    )


def _gemm(bench: _Bench, dtype: torch.dtype, deadline: float) -> list[_Timed]:
    """[m, k] x [k, n] for every weight, growing m until one product takes too long."""
    kind = bench.device.type
    points: list[_Timed] = []
    best_flops_per_s = 0.0
    for weight_idx, size in enumerate(WEIGHTS[kind]):
        weight_deadline = time.perf_counter() + (deadline - time.perf_counter()) / (len(WEIGHTS[kind]) - weight_idx)
        last: _Timed | None = None
        for m in ROWS:
            if (m + size) * size > bench.pool.numel():
                break
            if last is not None:
                expected_s = max(last.seconds, 2 * m * size * size / best_flops_per_s)  # multiply-add
                if expected_s > MAX_GEMM_S or time.perf_counter() + 5 * expected_s > weight_deadline:
                    break
            out = torch.empty((m, size), dtype=dtype, device=bench.device)

            def product(m: int = m, size: int = size, out: torch.Tensor = out) -> object:
                return torch.mm(bench.take(m, size), bench.take(size, size).t(), out=out)

            budget_s = max(0.0, weight_deadline - time.perf_counter()) / len(ROWS)
            last = bench.time((float(m), float(size), float(size)), f"gemm {m}x{size}x{size}", product, budget_s)
            best_flops_per_s = max(best_flops_per_s, 2 * m * size * size / last.seconds)
            points.append(last)
    return points


def _attention(bench: _Bench, dtype: torch.dtype, deadline: float) -> list[_Timed]:
    """One query token per row against token-major keys and values, as a layer buffer holds them."""
    kind = bench.device.type
    rows, heads, head_dim = ATTENTION_SHAPE[kind]
    query = bench.take(rows, heads, 1, head_dim).clone()
    points: list[_Timed] = []
    for size in ATTENTION_BYTES[kind]:
        if points and time.perf_counter() + 5 * points[-1].seconds * size / points[-1].x[0] > deadline:
            break
        if size > bench.pool.nbytes:
            break
        tokens = size // (2 * rows * heads * head_dim * dtype.itemsize)  # keys and values
        if tokens < 1:
            continue

        def attend(tokens: int = tokens) -> object:
            cached = bench.take(tokens, rows, 2, heads, head_dim).permute(2, 1, 3, 0, 4)  # [2, rows, heads, tokens, d]
            return torch.nn.functional.scaled_dot_product_attention(query, cached[0], cached[1])

        budget_s = max(0.0, deadline - time.perf_counter()) / len(ATTENTION_BYTES[kind])
        points.append(bench.time((float(size),), f"attention over {size} bytes", attend, budget_s))
    return points
