"""Triton: where the bytes of a token are in blocks of a form."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_start(token: tl.tensor, block_tokens: tl.tensor, block_bytes: tl.tensor) -> tl.tensor:
    """Bytes before the block of each token, [T]."""
    return (token // block_tokens).to(tl.int64) * block_bytes


@triton.jit
def vector_of(
    token: tl.tensor,
    row: tl.tensor,
    head: tl.tensor,
    block_tokens: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    IS_VALUE: tl.constexpr,
) -> tl.tensor:
    """Number of each token's key or value among all of its block, in the order [tokens, rows, 2, heads], [T]."""
    return (((token % block_tokens).to(tl.int64) * rows + row) * 2 + IS_VALUE) * heads + head


@triton.jit
def codes(
    ptr: tl.tensor,
    first_byte: tl.tensor,
    dim: tl.tensor,
    inside: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PER_BYTE: tl.constexpr,
) -> tl.tensor:
    """Unsigned codes [T, D] of heads from `first_byte` [T] on: element i is in byte i % (HEAD_DIM / PER_BYTE)."""
    BYTES: tl.constexpr = HEAD_DIM // PER_BYTE
    BITS: tl.constexpr = 8 // PER_BYTE
    found = tl.load(ptr + first_byte[:, None] + (dim % BYTES)[None, :], mask=inside, other=0).to(tl.int32)
    return (found >> (dim // BYTES * BITS)[None, :]) & ((1 << BITS) - 1)
