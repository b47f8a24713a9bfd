"""Triton: attention over a segment of the cache, merged into what earlier segments gave.

One program takes a tile of query rows that share a head of K and V, (query token, head of the group) pairs, and walks
over the tokens that any of them may attend to, so K and V are read once per tile. Where there are too few tiles for the
device, each is computed by several programs over a share of the tokens, and `merge.py` puts the parts together.
Blocks that are stored in another form are read as they lie: the form brings a function (`readers/`) that gives a tile
of keys or values, and the rest is the same kernel.
Source: FlashAttention-2 (arXiv 2307.08691), section 3.1; Flash-Decoding (Dao et al. 2023) for the split over tokens.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload.kernels import checks, tiles
from kvoffload.kernels.merge import merge_parts, merged
from kvoffload.kernels.sizes import divided_up, power_of_2
from kvoffload.kernels.stored import StoredKV

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256


def unsupported(q: Tensor) -> str:
    """Why this kernel cannot work on queries, "" if it can."""
    if q.dtype not in _DTYPES:
        return f"queries of {q.dtype}"
    if q.shape[-1] > _MAX_HEAD_DIM:
        return f"a head_dim of {q.shape[-1]}, more than {_MAX_HEAD_DIM}"
    if tiles.processors(q.device) == 0:
        return f"compute capability below 8.0, as that of {q.device}"
    return ""


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
    """As `reference.segment_attention`, for the dtypes and head sizes that `unsupported` has nothing against."""
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
    _launch(
        q,
        out,
        lse,
        (kv, None, 0, 0, *kv.stride()[:4]),
        None,
        tokens,
        kv_heads,
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
    """As `pieces.stored_attention`, reading blocks as they lie."""
    options: dict[str, Any] = {
        "first_position": first_position,
        "query_position": query_position,
        "valid": valid,
        "row_table": row_table,
        "window": window,
        "softcap": softcap,
    }
    checks.stored(q, stored, out, lse, block_tokens=block_tokens, **options)
    _launch(
        q,
        out,
        lse,
        (stored.data, stored.data.view(torch.float16), stored.data.stride(0), stored.rows, 0, 0, 0, 0),
        reader(stored.name),
        stored.num_tokens,
        stored.heads,
        scale=scale,
        is_first=is_first,
        block_tokens=stored.block_tokens,
        **options,
    )


@functools.cache
def reader(name: str) -> Any:
    """The function that reads tiles of a form."""
    return importlib.import_module(f"kvoffload.kernels.readers.{name}").read


def _launch(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    memory: tuple[Any, ...],
    read: Any,
    tokens: int,
    kv_heads: int,
    *,
    scale: float,
    is_first: bool,
    first_position: int,
    query_position: int,
    valid: Tensor | None,
    row_table: Tensor | None,
    block_tokens: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """Launch the kernel, and put together what it computed in parts.

    Args:
        memory: the bytes of K and V as the kernel takes them: where they are, the same as float16, bytes of a block and
            its rows (of a form), strides of a token, a row, K to V, and a head (of K and V as they are).
        read: of the form; None: K and V as they are.
    """
    if reason := unsupported(q):
        raise ValueError(f"the kernel cannot do {reason}")
    batch, q_tokens, q_heads, head_dim = q.shape
    if not q.numel():
        return
    groups = q_heads // kv_heads
    rows, capability = q_tokens * groups, tiles.capability(q.device)
    tile = tiles.tile(head_dim, q.element_size(), rows, capability, is_decoded=read is not None)
    num_tiles = divided_up(q_tokens * groups, tile.rows)
    programs = batch * kv_heads * num_tiles
    parts, part_tokens = tiles.split(tokens, tile.block_tokens, programs, tiles.processors(q.device))
    to_out, to_lse = out, lse
    if parts > 1:
        to_out, to_lse = out.new_empty(parts, *out.shape), lse.new_empty(parts, *lse.shape)
    stages = tile.stages if read is None else min(2, tile.stages)  # what is read is no tile of memory yet
    _segment_kernel[(batch * kv_heads, num_tiles, parts)](
        q,
        *memory[:2],
        to_out,
        to_lse,
        valid,
        row_table,
        scale,
        softcap,
        tokens,
        part_tokens,
        first_position,
        query_position,
        window,
        max(block_tokens, 1),
        batch,
        q_tokens,
        kv_heads,
        *memory[2:4],
        *q.stride()[:3],
        *memory[4:],
        0 if valid is None else valid.stride(0),
        0 if row_table is None else row_table.stride(0),
        GROUPS=groups,
        HEAD_DIM=head_dim,
        TILE_ROWS=tile.rows,
        BLOCK_TOKENS=tile.block_tokens,
        BLOCK_DIM=max(16, power_of_2(head_dim)),
        MERGE=parts == 1 and not is_first,
        ONE_ROW=block_tokens % tile.block_tokens == 0,
        READ=read,
        # fetching the row first takes a stage before each that it leads to
        num_stages=stages if row_table is None else 2 * stages - 1,
        num_warps=tile.warps,
    )
    if parts > 1:
        merge_parts(out, lse, to_out, to_lse, num_parts=parts, is_first=is_first)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """Accurate to float32 also near 0, where 1 - exp(-2x) is not: there by the Padé approximant [5/4]."""
    t = x * x
    small = x * (945.0 + t * (105.0 + t)) / (945.0 + t * (420.0 + t * 15.0))
    shrunk = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(t < 0.36, small, tl.where(x < 0, -large, large))


@triton.jit
def _attend(
    tile_q: tl.tensor,
    acc: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    start: tl.tensor,
    kv_ptr: tl.tensor,
    halves_ptr: tl.tensor,
    valid_ptr: tl.tensor,
    row_table_ptr: tl.tensor,
    sequence: tl.tensor,
    kv_head: tl.tensor,
    kv_heads: tl.tensor,
    block_bytes: tl.tensor,
    block_rows: tl.tensor,
    scale_log2: tl.tensor,
    softcap: tl.tensor,
    tokens: tl.tensor,
    first_position: tl.tensor,
    q_position: tl.tensor,
    window: tl.tensor,
    block_tokens: tl.tensor,
    stride_kv_token: tl.tensor,
    stride_kv_row: tl.tensor,
    stride_kv_two: tl.tensor,
    stride_table: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ONE_ROW: tl.constexpr,
    TAIL: tl.constexpr,
    READ: tl.constexpr,
) -> tl.tensor:
    """One step over the tokens from `start` on: `acc`, highest score and total weight of each query row, renewed."""
    token = start + tl.arange(0, BLOCK_TOKENS)
    dim = tl.arange(0, BLOCK_DIM)
    if READ is not None:
        row = tl.zeros((BLOCK_TOKENS,), tl.int64) + sequence
        if row_table_ptr is not None:
            place = row_table_ptr + (token // block_tokens).to(tl.int64) * stride_table
            row = tl.load(place, mask=token < tokens, other=0).to(tl.int64)
        keys = READ(
            kv_ptr, halves_ptr, token, row, kv_head, dim, token < tokens, block_tokens, block_bytes, block_rows,
            kv_heads, 0, HEAD_DIM,
        ).to(tile_q.dtype)  # fmt: skip
        values = READ(
            kv_ptr, halves_ptr, token, row, kv_head, dim, token < tokens, block_tokens, block_bytes, block_rows,
            kv_heads, 1, HEAD_DIM,
        ).to(tile_q.dtype)  # fmt: skip
    else:
        place = token.to(tl.int64) * stride_kv_token
        if row_table_ptr is not None:
            if ONE_ROW:
                row = tl.load(row_table_ptr + (start // block_tokens).to(tl.int64) * stride_table)
            elif TAIL:
                row = tl.load(
                    row_table_ptr + (token // block_tokens).to(tl.int64) * stride_table, mask=token < tokens, other=0
                )
            else:
                row = tl.load(row_table_ptr + (token // block_tokens).to(tl.int64) * stride_table)
            place += row.to(tl.int64) * stride_kv_row
        places = kv_ptr + place[:, None] + dim[None, :]  # [BLOCK_TOKENS, BLOCK_DIM]
        if TAIL:
            inside = (token < tokens)[:, None] & (dim < HEAD_DIM)[None, :]
            keys = tl.load(places, mask=inside, other=0.0)
            values = tl.load(places + stride_kv_two, mask=inside, other=0.0)
        elif HEAD_DIM != BLOCK_DIM:
            keys = tl.load(places, mask=(dim < HEAD_DIM)[None, :], other=0.0)
            values = tl.load(places + stride_kv_two, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        else:
            keys = tl.load(places)
            values = tl.load(places + stride_kv_two)
    scores = tl.dot(tile_q, tl.trans(keys), input_precision="ieee")  # [TILE_ROWS, BLOCK_TOKENS]
    if softcap is not None:
        scores = softcap * 1.4426950408889634 * _tanh(scores * (scale_log2 * 0.6931471805599453 / softcap))
    else:
        scores *= scale_log2
    position = first_position + token
    allowed = (position[None, :] <= q_position[:, None]) & (token < tokens)[None, :]
    if window is not None:
        allowed &= position[None, :] > q_position[:, None] - window
    if valid_ptr is not None:
        word = tl.load(valid_ptr + position // 32, mask=token < tokens, other=0)
        allowed &= ((word >> (position % 32)) & 1)[None, :] != 0
    scores = tl.where(allowed, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # nothing allowed so far: all weights 0, not NaN
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, new_highest, total


@triton.jit(
    do_not_specialize=[
        "tokens",
        "part_tokens",
        "first_position",
        "query_position",
        "window",
        "block_tokens",
        "batch",
        "q_tokens",
        "kv_heads",
        "block_rows",
        "stride_valid",
        "stride_table",
    ],
    do_not_specialize_on_alignment=["valid_ptr", "row_table_ptr"],
)
def _segment_kernel(
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    halves_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    valid_ptr: tl.tensor,
    row_table_ptr: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    tokens: tl.tensor,
    part_tokens: tl.tensor,
    first_position: tl.tensor,
    query_position: tl.tensor,
    window: tl.tensor,
    block_tokens: tl.tensor,
    batch: tl.tensor,
    q_tokens: tl.tensor,
    kv_heads: tl.tensor,
    block_bytes: tl.tensor,
    block_rows: tl.tensor,
    stride_q_batch: tl.tensor,
    stride_q_token: tl.tensor,
    stride_q_head: tl.tensor,
    stride_kv_token: tl.tensor,
    stride_kv_row: tl.tensor,
    stride_kv_two: tl.tensor,
    stride_kv_head: tl.tensor,
    stride_valid: tl.tensor,
    stride_table: tl.tensor,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    MERGE: tl.constexpr,
    ONE_ROW: tl.constexpr,
    READ: tl.constexpr,
) -> None:
    # neighbouring programs read neighbouring memory: heads, then sequences
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    sequence = (tl.program_id(0) // kv_heads).to(tl.int64)
    part = tl.program_id(2)

    tile_row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    q_token = tile_row // GROUPS
    q_head = kv_head * GROUPS + tile_row % GROUPS
    q_position = query_position + q_token
    dim = tl.arange(0, BLOCK_DIM)
    is_query = (q_token < q_tokens)[:, None] & (dim < HEAD_DIM)[None, :]
    q_place = sequence * stride_q_batch + q_token.to(tl.int64) * stride_q_token + q_head * stride_q_head
    tile_q = tl.load(q_ptr + q_place[:, None] + dim[None, :], mask=is_query, other=0.0)

    if READ is None:
        kv_ptr += kv_head * stride_kv_head
    if row_table_ptr is not None:
        row_table_ptr += sequence
    elif READ is None:
        kv_ptr += sequence * stride_kv_row
    if valid_ptr is not None:
        valid_ptr += sequence * stride_valid

    # the tokens of this part that any query of this tile may attend to
    first_query = query_position + tl.program_id(1) * TILE_ROWS // GROUPS
    last_query = query_position + tl.minimum(q_tokens - 1, (tl.program_id(1) * TILE_ROWS + TILE_ROWS - 1) // GROUPS)
    begin = part * part_tokens
    end = tl.minimum(tl.minimum(begin + part_tokens, tokens), last_query + 1 - first_position)
    if window is not None:
        seen = tl.maximum(0, first_query + 1 - window - first_position)
        begin = tl.maximum(begin, seen // BLOCK_TOKENS * BLOCK_TOKENS)
    steps = tl.maximum(0, end - begin + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    whole_end = tl.minimum(begin + steps * BLOCK_TOKENS, tokens // BLOCK_TOKENS * BLOCK_TOKENS)

    acc = tl.zeros((TILE_ROWS, BLOCK_DIM), tl.float32)
    highest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_ROWS,), tl.float32)
    scale_log2 = scale * 1.4426950408889634
    for start in tl.range(begin, whole_end, BLOCK_TOKENS):
        acc, highest, total = _attend(
            tile_q, acc, highest, total, start, kv_ptr, halves_ptr, valid_ptr, row_table_ptr, sequence, kv_head,
            kv_heads, block_bytes, block_rows, scale_log2, softcap, tokens, first_position, q_position, window,
            block_tokens, stride_kv_token, stride_kv_row, stride_kv_two, stride_table, HEAD_DIM, BLOCK_TOKENS,
            BLOCK_DIM, ONE_ROW, False, READ,
        )  # fmt: skip
    if tl.maximum(begin, whole_end) < end:
        acc, highest, total = _attend(
            tile_q, acc, highest, total, tl.maximum(begin, whole_end), kv_ptr, halves_ptr, valid_ptr, row_table_ptr,
            sequence, kv_head, kv_heads, block_bytes, block_rows, scale_log2, softcap, tokens, first_position,
            q_position, window, block_tokens, stride_kv_token, stride_kv_row, stride_kv_two, stride_table, HEAD_DIM,
            BLOCK_TOKENS, BLOCK_DIM, ONE_ROW, True, READ,
        )  # fmt: skip

    nothing = total == 0.0
    part_out = acc / tl.where(nothing, 1.0, total)[:, None]
    part_lse = tl.where(nothing, float("-inf"), (highest + tl.log2(total)) * 0.6931471805599453)
    row = (sequence * q_tokens + q_token) * (kv_heads * GROUPS) + q_head
    if MERGE:
        out = tl.load(out_ptr + row[:, None] * HEAD_DIM + dim[None, :], mask=is_query, other=0.0)
        lse = tl.load(lse_ptr + row, mask=q_token < q_tokens, other=float("-inf"))
        part_out, part_lse = merged(out, lse, part_out, part_lse)
    rows = batch.to(tl.int64) * q_tokens * (kv_heads * GROUPS)
    row += part * rows
    tl.store(out_ptr + row[:, None] * HEAD_DIM + dim[None, :], part_out, mask=is_query)
    tl.store(lse_ptr + row, part_lse, mask=q_token < q_tokens)
