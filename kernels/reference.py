"""PyTorch twins of the kernels: the definition of truth on any device.

Attention over a long cache is computed segment by segment. Each segment has its own softmax, kept as the weighted mean
of the values (`out`) and the logarithm of the sum of the weights (`lse`); two such results over disjoint tokens merge
into that of their union. Source: Milakov and Gimelshein (arXiv 1805.02867); FlashAttention (arXiv 2205.14135), 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvoffload.kernels import checks


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
    """Attention of some queries over one segment of the cache, merged into what earlier segments gave.

    Key token j has the cache position `first_position + j`, query token i `query_position + i`. A query attends to keys
    at its position or before, within its window, where `valid` has their bit. A query that may attend to nothing in any
    segment so far has `out` 0 and `lse` -inf. K and V must be finite, also where nothing attends to them.

    Args:
        q: [batch, q_tokens, q_heads, head_dim], any strides but unit stride in head_dim.
        kv: [tokens, rows, 2, kv_heads, head_dim], keys at index 0 and values at 1, dtype of q, unit stride in head_dim;
            `q_heads / kv_heads` neighbouring heads of q share a head of kv. May have no tokens.
        out: float32 (float64 for q of float64) [batch, q_tokens, q_heads, head_dim], contiguous; changed in place.
        lse: as out, [batch, q_tokens, q_heads], contiguous, natural logarithm; changed in place.
        scale: factor of the scores, before `softcap`.
        is_first: overwrite `out` and `lse`, whatever they hold, instead of merging into them.
        first_position: cache position of the first key of this segment.
        query_position: cache position of the first query.
        valid: int32 [batch, words]: bit `p % 32` of word `p // 32` tells whether cache position p may be attended to.
            None: all may.
        row_table: int32 [blocks, batch], for each run of `block_tokens` tokens of this segment the row of `kv` in which
            each sequence is stored. None: row i is sequence i.
        block_tokens: tokens per row of `row_table`.
        window: a query attends to that many positions, its own the last. None: to all before it.
        softcap: scores become `softcap * tanh(scores / softcap)`.

    Raises:
        ValueError: if shapes, dtypes, strides or devices do not fit.
    """
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
    tokens, _, _, kv_heads, _ = kv.shape
    if row_table is not None:
        kv = gather_rows(kv, row_table, block_tokens)
    keys, values = kv.to(out.dtype).unbind(2)  # [tokens, batch, kv_heads, head_dim]
    grouped = q.to(out.dtype).unflatten(2, (kv_heads, -1))  # [batch, q_tokens, kv_heads, groups, head_dim]
    scores = torch.einsum("bihgd,jbhd->bihgj", grouped, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = allowed_keys(q.shape[1], tokens, first_position, query_position, window, q.device)
    if valid is not None:
        allowed = allowed & valid_bits(valid, first_position, tokens)[:, None]
    scores = scores.masked_fill(~allowed[:, :, None, None], -torch.inf)
    part_lse = scores.logsumexp(-1)
    weights = scores.softmax(-1).masked_fill_(part_lse.isneginf().unsqueeze(-1), 0.0)  # nothing to attend to: 0
    part_out = torch.einsum("bihgj,jbhd->bihgd", weights, values).flatten(2, 3)
    part_lse = part_lse.flatten(2, 3)
    if is_first:
        out.copy_(part_out)
        lse.copy_(part_lse)
    else:
        combine_(out, lse, part_out, part_lse)


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge the result of one segment into that of others, in place; exact where either side attended to nothing.

    Args:
        out: float32 [batch, q_tokens, q_heads, head_dim], contiguous; changed in place. `part_out` likewise, read.
        lse: float32 [batch, q_tokens, q_heads], contiguous; changed in place. `part_lse` likewise, read.

    Raises:
        ValueError: if shapes, dtypes, strides or devices do not fit.
    """
    checks.merge(out, lse, part_out, part_lse)
    combine_(out, lse, part_out, part_lse)


