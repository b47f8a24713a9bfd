"""Triton: bfloat16 with exponents of 4 bits; layout in `store/forms/packed_kv.py`."""

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
    start = block_start(token, block_tokens, block_bytes)
    vector = vector_of(token, row, head, block_tokens, rows, heads, IS_VALUE)
    inside = is_token[:, None] & (dim < HEAD_DIM)[None, :]
    rest = tl.load(ptr + (start + vector * HEAD_DIM)[:, None] + dim[None, :], mask=inside, other=0).to(tl.int32)
    vectors = (block_tokens * rows * 2 * heads).to(tl.int64)
    distance = codes(ptr, start + vectors * HEAD_DIM + vector * (HEAD_DIM // 2), dim, inside, HEAD_DIM, 2)
    # of each stored row, K or V, and head: the largest exponent, how many are too far from it, where, and which
    column = (row * 2 + IS_VALUE) * heads + head
    columns = (rows * 2 * heads).to(tl.int64)
    capacity = block_tokens * HEAD_DIM // 128 + 4
    after = start + vectors * HEAD_DIM + vectors * (HEAD_DIM // 2)
    largest = tl.load(ptr + after + column, mask=is_token, other=0).to(tl.int32)
    exponent = largest[:, None] - distance
    halves = (after + columns) // 2
    count = tl.load(halves_ptr + halves + column, mask=is_token, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
    place = halves + columns + column * capacity
    value = after + columns + 2 * columns + 2 * columns * capacity + column * capacity
    element = (token % block_tokens)[:, None] * HEAD_DIM + dim[None, :]
    for idx in range(tl.max(count, 0)):
        found = is_token & (idx < count)
        where = (
            tl.load(halves_ptr + place + idx, mask=found, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        )
        which = tl.load(ptr + value + idx, mask=found, other=0).to(tl.int32)
        exponent = tl.where(found[:, None] & (element == where[:, None]) & inside, which[:, None], exponent)
    bits = ((rest & 0x80) << 24) | ((exponent & 0xFF) << 23) | ((rest & 0x7F) << 16)
    return tl.where(inside, bits, 0).to(tl.float32, bitcast=True)
