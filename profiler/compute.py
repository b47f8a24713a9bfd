"""What the device computes: matrix products, attention over cached keys and values, copies within its memory.

Owns the shapes of the GEMM and attention curves. Does not own what a model needs of them (shapes here only span the
range, the cost model interpolates) nor how one point is timed: `workbench` shows that timeline and its rules.

Timeline of the whole, within its budget:

    device copy | attention over sizes | products over shapes | another round of all | of those that disagree

Products are [m, k] x [k, n] through `ops.linear_into`, as recomputation does them, and span

    recomputation   m = a chunk's tokens * batch, k = hidden, n = kv_heads * head_dim for each of K and V: n = k in
                    multi-head attention, a fraction of k where heads are grouped, 2k where both are done at once
    dense           m = batch when decoding; n = k, and n = 4k or k = 4n of an MLP

and attention is `ops.segment_attention` of one query token per row over token-major keys and values, as chunks hold
them. What makes a curve valid: each of its points is, or is named as noisy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from kvoffload.kernels import ops
from kvoffload.machine.quantities import Curve, Quantity
from kvoffload.profiler.workbench import Timed, Workbench, curve_of, noisy_of

POOL_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
WEIGHTS = {  # (n, k)
    "cpu": (
        *((size, size) for size in (256, 512, 1024, 2048, 4096)),
        *((1024, 512), (256, 1024)),  # recomputation: K and V at once, grouped heads
        *((2048, 512), (512, 2048)),  # dense: into an MLP and out of it
    ),
    "cuda": (
        *((size, size) for size in (1024, 2048, 4096, 8192)),
        *((8192, 4096), (1024, 4096)),
        *((16384, 4096), (4096, 16384)),
    ),
}
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)  # m: a batch when decoding, a chunk's tokens when recomputing
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
    device_copy: Quantity  # bytes read plus bytes written, per second
    noisy: tuple[str, ...]  # points whose trials disagree, as text


def measure_compute(
    device: torch.device,
    dtype: torch.dtype,
    *,
    budget_s: float = 9.0,
    progress: Callable[[float], None] | None = None,
) -> ComputeCurves:
    """Measure matrix products, attention and copies on `device`.

    Args:
        device: where to compute.
        dtype: of all operands.
        budget_s: wall-clock seconds for everything but the first touch of the device.
        progress: called with the share of the budget that is spent.
    """
    with torch.inference_mode(False), torch.no_grad():
        bench = Workbench(device, dtype, POOL_BYTES[device.type])
        works = attention_works(bench, ATTENTION_SHAPE[device.type], ATTENTION_BYTES[device.type])
        if device.type == "cuda":  # kernels are compiled when they are first used, for some sizes apart
            for work in (*works.values(), product_work(bench, dtype, 1, *WEIGHTS["cuda"][0])):
                work()
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        if progress is not None:
            bench.after_point = lambda: progress(min(1.0, (time.perf_counter() - began) / budget_s))
        copied = bench.pool.numel() // 2
        copies = [bench.time((), "device copy", lambda: bench.pool[:copied].copy_(bench.pool[copied:]), 0.1)]
        attention = time_attention(bench, works, began + 0.15 * budget_s)
        gemm = _gemm(bench, dtype, began + 0.5 * budget_s)
        timed = [*copies, *attention, *gemm]
        bench.repeat(timed, began + budget_s)
        copies, attention, gemm = timed[:1], timed[1 : 1 + len(attention)], timed[1 + len(attention) :]
    copy_bytes = 2 * copied * dtype.itemsize  # read and written
    return ComputeCurves(
        curve_of("m,n,k", gemm),
        curve_of("bytes", attention),
        Quantity(
            value=copy_bytes / copies[0].seconds, unit="bytes/s", spread_fraction=copies[0].trials.spread_fraction
        ),
        noisy_of(timed),
    )


def _gemm(bench: Workbench, dtype: torch.dtype, deadline: float) -> list[Timed]:
    """[m, k] x [k, n] for every weight, growing m until one product takes too long."""
    weights = WEIGHTS[bench.device.type]
    points: list[Timed] = []
    best_flops_per_s = 0.0
    for weight_idx, (n, k) in enumerate(weights):
        weight_deadline = time.perf_counter() + (deadline - time.perf_counter()) / (len(weights) - weight_idx)
        last: Timed | None = None
        for m in ROWS:
            if (m + n) * k > bench.pool.numel():
                break
            if last is not None:
                expected_s = max(last.seconds, 2 * m * n * k / best_flops_per_s)  # multiply-add
                if expected_s > MAX_GEMM_S or time.perf_counter() + bench.num_calls * expected_s > weight_deadline:
                    break
            product = product_work(bench, dtype, m, n, k)
            budget_s = max(0.0, weight_deadline - time.perf_counter()) / len(ROWS)
            last = bench.time((float(m), float(n), float(k)), f"gemm {m}x{n}x{k}", product, budget_s)
            best_flops_per_s = max(best_flops_per_s, 2 * m * n * k / last.seconds)
            points.append(last)
    return points


def product_work(bench: Workbench, dtype: torch.dtype, m: int, n: int, k: int) -> Callable[[], object]:
    """One product [m, k] x [k, n] on the next operands of the pool."""
    out = torch.empty((m, n), dtype=dtype, device=bench.device)
    return lambda: ops.linear_into(bench.take(m, k), bench.take(n, k), None, out)


def attention_works(
    bench: Workbench, shape: tuple[int, int, int], sizes_bytes: tuple[int, ...]
) -> dict[int, Callable[[], None]]:
    """Attention of one query token per row over token-major keys and values, by their bytes.

    Args:
        bench: holds K and V; its dtype and device are those of the attention.
        shape: rows, heads, head_dim.
        sizes_bytes: bytes of K and V; those that the pool does not hold are left out.
    """
    rows, heads, head_dim = shape
    query = bench.take(rows, 1, heads, head_dim).clone()
    out = torch.empty(query.shape, dtype=torch.float32, device=bench.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=bench.device)

    def work(tokens: int) -> Callable[[], None]:
        return lambda: ops.segment_attention(
            query,
            bench.take(tokens, rows, 2, heads, head_dim),
            out,
            lse,
            scale=head_dim**-0.5,
            is_first=True,
            first_position=0,
            query_position=tokens - 1,
        )

    token_bytes = 2 * query.nbytes  # keys and values
    return {size: work(size // token_bytes) for size in sizes_bytes if token_bytes <= size <= bench.pool.nbytes}


def time_attention(bench: Workbench, works: dict[int, Callable[[], None]], deadline: float) -> list[Timed]:
    """Time them in ascending size; those that would take too long are left out, never the first.

    Args:
        bench: the clock.
        works: as `attention_works` makes them.
        deadline: of `time.perf_counter`.
    """
    points: list[Timed] = []
    for size, work in works.items():
        if points and time.perf_counter() + bench.num_calls * points[-1].seconds * size / points[-1].x[0] > deadline:
            break
        budget_s = max(0.0, deadline - time.perf_counter()) / len(works)
        points.append(bench.time((float(size),), f"attention over {size} bytes", work, budget_s))
    return points
