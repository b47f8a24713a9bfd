"""Triton: keys and values of 8 bits with a scale for each token and head; layout in `store/forms/int8.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from kvoffload.kernels.readers.places import block_start, vector_of


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
    start = block_start(token, block_tokens, block_bytes)
    vector = vector_of(token, row, head, block_tokens, rows, heads, IS_VALUE)
    inside = is_token[:, None] & (dim < HEAD_DIM)[None, :]
    codes = tl.load(ptr + (start + vector * HEAD_DIM)[:, None] + dim[None, :], mask=inside, other=0)
    vectors = (block_tokens * rows * 2 * heads).to(tl.int64)
    scales = (start + vectors * HEAD_DIM) // 2
    scale = tl.load(halves_ptr + scales + vector, mask=is_token, other=0.0)
    found = codes.to(tl.int8, bitcast=True).to(tl.float32) * tl.abs(scale.to(tl.float32))[:, None]
    if not IS_VALUE:
        mean = halves_ptr + (scales + vectors + (row * heads + head) * HEAD_DIM)[:, None] + dim[None, :]
        is_less = inside & (scale.to(tl.int16, bitcast=True) < 0)[:, None]
        found += tl.load(mean, mask=is_less, other=0.0).to(tl.float32)
    return found
