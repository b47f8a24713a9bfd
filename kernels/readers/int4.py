"""Triton: keys and values of 4 bits in groups along a head; layout in `store/forms/int4.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from kvoffload.kernels.readers.places import block_start, codes, vector_of


@triton.jit
def read(
    ptr: tl.tensor,
    halves_ptr: tl.tensor,
    token: tl.tensor,
    row: tl.tensor,
    head: tl.tensor,
    dim: tl.tensor,
    is_token: tl.tensor,
    block_tokens: tl.tensor,
    block_bytes: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    IS_VALUE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> tl.tensor:
    """Keys or values of a tile; see `readers`."""
    GROUPS: tl.constexpr = (HEAD_DIM + 31) // 32
    start = block_start(token, block_tokens, block_bytes)
    vector = vector_of(token, row, head, block_tokens, rows, heads, IS_VALUE)
    inside = is_token[:, None] & (dim < HEAD_DIM)[None, :]
    code = codes(ptr, start + vector * (HEAD_DIM // 2), dim, inside, HEAD_DIM, 2).to(tl.float32)
    vectors = (block_tokens * rows * 2 * heads).to(tl.int64)
    scales = (start + vectors * (HEAD_DIM // 2)) // 2
    place = halves_ptr + (scales + vector * GROUPS)[:, None] + (dim // 32)[None, :]
    scale = tl.load(place, mask=inside, other=0.0)
    least = tl.load(place + vectors * GROUPS, mask=inside, other=0.0).to(tl.float32)
    found = code * tl.abs(scale.to(tl.float32)) + least
    if not IS_VALUE:
        mean = halves_ptr + (scales + 2 * vectors * GROUPS + (row * heads + head) * HEAD_DIM)[:, None] + dim[None, :]
        is_less = inside & (scale.to(tl.int16, bitcast=True) < 0)
        found += tl.load(mean, mask=is_less, other=0.0).to(tl.float32)
    return found
