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
    SIZE: tl.constexpr = 32 if IS_VALUE else 16  # of a group
    GROUPS: tl.constexpr = (HEAD_DIM + SIZE - 1) // SIZE
    KEY_GROUPS: tl.constexpr = (HEAD_DIM + 15) // 16
    start = block_start(token, block_tokens, block_bytes)
    vector = vector_of(token, row, head, block_tokens, rows, heads, IS_VALUE)
    inside = is_token[:, None] & (dim < HEAD_DIM)[None, :]
    code = codes(ptr, start + vector * (HEAD_DIM // 2), dim, inside, HEAD_DIM, 2).to(tl.float32)
    vectors = (block_tokens * rows * heads).to(tl.int64)  # of keys, or of values
    number = ((token % block_tokens).to(tl.int64) * rows + row) * heads + head
    scales = (start + 2 * vectors * (HEAD_DIM // 2)) // 2 + number * GROUPS
    if IS_VALUE:
        scales += 2 * vectors * KEY_GROUPS
    place = halves_ptr + scales[:, None] + (dim // SIZE)[None, :]
    scale = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    least = tl.load(place + vectors * GROUPS, mask=inside, other=0.0).to(tl.float32)
    return code * scale + least
