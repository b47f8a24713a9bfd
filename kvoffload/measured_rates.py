"""Rates of one model as they were seen on this machine; they replace the profile's.

Owns what was measured, and timing one chunk both ways before the first prefill: recomputation, attention and, on a real
link, its speed. Does not own the profile, and does not read the decode steps that correct these rates later (`run`).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from kvoffload import ops
from kvoffload.backend import Backend
from kvoffload.sizing import Geometry, Sizes
from kvoffload.types import ModelShape, Rates

CHECK_BUDGET_S = 0.6  # for timing both ways before the first prefill


class MeasuredRates:
    """Rates seen in real steps of one model; they replace the profile's."""

    def __init__(self) -> None:
        self.recompute_s_per_row_token: float | None = None
        self.attention_s_per_row_token: float | None = None
        self.h2d_bytes_per_s: float | None = None

    def take(self, recompute_s_per_row_token: float | None, h2d_bytes_per_s: float | None) -> None:
        """Newer measurements; None where there is none."""
        self.recompute_s_per_row_token = recompute_s_per_row_token or self.recompute_s_per_row_token
        self.h2d_bytes_per_s = h2d_bytes_per_s or self.h2d_bytes_per_s

    def correct(self, rates: Rates, rows: int) -> Rates:
        """`rates` with what has been measured."""
        if self.recompute_s_per_row_token is not None:
            rates = replace(rates, recompute_s_per_token=self.recompute_s_per_row_token * rows)
        if self.attention_s_per_row_token is not None:
            rates = replace(rates, attention_s_per_token=self.attention_s_per_row_token * rows)
        if self.h2d_bytes_per_s is not None:
            rates = replace(
                rates, h2d_activation_bytes_per_s=self.h2d_bytes_per_s, h2d_kv_bytes_per_s=self.h2d_bytes_per_s
            )
        return rates

    def time_chunk(
        self,
        backend: Backend,
        shape: ModelShape,
        geometry: Geometry,
        sizes: Sizes,
        prepare: Callable[[int], Callable[[], None]],
    ) -> None:
        """Time one chunk both ways, if that was not done for this model; waits for the device.

        Args:
            backend: where; nothing else may use its layer buffers meanwhile.
            shape: of the model.
            geometry: of the cache.
            sizes: of its chunks.
            prepare: returns the recomputation of that many tokens of all rows of one layer.
        """
        if self.recompute_s_per_row_token is not None:
            return
        tokens = sizes.block_tokens * sizes.chunk_blocks
        backend.synchronize()  # what is timed runs alone, in a layer buffer that nothing else uses
        row_tokens = tokens * geometry.rows
        self.recompute_s_per_row_token = _time(backend, prepare(tokens)) / row_tokens
        attend = _prepare_attention(backend, shape, geometry, sizes)
        self.attention_s_per_row_token = _time(backend, attend) / row_tokens
        if not backend.emulated:
            self.h2d_bytes_per_s = _time_link(backend, tokens * geometry.kv_bytes_per_token)


def _prepare_attention(backend: Backend, shape: ModelShape, geometry: Geometry, sizes: Sizes) -> Callable[[], None]:
    """Attention of one query per row over the tokens of a chunk, laid out as a step finds them.

    Where that is free of cost, on the CPU, over as many chunks in turn as the ring has: in no cache near the core.
    """
    tokens, rows = sizes.block_tokens * sizes.chunk_blocks, geometry.rows
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[shape.kv_itemsize_bytes]
    device = backend.device
    num_chunks = sizes.num_slots if backend.emulated and geometry.is_segmented else 1
    ring = torch.zeros(num_chunks, tokens, rows, 2, shape.num_kv_heads, shape.head_dim, dtype=dtype, device=device)
    query = torch.zeros(rows, 1, shape.num_heads, shape.head_dim, dtype=dtype, device=device)
    if geometry.is_segmented:
        out, lse = torch.zeros_like(query, dtype=torch.float32), query.new_zeros(query.shape[:3], dtype=torch.float)
        chunks = itertools.cycle(ring.unbind(0))

        def attend_next() -> None:
            kv = next(chunks)
            ops.segment_attention(
                query, kv, out, lse, scale=1.0, is_first=False, first_position=0, query_position=tokens
            )

        return attend_next
    kv = ring[0]
    keys, values = (kv[:, :, half].permute(1, 2, 0, 3) for half in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = shape.num_heads != shape.num_kv_heads

    def run() -> None:
        attend(query.transpose(1, 2), keys, values, enable_gqa=grouped)

    return run


def _time(backend: Backend, function: Callable[[], None]) -> float:
    """Duration that four of five trials keep, within a third of the budget of the check.

    Not the median: recomputing a little too much costs several times what recomputing a little too little does.
    """
    function()
    backend.synchronize()
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < 5 or (len(samples) < 25 and time.perf_counter() - began < CHECK_BUDGET_S / 3):
        start = time.perf_counter()
        function()
        backend.synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.quantiles(samples, n=5)[-1]


def _time_link(backend: Backend, num_bytes: int) -> float:
    """Bytes per second of a chunk of that size from pinned memory."""
    host = backend.allocate_host(num_bytes)
    device = backend.allocate_device(num_bytes)
    fresh = backend.release()
    backend.copy_to_device(device, host.tensor, [fresh])
    backend.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        backend.copy_to_device(device, host.tensor, [])
    backend.synchronize()
    rate = 3 * num_bytes / (time.perf_counter() - start)
    backend.release_host(host)
    return rate
