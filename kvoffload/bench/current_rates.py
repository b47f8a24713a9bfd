"""The rates of the cost model, measured in this process, now: the bound of a row comes from these.

Owns the timing of recomputation, of attention and of a step without a cache, each through the code that the runtime
runs. Does not own what is made of them (`decode`).

Timeline of one rate: two stretches to warm up, then stretches for its share of a second (`backend.clock`: on a GPU of
eight calls, without a launch in them); the median counts. Operands rotate through a ring of chunks, as they arrive in
the runtime: they are in no cache.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from kvoffload import hf
from kvoffload.backend import DeviceClock
from kvoffload.bench.presets import Preset
from kvoffload.bench.watch import Stamp
from kvoffload.kernels import ops
from kvoffload.planning.placement import FormName
from kvoffload.store import recompute
from kvoffload.store.block import Span
from kvoffload.store.device_memory import DeviceMemory
from kvoffload.store.forms import made_of_kv
from kvoffload.store.forms.encoded import Encoded
from kvoffload.store.tail import KVShape

RING_CHUNKS = 4


def recompute_s_per_token(
    model: PreTrainedModel, preset: Preset, chunk_tokens: int, *, idle_s: float = 0.0, is_segmented: bool = True
) -> float:
    """gamma_r: one position of the whole batch, through the runtime's own recomputation.

    Args:
        model: gives the first layer's projections.
        preset: the shape.
        chunk_tokens: tokens of one chunk.
        idle_s: pause before each chunk, for schedules that wait for a copy before they compute: a core that comes
            out of a pause is slower at first.
        is_segmented: every chunk becomes K/V in the same scratch, else each at its place in a layer buffer.
    """
    p, device = preset, model.device
    shape = KVShape(p.kv_heads, p.hidden // p.heads, p.kv_heads, p.hidden // p.heads, p.dtype)
    ring = torch.randn(RING_CHUNKS, chunk_tokens, p.batch, p.hidden, device=device, dtype=p.dtype)
    room = chunk_tokens if is_segmented else p.cached_tokens
    landing = torch.empty(room, p.batch, shape.width, device=device, dtype=p.dtype)
    turns = itertools.count()
    embeddings: tuple[torch.Tensor, ...] = ()
    if p.architecture != "opt":
        positions = torch.arange(chunk_tokens, device=device)[None]
        with torch.no_grad():
            inner: Any = model
            embeddings = inner.model.rotary_emb(ring[0], positions)
    path = recompute.FastRecompute(hf.attention_modules(model)[0], shape)

    def recompute_next() -> None:
        turn = next(turns)
        start = turn % (room // chunk_tokens) * chunk_tokens
        path(ring[turn % RING_CHUNKS], embeddings, landing[start : start + chunk_tokens])

    return _median_s(recompute_next, device, budget_s=0.4, idle_s=idle_s) / chunk_tokens


def attention_s_per_token(
    preset: Preset, device: torch.device, chunk_tokens: int, *, idle_s: float = 0.0, is_segmented: bool = True
) -> float:
    """gamma_a: attention over chunks in a ring, or SDPA over a layer buffer; `idle_s` as for recomputation."""
    p = preset
    head_dim = p.hidden // p.heads
    if is_segmented:
        ring = torch.randn(RING_CHUNKS, chunk_tokens, p.batch, 2, p.kv_heads, head_dim, device=device, dtype=p.dtype)
        query = torch.randn(p.batch, 1, p.heads, head_dim, device=device, dtype=p.dtype)
        out = torch.empty_like(query, dtype=torch.float32)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=device)
        turns = itertools.count()

        def attend_next() -> None:
            turn = next(turns)
            segment, is_first = ring[turn % RING_CHUNKS], turn % 8 == 0
            ops.segment_attention(
                query, segment, out, lse, scale=1.0, is_first=is_first, first_position=0, query_position=chunk_tokens
            )

        return _median_s(attend_next, device, budget_s=0.2, idle_s=idle_s) / chunk_tokens
    kv = torch.randn(p.cached_tokens, p.batch, 2, p.kv_heads, head_dim, device=device, dtype=p.dtype)
    q = torch.randn(p.batch, p.heads, 1, head_dim, device=device, dtype=p.dtype)
    k, v = (kv[:, :, i].permute(1, 2, 0, 3) for i in range(2))

    def attend() -> None:
        groups = p.heads // p.kv_heads
        keys, values = (k, v) if groups == 1 else (t.repeat_interleave(groups, 1) for t in (k, v))
        torch.nn.functional.scaled_dot_product_attention(q, keys, values)

    return _median_s(attend, device, budget_s=0.2) / p.cached_tokens


def decode_s_per_token(
    preset: Preset, device: torch.device, chunk_tokens: int, block_tokens: int, name: FormName
) -> float:
    """What attention takes longer over a chunk in a form than over K and V; 0 where it is shorter."""
    p = preset
    head_dim = p.hidden // p.heads
    form = made_of_kv([name], KVShape(p.kv_heads, head_dim, p.kv_heads, head_dim, p.dtype), block_tokens)[name]
    assert isinstance(form, Encoded)
    blocks = chunk_tokens // block_tokens
    size = (blocks, block_tokens, p.batch, 2, p.kv_heads, head_dim)
    ring = []
    for _ in range(RING_CHUNKS):
        data = torch.empty(blocks * form.block_bytes(p.batch), dtype=torch.uint8, device=device)
        form.encode(torch.randn(size, device=device).to(p.dtype), data.view(blocks, -1))
        ring.append(DeviceMemory(data))
    query = torch.randn(p.batch, 1, p.heads, head_dim, device=device, dtype=p.dtype)
    out = torch.empty_like(query, dtype=torch.float32)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=device)
    span, scratch = Span(name, 0, blocks, block_tokens, p.batch, 1), DeviceMemory(torch.empty(0, dtype=torch.uint8))
    turns = itertools.count()

    def attend_next() -> None:
        turn = next(turns)
        segment = form.segment(ring[turn % RING_CHUNKS], span, scratch)
        options = {"is_first": turn % 8 == 0, "first_position": 0, "query_position": chunk_tokens}
        form.attend(query, segment, out, lse, scale=1.0, **options)

    both_s = _median_s(attend_next, device, budget_s=0.2) / chunk_tokens
    return max(0.0, both_s - attention_s_per_token(preset, device, chunk_tokens))


def step_s_without_cache(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """A whole decode step of generate() with next to no cache: dense parts, head, sampling and host time.

    On a GPU the longer of what the device and what the host does for it.
    """
    times: list[float] = []
    generating: Any = model
    generating.generate(ids[:, :2], max_new_tokens=14, do_sample=False, stopping_criteria=[Stamp(times)])
    return statistics.median(after - before for before, after in itertools.pairwise(times[2:]))


def forward_s(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """What the device does for one token of every sequence without a cache: dense parts and head.

    One forward is hundreds of launches, about as many as a GPU's queue holds: each is a stretch of its own.
    """
    clock, calling = DeviceClock(ids.device), model.__call__
    with torch.no_grad():
        samples = [clock.time(lambda: calling(ids[:, :1], use_cache=False), 1).seconds for _ in range(7)]
    return statistics.median(samples[2:])


def _median_s(function: Callable[[], Any], device: torch.device, budget_s: float, idle_s: float = 0.0) -> float:
    with torch.no_grad():
        clock = DeviceClock(device)
        n = clock.least_calls
        for _ in range(2):
            clock.time(function, n)
        samples: list[float] = []
        began = time.perf_counter()
        while len(samples) < 5 or time.perf_counter() - began < budget_s:
            time.sleep(idle_s)
            samples.append(clock.time(function, n).seconds / n)
    return statistics.median(samples)