def combine_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, *, may_be_empty: bool = True) -> None:
    """`merge_` without its checks: any strides and leading dimensions, those of `lse` and head_dim for `out`.

    With `may_be_empty=False` every query attended to something in the part, which saves asking.
    """
    share = torch.sigmoid(part_lse - lse)  # of the part in the sum of the weights
    if may_be_empty:
        share.masked_fill_(part_lse.isneginf(), 0.0)  # also where neither has any
    out.lerp_(part_out, share.unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)


def finish(out: Tensor, lse: Tensor, result: Tensor, sinks: Tensor | None = None) -> None:
    """Write the attention of all segments where the model wants it.

    Args:
        out: float32 [batch, q_tokens, q_heads, head_dim], contiguous.
        lse: float32 [batch, q_tokens, q_heads], contiguous.
        result: [batch, q_tokens, q_heads, head_dim], any strides; overwritten, in its own dtype.
        sinks: [q_heads], one more logit per head that has no value: it takes its share of the weight, once.

    Raises:
        ValueError: if shapes, dtypes, strides or devices do not fit.

    Source: StreamingLLM (arXiv 2309.17453), section 3.3, for sinks.
    """
    checks.finish(out, lse, result, sinks)
    if sinks is None:
        result.copy_(out)
    else:
        share = torch.sigmoid(lse - sinks.to(lse.dtype))  # of the values, not of the sink
        share.masked_fill_(lse.isneginf(), 0.0)  # also where the sink is -inf
        result.copy_(out * share.unsqueeze(-1))


def rope_(keys: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary position embedding in place, on the first `rotary_dim` of each head, halves rotated against each other.

    Computes in the dtype of the keys, in the order of operations of transformers' `apply_rotary_pos_emb`.

    Args:
        keys: [tokens, rows, heads, head_dim], any strides; changed in place.
        cos: [tokens, rows or 1, rotary_dim]; sin likewise.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.

    Source: RoFormer (arXiv 2104.09864), section 3.4.
    """
    checks.rope(keys, cos, sin)
    rotary_dim = cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [tokens, rows or 1, 1, rotary_dim]
    part = keys[..., :rotary_dim]
    first, second = part.chunk(2, dim=-1)
    half = rotary_dim // 2
    new_first = first * cos[..., :half] + (-second) * sin[..., :half]
    new_second = second * cos[..., half:] + first * sin[..., half:]
    first.copy_(new_first)
    second.copy_(new_second)


def linear_rope(x: Tensor, weight: Tensor, bias: Tensor | None, keys: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Keys from activations: a linear projection and the rotary embedding of its result.

    Args:
        x: [tokens * rows, hidden], unit stride in hidden.
        weight: [heads * head_dim, hidden], unit stride in hidden.
        bias: [heads * head_dim], or None.
        keys: [tokens, rows, heads, head_dim], unit stride in head_dim; overwritten.
        cos: [tokens, rows or 1, rotary_dim]; sin likewise.

    Raises:
        ValueError: if shapes, dtypes, strides or devices do not fit.
    """
    checks.linear_rope(x, weight, bias, keys, cos, sin)
    keys.copy_(torch.nn.functional.linear(x, weight, bias).view(keys.shape))
    rope_(keys, cos, sin)


def gather_rows(kv: Tensor, row_table: Tensor, block_tokens: int) -> Tensor:
    """K/V `[tokens, batch, 2, kv_heads, head_dim]` as the row table has them."""
    tokens = kv.shape[0]
    token_idx = torch.arange(tokens, device=kv.device)
    return kv[token_idx[:, None], row_table[token_idx // block_tokens].long()]


def allowed_keys(
    q_tokens: int, tokens: int, first_position: int, query_position: int, window: int | None, device: torch.device
) -> Tensor:
    """Which keys are causal and within the window, bool [1, q_tokens, tokens]."""
    keys = first_position + torch.arange(tokens, device=device)
    queries = query_position + torch.arange(q_tokens, device=device)[:, None]
    allowed = keys <= queries
    if window is not None:
        allowed = allowed & (keys > queries - window)
    return allowed[None]


def valid_bits(valid: Tensor, first_position: int, tokens: int) -> Tensor:
    """Which positions of a segment `valid` has bits for, bool [batch, tokens]."""
    positions = first_position + torch.arange(tokens, device=valid.device)
    return (valid[:, positions // 32] >> (positions % 32) & 1).bool()
