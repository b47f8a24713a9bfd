"""Attention over a segment of the cache on the CPU, through the operator behind torch's own attention there.

That operator also returns the log-sum-exp, reads K and V with any strides and takes a mask. Query heads that share a
head of K and V become further query rows of it, so K and V are neither repeated nor read twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvoffload.kernels import checks, reference

_FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)

# Copies in float32 that stay in a core's cache until they are read: a chunk is converted in such pieces.
_PIECE_BYTES = 2**21

# Bit i of a word of `valid`.
_BITS = torch.tensor([*(1 << i for i in range(31)), -(1 << 31)], dtype=torch.int32, device="cpu")


def segment_attention(
    q: Tensor,
    kv: Tensor,
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
    """As `reference.segment_attention`, which it calls for what torch's operator cannot do (`softcap`)."""
    if softcap is not None or _FLASH is None:
        reference.segment_attention(
            q,
            kv,
            out,
            lse,
            scale=scale,
            is_first=is_first,
            first_position=first_position,
            query_position=query_position,
            valid=valid,
            row_table=row_table,
            block_tokens=block_tokens,
            window=window,
            softcap=softcap,
        )
        return
    checks.segment(
        q,
        kv,
        out,
        lse,
        first_position=first_position,
        query_position=query_position,
        valid=valid,
        row_table=row_table,
        block_tokens=block_tokens,
        window=window,
        softcap=softcap,
    )
    q_tokens = q.shape[1]
    # tokens that any of the queries may attend to
    begin = 0 if window is None else max(0, query_position - window + 1 - first_position)
    end = min(kv.shape[0], query_position + q_tokens - first_position)
    if begin >= end or not q.numel():
        if is_first:
            out.zero_()
            lse.fill_(-torch.inf)
        return
    if row_table is not None:
        kv = _stored_rows(kv, row_table, block_tokens, begin, end)
    elif end - begin < kv.shape[0]:
        kv = kv[begin:end]
    first_position += begin
    blocked = _blocked(q_tokens, end - begin, first_position, query_position, valid, window)

    batch, _, q_heads, head_dim = q.shape
    kv_heads = kv.shape[3]
    groups = q_heads // kv_heads
    if groups == 1:
        rows = q.transpose(1, 2)
    else:
        if blocked is not None and blocked.shape[1] > 1:
            blocked = blocked.repeat_interleave(groups, 1)
        rows = q.view(batch, q_tokens, kv_heads, groups, head_dim).transpose(1, 2)
        rows = rows.reshape(batch, kv_heads, q_tokens * groups, head_dim)
    for part_out, part_lse in _parts(rows, kv, blocked, scale):
        if groups == 1:
            part_out, part_lse = part_out.transpose(1, 2), part_lse.transpose(1, 2)
        else:
            part_out = part_out.view(batch, kv_heads, q_tokens, groups, head_dim).transpose(1, 2).reshape(out.shape)
            part_lse = part_lse.view(batch, kv_heads, q_tokens, groups).transpose(1, 2).reshape(lse.shape)
        if part_out.dtype != out.dtype:
            part_out = part_out.to(out.dtype)
        if is_first:
            out.copy_(part_out)
            lse.copy_(part_lse)
            is_first = False
        else:
            reference.combine_(out, lse, part_out, part_lse, may_be_empty=blocked is not None)


def _parts(rows: Tensor, kv: Tensor, blocked: Tensor | None, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention of query rows `[batch, kv_heads, rows, head_dim]` over the tokens, in one part or several.

    The operator is many times slower on float16 than on copies in float32, also on bfloat16 for a single row, since
    matrix times vector is not vectorised there.
    """
    piece_tokens = tokens = kv.shape[0]
    if convert := rows.dtype is torch.float16 or (rows.dtype is torch.bfloat16 and rows.shape[2] == 1):
        rows = rows.float()
        piece_tokens = max(32, _PIECE_BYTES // (kv[0].numel() * rows.element_size()))
    for start in range(0, tokens, piece_tokens):
        piece = kv if piece_tokens >= tokens else kv[start : start + piece_tokens]
        keys, values = (piece.float() if convert else piece).permute(2, 1, 3, 0, 4).unbind(0)
        if blocked is None:
            yield _FLASH.default(rows, keys, values, scale=scale)
            continue
        part_blocked = blocked[..., start : start + piece_tokens].unsqueeze(1)  # [batch or 1, 1, rows or 1, keys]
        mask = torch.where(part_blocked, -torch.inf, 0.0)
        part_out, part_lse = _FLASH.default(rows, keys, values, attn_mask=mask, scale=scale)
        nothing = part_blocked.all(-1)
        if nothing.any():  # the operator gives such rows an lse of 0
            part_out = part_out.masked_fill(nothing.unsqueeze(-1), 0.0)
            part_lse = part_lse.masked_fill(nothing, -torch.inf)
        yield part_out, part_lse


def _blocked(
    q_tokens: int, tokens: int, first_position: int, query_position: int, valid: Tensor | None, window: int | None
) -> Tensor | None:
    """Which keys each query may not attend to, bool [batch or 1, q_tokens or 1, tokens]; None: each may to all."""
    blocked = None
    last_query = query_position + q_tokens - 1
    if first_position + tokens - 1 > query_position or (window is not None and first_position <= last_query - window):
        device = torch.device("cpu")
        blocked = ~reference.allowed_keys(q_tokens, tokens, first_position, query_position, window, device)
    if valid is not None:
        word = first_position // 32
        words = valid[:, word : (first_position + tokens + 31) // 32].unsqueeze(-1)
        skipped = first_position - 32 * word
        unset = ((words & _BITS) == 0).view(valid.shape[0], 1, -1)[..., skipped : skipped + tokens]
        if unset.any():
            blocked = unset if blocked is None else blocked | unset
    return blocked


def _stored_rows(kv: Tensor, row_table: Tensor, block_tokens: int, begin: int, end: int) -> Tensor:
    """K/V [end - begin, batch, 2, kv_heads, head_dim] as the row table has them, copied only where rows moved."""
    blocks = row_table[begin // block_tokens : (end - 1) // block_tokens + 1].tolist()
    identity = list(range(row_table.shape[1]))
    if all(rows == identity for rows in blocks):
        return kv[begin:end, : len(identity)]
    moved = kv.new_empty(end - begin, len(identity), *kv.shape[2:])
    ends = [*range((begin // block_tokens + 1) * block_tokens, end, block_tokens), end]
    for rows, start, stop in zip(blocks, [begin, *ends], ends, strict=False):
        torch.index_select(kv[start:stop], 1, torch.tensor(rows), out=moved[start - begin : stop - begin])
    return moved
