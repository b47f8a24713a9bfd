"""Rates of one model as they were seen on this machine; they replace the profile's.

Owns what was measured, and timing one chunk both ways before the first prefill: recomputation, attention and, on a real
link, its speed. Does not own the profile, the clock (`backend.clock` shows one stretch and what makes it valid), nor
the decode steps that correct these rates later (`generation`).

Timeline of one rate, within a third of the budget of the check:

    two stretches of the fewest calls: warm-up, and an estimate of how many calls a stretch needs
    stretches, at least 5, at most 25

What makes it valid, beside what makes a stretch valid: trials agree (`profiler.trials`). On a device whose profile was
timed as well as this, a number that is not certain is no reason to drop the profile's.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kvoffload.backend import Backend, DeviceClock, Stretch
from kvoffload.backend.base import LinkUse
from kvoffload.backend.clock import LEAST_CALLS
from kvoffload.kernels import ops
from kvoffload.model.shape import ModelShape
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.rates import Rates
from kvoffload.planning.sizes import Sizes
from kvoffload.profiler.trials import summarize

logger = logging.getLogger(__name__)

CHECK_BUDGET_S = 0.6  # for timing both ways before the first prefill
STRETCH_S = 1e-3
MOST_CALLS = 64  # in one stretch
_PATTERN_NUMBERS = 2**18


class MeasuredRates:
    """Rates seen in real steps of one model; they replace the profile's."""

    def __init__(self) -> None:
        self.recompute_s_per_row_token: float | None = None
        self.attention_s_per_row_token: float | None = None
        self.h2d_bytes_per_s: float | None = None
        self.gap_s: float | None = None
        self.copied = LinkUse(0, 0.0, 0)  # to time a chunk, to the device
        self._was_timed = False

    def take(
        self,
        recompute_s_per_row_token: float | None,
        h2d_bytes_per_s: float | None,
        attention_s_per_row_token: float | None = None,
    ) -> None:
        """Newer measurements; None where there is none."""
        self.recompute_s_per_row_token = recompute_s_per_row_token or self.recompute_s_per_row_token
        self.h2d_bytes_per_s = h2d_bytes_per_s or self.h2d_bytes_per_s
        self.attention_s_per_row_token = attention_s_per_row_token or self.attention_s_per_row_token

    def take_gap(self, between_steps_s: float | None, rates: Rates) -> None:
        """What passes between two steps, less what a device does in it at these rates: the host's time."""
        if between_steps_s is not None:
            self.gap_s = max(0.0, between_steps_s - rates.head_s - rates.dense_s)

    def correct(self, rates: Rates, rows: int) -> Rates:
        """`rates` with what has been measured."""
        if self.gap_s is not None:
            rates = replace(rates, gap_s=self.gap_s)
        if self.recompute_s_per_row_token is not None:
            recompute_s = {"activation": self.recompute_s_per_row_token * rows}
            rates = replace(rates, restore_s_per_token={**rates.restore_s_per_token, **recompute_s})
        if self.attention_s_per_row_token is not None:
            rates = replace(rates, attention_s_per_token=self.attention_s_per_row_token * rows)
        if self.h2d_bytes_per_s is not None:
            rates = replace(rates, h2d_bytes_per_s=dict.fromkeys(rates.h2d_bytes_per_s, self.h2d_bytes_per_s))
        return rates

    def take_copied(self) -> LinkUse:
        """What the link carried to the device for timing since the last call."""
        copied, self.copied = self.copied, LinkUse(0, 0.0, 0)
        return copied

    def time_chunk(
        self,
        backend: Backend,
        shape: ModelShape,
        geometry: Geometry,
        sizes: Sizes,
        prepare: Callable[[int], Callable[[], None]],
        ring: Callable[[], Sequence[torch.Tensor]] = tuple,
    ) -> None:
        """Time one chunk both ways, if that was not done for this model; waits for the device.

        Args:
            backend: where; nothing else may use its layer buffers meanwhile.
            shape: of the model.
            geometry: of the cache.
            sizes: of its chunks.
            prepare: returns the recomputation of that many tokens of all rows of one layer.
            ring: returns idle slots, whose bytes may be overwritten, for chunks of K and V; without them memory is
                taken. Asked only if something is timed.
        """
        if self._was_timed or self.recompute_s_per_row_token is not None:
            return
        self._was_timed = True
        tokens = sizes.block_tokens * sizes.chunk_blocks
        row_tokens = tokens * geometry.rows
        backend.synchronize()  # what is timed runs alone, in a layer buffer that nothing else uses
        before = backend.link_use("h2d")
        clock, chunks = DeviceClock(backend.device), _kv_chunks(backend, shape, geometry, sizes, ring())
        # What is computed counts as slow as four of five trials find it, not as the median: recomputing a little too
        # much costs several times what recomputing a little too little does.
        recompute_s, attention_s = (
            _seconds(functools.partial(clock.time, work), clock.least_calls, is_trusted=backend.emulated, share=0.8)
            for work in (prepare(tokens), _prepare_attention(shape, geometry, chunks))
        )
        self.take(
            None if recompute_s is None else recompute_s / row_tokens,
            None if backend.emulated else _time_link(backend, chunks),
            None if attention_s is None else attention_s / row_tokens,
        )
        backend.synchronize()
        self.copied = backend.link_use("h2d").since(before)


