"""Attention over blocks of another form without a kernel of its own: decoded and attended to piece by piece.

The twin of the Triton kernel, and what runs on the CPU. A piece stays in a core's cache until it is read, so no tensor
of a chunk's full size is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvoffload.kernels import checks, cpu_attention, reference
from kvoffload.kernels.stored import StoredKV

PIECE_BYTES = 2**22  # of K and V in float32


def stored_attention(
    q: Tensor,
    stored: StoredKV,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    is_first: bool,
    first_position: int,
    query_position: int,
    valid: Tensor | None = None,
    row_table: Tensor | None = None,
    block_tokens: int = 0,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Attention of some queries over blocks of another form, merged into what earlier segments gave.

    Keys are those of the form: where it rotates them, queries must have been rotated alike.

    Args:
        q: [batch, q_tokens, q_heads, head_dim].
        stored: the blocks.
        out: as of `reference.segment_attention`, as are `lse` and the other arguments.
        lse: changed in place.
        scale: of the scores.
        is_first: overwrite `out` and `lse`.
        first_position: cache position of the first key.
        query_position: of the first query.
        valid: int32 [batch, words].
        row_table: int32 [blocks, batch], by the blocks of the form.
        block_tokens: of a row of `row_table`: those of the form, or 0 without a table.
        window: of each query.
        softcap: of the scores.

    Raises:
        ValueError: if shapes, dtypes, strides or devices do not fit.
    """
    options: dict[str, Any] = {
        "query_position": query_position,
        "valid": valid,
        "block_tokens": block_tokens,
        "window": window,
        "softcap": softcap,
    }
    checks.stored(q, stored, out, lse, first_position=first_position, row_table=row_table, **options)
    attention = cpu_attention if q.is_cpu else reference
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    query = q.to(dtype)
    block_bytes = stored.block_tokens * stored.rows * 2 * stored.heads * stored.head_dim * dtype.itemsize
    per_piece = max(1, PIECE_BYTES // max(1, block_bytes))
    if not len(stored.data) and is_first:
        out.zero_()
        lse.fill_(-torch.inf)
    for start in range(0, len(stored.data), per_piece):
        stop = start + per_piece
        attention.segment_attention(
            query,
            stored.decoded(start, stop, dtype),
            out,
            lse,
            scale=scale,
            is_first=is_first,
            first_position=first_position + start * stored.block_tokens,
            row_table=None if row_table is None else row_table[start:stop],
            **options,
        )
        is_first = False
