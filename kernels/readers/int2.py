"""Triton: 2 bits, keys in groups of tokens, values in groups along a head; layout in `store/forms/int2.py`."""

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
    code = codes(ptr, start + vector * (HEAD_DIM // 4), dim, inside, HEAD_DIM, 4).to(tl.float32)
    vectors = (block_tokens * rows * heads).to(tl.int64)  # of keys, or of values
    key_groups = ((block_tokens + 31) // 32 * rows * heads).to(tl.int64)
    halves = (start + 2 * vectors * (HEAD_DIM // 4)) // 2
    if IS_VALUE:
        number = ((token % block_tokens).to(tl.int64) * rows + row) * heads + head
        halves += 2 * key_groups * HEAD_DIM + number * GROUPS
        place = halves_ptr + halves[:, None] + (dim // 32)[None, :]
        step = vectors * GROUPS
    else:
        group = ((token % block_tokens // 32).to(tl.int64) * rows + row) * heads + head
        place = halves_ptr + (halves + group * HEAD_DIM)[:, None] + dim[None, :]
        step = key_groups * HEAD_DIM
    scale = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    least = tl.load(place + step, mask=inside, other=0.0).to(tl.float32)
    return code * scale + least