def _kv_chunks(
    backend: Backend, shape: ModelShape, geometry: Geometry, sizes: Sizes, ring: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """K and V of chunks, [tokens, rows, 2, heads, head_dim] each: as many as the ring has, so that none is in a cache.

    Without a ring that lies idle as many on the CPU, where memory for them is free of cost, and one elsewhere. Filled
    with random numbers: zeros draw less power. The user's generator is left alone.
    """
    tokens = sizes.block_tokens * sizes.chunk_blocks
    size = (tokens, geometry.rows, 2, shape.num_kv_heads, shape.head_dim)
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[shape.kv_itemsize_bytes]
    num_bytes = math.prod(size) * dtype.itemsize
    if geometry.is_segmented and ring and ring[0].numel() >= num_bytes:
        chunks = [slot[:num_bytes].view(dtype).view(size) for slot in ring]
    else:
        num_chunks = sizes.num_slots if backend.emulated and geometry.is_segmented else 1
        chunks = list(torch.empty(num_chunks, *size, dtype=dtype, device=backend.device).unbind(0))
    generator = torch.Generator(device=backend.device)
    generator.manual_seed(0)
    pattern = torch.randn(_PATTERN_NUMBERS, generator=generator, device=backend.device).to(dtype)
    for chunk in chunks:
        for part in chunk.view(-1).split(_PATTERN_NUMBERS):
            part.copy_(pattern[: part.numel()])
    return chunks


def _prepare_attention(shape: ModelShape, geometry: Geometry, chunks: list[torch.Tensor]) -> Callable[[], None]:
    """Attention of one query per row over the next chunk at each call, laid out as a step finds it."""
    tokens, dtype, device = len(chunks[0]), chunks[0].dtype, chunks[0].device
    query = torch.ones(geometry.rows, 1, shape.num_heads, shape.head_dim, dtype=dtype, device=device)
    if geometry.is_segmented:
        out, lse = torch.zeros_like(query, dtype=torch.float32), query.new_zeros(query.shape[:3], dtype=torch.float)
        turns = itertools.cycle(chunks)

        def attend_next() -> None:
            ops.segment_attention(
                query, next(turns), out, lse, scale=1.0, is_first=False, first_position=0, query_position=tokens
            )

        return attend_next
    keys, values = (chunks[0][:, :, half].permute(1, 2, 0, 3) for half in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = shape.num_heads != shape.num_kv_heads

    def run() -> None:
        attend(query.transpose(1, 2), keys, values, enable_gqa=grouped)

    return run


def _time_link(backend: Backend, chunks: list[torch.Tensor]) -> float | None:
    """Bytes per second of a chunk from memory that the backend pins; None where the trials disagree."""
    slots = [chunk.view(-1).view(torch.uint8) for chunk in chunks]
    num_bytes = slots[0].numel()
    host = backend.allocate_host(num_bytes)
    turns = itertools.cycle(slots)
    backend.synchronize()  # compute used the slots

    def queue() -> None:
        backend.copy_to_device(next(turns), host.tensor, [])

    def stretch(n: int) -> Stretch:
        return backend.time_copies(queue, n, ("h2d",), is_pageable=not host.pinned_bytes)

    try:
        seconds = _seconds(stretch, LEAST_CALLS, share=0.5)
    finally:
        backend.release_host(host)
    return None if seconds is None else num_bytes / seconds


def _seconds(
    stretch: Callable[[int], Stretch], least_calls: int, *, share: float, is_trusted: bool = False
) -> float | None:
    """Duration of one call that `share` of the trials keep, within a third of the budget of the check.

    None where the trials disagree, unless they are trusted in any case.
    """
    stretch(least_calls)
    estimate_s = max(1e-9, stretch(least_calls).seconds / least_calls)
    n = max(least_calls, min(MOST_CALLS, math.ceil(STRETCH_S / estimate_s)))
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < 5 or (len(samples) < 25 and time.perf_counter() - began < CHECK_BUDGET_S / 3):
        samples.append(stretch(n).seconds / n)
    trials = summarize(samples)
    if not (is_trusted or trials.is_valid):
        logger.info(
            "trials of %.3g s disagree by %.2f: the profile's rate stays", trials.seconds, trials.spread_fraction
        )
        return None
    return sorted(samples)[min(len(samples) - 1, round(share * len(samples)))]
