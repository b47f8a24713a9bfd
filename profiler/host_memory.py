"""What the host does with its own memory: reading it with all threads, and attention over K and V that lie in it.

Owns these two measurements, which say whether attention over a share of the cache could stay on the host. Does not own
attention (`ops`) nor how one point is timed (`workbench`).

Timeline, within the budget:

    pool of 256 MiB (or an eighth of free memory), larger than most caches     not timed
    read        the largest int32 of the whole pool: every byte read once, hardly any arithmetic
    attention   over ascending sizes of K/V, in float32, then the same in bfloat16, from rotating parts of a pool
    another round of all, and of those whose trials disagree

"All threads" are those PyTorch computes with. Valid under the rule of `trials`; on a machine whose last-level cache
holds the pool the rates are the cache's, which nothing here can tell.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from kvoffload.machine import system_memory
from kvoffload.machine.quantities import Curve, Quantity
from kvoffload.profiler.compute import attention_works, time_attention
from kvoffload.profiler.workbench import Workbench, curve_of, noisy_of

POOL_BYTES = 256 * 2**20
DTYPES = (torch.float32, torch.bfloat16)
ATTENTION_SHAPE = (8, 8, 64)  # rows, heads, head_dim
ATTENTION_BYTES = tuple(2**exponent for exponent in (20, 22, 24, 26))


class HostRates(NamedTuple):
    """What `measure_host_memory` found."""

    read: Quantity
    attention: dict[str, Curve]  # by name, "host_attention_float32"; x = bytes of K/V in host memory
    noisy: tuple[str, ...]


def measure_host_memory(*, budget_s: float = 4.0, pool_bytes: int = POOL_BYTES) -> HostRates:
    """Measure on the CPU, whatever the device is.

    Args:
        budget_s: wall-clock seconds for everything but filling the pool.
        pool_bytes: host memory to read.
    """
    cpu = torch.device("cpu")
    curves: dict[str, Curve] = {}
    noisy: list[str] = []
    with torch.inference_mode(False), torch.no_grad():
        pool_bytes = min(pool_bytes, system_memory.available_bytes() // 8)
        bench = Workbench(cpu, torch.float32, pool_bytes)
        words = bench.pool.view(torch.int32)
        reads = [bench.time((), "host memory read", lambda: words.amax(), budget_s / 8)]
        bench.repeat(reads, time.perf_counter() + budget_s / 8)
        noisy += noisy_of(reads)
        for dtype in DTYPES:
            bench = Workbench(cpu, dtype, pool_bytes // 2)
            name, began = str(dtype).removeprefix("torch."), time.perf_counter()
            works = attention_works(bench, ATTENTION_SHAPE, ATTENTION_BYTES)
            timed = time_attention(bench, works, began + 0.2 * budget_s)
            bench.repeat(timed, began + 0.35 * budget_s)
            curves[f"host_attention_{name}"] = curve_of("bytes", timed)
            noisy += [f"host {name} {text}" for text in noisy_of(timed)]
    rate = words.nbytes / reads[0].seconds
    read = Quantity(value=rate, unit="bytes/s", spread_fraction=reads[0].trials.spread_fraction)
    return HostRates(read, curves, tuple(noisy))
