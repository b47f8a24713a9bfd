"""How much longer attention takes where it decodes K and V of fewer bytes while it reads them.

Owns the shape this is measured at and the difference that is taken. Does not own the forms (`kvoffload/store/forms/`)
nor how one point is timed (`workbench`). Each form's blocks stand for as many K and V as the plain ones beside them;
valid where both points are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from kvoffload.kernels import ops
from kvoffload.machine.quantities import Quantity
from kvoffload.planning.forms import FORMS
from kvoffload.planning.rates import decode_quantity
from kvoffload.profiler.workbench import Timed, Workbench
from kvoffload.store.block import Span
from kvoffload.store.device_memory import DeviceMemory
from kvoffload.store.forms import made_of_kv
from kvoffload.store.forms.encoded import Encoded
from kvoffload.store.tail import KVShape

BLOCK_TOKENS = 64
SHAPE = {"cpu": (8, 8, 64), "cuda": (8, 8, 128)}  # rows, heads of K and V, head_dim
BLOCKS = {"cpu": 4, "cuda": 64}
QUERY_HEADS = 4  # for each head of K and V: packing and quantising are for grouped queries
POOL_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}


def measure_decoding(device: torch.device, dtype: torch.dtype, *, budget_s: float) -> dict[str, Quantity]:
    """Seconds per value that decoding adds to attention, for each form, by the name that plans look for.

    Args:
        device: where attention runs.
        dtype: of queries, and of the K and V beside.
        budget_s: wall-clock seconds.
    """
    rows, heads, head_dim = SHAPE[device.type]
    tokens = BLOCKS[device.type] * BLOCK_TOKENS
    forms = {
        name: form
        for name, form in made_of_kv(
            (name for name, row in FORMS.items() if row.is_encoded),
            KVShape(heads, head_dim, heads, head_dim, torch.bfloat16),
            BLOCK_TOKENS,
        ).items()
        if isinstance(form, Encoded)
    }
    with torch.no_grad():
        bench = Workbench(device, dtype, POOL_BYTES[device.type])
        deadline, share_s = time.perf_counter() + budget_s, budget_s / (2 * len(forms) + 2)
        query = bench.take(rows, 1, QUERY_HEADS * heads, head_dim).clone()

        def timed(what: str, attend: Callable[..., None]) -> Timed:
            out = torch.empty(query.shape, dtype=torch.float32, device=device)
            lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=device)
            options: dict[str, Any] = {
                "scale": head_dim**-0.5,
                "is_first": True,
                "first_position": 0,
                "query_position": tokens - 1,
            }
            return bench.time((float(tokens),), what, lambda: attend(out, lse, **options), share_s)

        def plain(out: torch.Tensor, lse: torch.Tensor, **options: Any) -> None:
            ops.segment_attention(query, bench.take(tokens, rows, 2, heads, head_dim), out, lse, **options)

        points = [timed("attention over K and V", plain)]
        points += [timed(f"attention over {name}", _reading(form, bench, query, rows)) for name, form in forms.items()]
        bench.repeat(points, deadline)
    values = tokens * rows * 2 * heads * head_dim
    spread = points[0].trials.spread_fraction
    return {
        decode_quantity(name): Quantity(
            value=max(0.0, point.seconds - points[0].seconds) / values,
            unit="s",
            spread_fraction=max(spread, point.trials.spread_fraction),
        )
        for name, point in zip(forms, points[1:], strict=True)
    }


def _reading(form: Encoded, bench: Workbench, query: torch.Tensor, rows: int) -> Callable[..., None]:
    """Attention over blocks of a form, other ones at each call."""
    blocks, shape = BLOCKS[bench.device.type], form.shape
    count = max(1, bench.pool.nbytes // (4 * blocks * form.block_bytes(rows)))
    turns = []
    for _ in range(min(8, count)):
        kv = bench.take(blocks, BLOCK_TOKENS, rows, 2, shape.key_heads, shape.key_dim).to(shape.dtype)
        data = torch.empty(blocks * form.block_bytes(rows), dtype=torch.uint8, device=bench.device)
        form.encode(kv, data.view(blocks, -1))
        turns.append(DeviceMemory(data))
    span = Span(form.name, 0, blocks, BLOCK_TOKENS, rows, 1)
    scratch, calls = DeviceMemory(torch.empty(0, dtype=torch.uint8, device=bench.device)), [0]

    def attend(out: torch.Tensor, lse: torch.Tensor, **options: Any) -> None:
        calls[0] += 1
        form.attend(query, form.segment(turns[calls[0] % len(turns)], span, scratch), out, lse, **options)

    return attend
