"""Triton: partial attention results merged into accumulated ones, and written out at the end.

The same kernel merges one segment's result that someone else computed and the parts into which `segment_attention.py`
splits a segment: one program per row merges all parts; with few rows a segment is split into many parts.
Works in float32; see `reference.merge_` for the arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload.kernels import checks
from kvoffload.kernels.sizes import divided_up, power_of_2

_BLOCK_ELEMENTS = 2048  # of `out` per program
_PARTS_ELEMENTS = 4096  # of parts that a program takes at once
_MAX_HEAD_DIM = 2048


def unsupported(out: Tensor) -> str:
    """Why these kernels cannot work on an accumulator, "" if they can."""
    if out.dtype is not torch.float32:
        return f"accumulators of {out.dtype}"
    if out.shape[-1] > _MAX_HEAD_DIM:
        return f"a head_dim of {out.shape[-1]}, more than {_MAX_HEAD_DIM}"
    return ""


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """As `reference.merge_`, float32 only."""
    checks.merge(out, lse, part_out, part_lse)
    merge_parts(out, lse, part_out, part_lse, num_parts=1, is_first=False)


def merge_parts(
    out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, *, num_parts: int, is_first: bool
) -> None:
    """Merge several results over disjoint tokens into `out` and `lse`, unchecked.

    Args:
        out: float32 [..., head_dim], contiguous; changed in place.
        lse: float32 [...], contiguous; changed in place.
        part_out: float32 [num_parts, ..., head_dim], contiguous.
        part_lse: float32 [num_parts, ...], contiguous.
        num_parts: at least 1.
        is_first: overwrite `out` and `lse` instead of merging into them.
    """
    rows, head_dim = lse.numel(), out.shape[-1]
    if not rows:
        return
    block_dim = power_of_2(head_dim)
    _merge_kernel[(rows,)](
        out,
        lse,
        part_out,
        part_lse,
        rows,
        num_parts,
        int(is_first),
        HEAD_DIM=head_dim,
        BLOCK_PARTS=max(1, _PARTS_ELEMENTS // block_dim),
        BLOCK_DIM=block_dim,
    )


def finish(out: Tensor, lse: Tensor, result: Tensor, sinks: Tensor | None = None) -> None:
    """As `reference.finish`, from float32 only."""
    checks.finish(out, lse, result, sinks)
    _, q_tokens, q_heads, head_dim = out.shape
    rows = lse.numel()
    if not rows:
        return
    block_dim = power_of_2(head_dim)
    block_rows = max(1, _BLOCK_ELEMENTS // block_dim)
    _finish_kernel[(divided_up(rows, block_rows),)](
        out,
        lse,
        result,
        None if sinks is None else sinks.contiguous(),
        rows,
        q_tokens,
        *result.stride(),
        Q_HEADS=q_heads,
        HEAD_DIM=head_dim,
        BLOCK_ROWS=block_rows,
        BLOCK_DIM=block_dim,
    )


@triton.jit
def merged(out: tl.tensor, lse: tl.tensor, part_out: tl.tensor, part_lse: tl.tensor) -> tl.tensor:
    """`out` [rows, head_dim] and `lse` [rows] merged with a part; exact where either side attended to nothing."""
    share = 1.0 / (1.0 + tl.exp(lse - part_lse))  # of the part in the sum of the weights
    share = tl.where(part_lse == float("-inf"), 0.0, share)  # also where neither has any
    step = part_out - out
    near_out = out + share[:, None] * step
    near_part = part_out - (1.0 - share)[:, None] * step
    larger = tl.maximum(lse, part_lse)
    smaller = tl.minimum(lse, part_lse)
    added = tl.log(1.0 + tl.exp(smaller - larger))  # NaN where both are -inf
    total = tl.where(smaller == float("-inf"), larger, larger + added)
    return tl.where(share[:, None] < 0.5, near_out, near_part), total


@triton.jit(do_not_specialize=["rows", "num_parts", "is_first"])
def _merge_kernel(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    part_out_ptr: tl.tensor,
    part_lse_ptr: tl.tensor,
    rows: tl.tensor,
    num_parts: tl.tensor,
    is_first: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    dim = tl.arange(0, BLOCK_DIM)
    acc = tl.zeros((1, BLOCK_DIM), tl.float32)
    highest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        part_row = part.to(tl.int64) * rows + row
        part_lse = tl.load(part_lse_ptr + part_row, mask=part < num_parts, other=float("-inf"))
        both = (part < num_parts)[:, None] & (dim < HEAD_DIM)[None, :]
        part_out = tl.load(part_out_ptr + part_row[:, None] * HEAD_DIM + dim[None, :], mask=both, other=0.0)
        new_highest = tl.maximum(highest, tl.max(part_lse, 0))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # nothing so far: all weights 0, not NaN
        weights = tl.exp(part_lse - base)
        shrink = tl.exp(highest - base)
        acc = acc * shrink[:, None] + tl.sum(weights[:, None] * part_out, 0)[None, :]
        total = total * shrink + tl.sum(weights, 0)
        highest = new_highest
    nothing = total == 0.0
    part_out = acc / tl.where(nothing, 1.0, total)[:, None]
    part_lse = tl.where(nothing, float("-inf"), highest + tl.log(total))
    # what is there may be anything if this is the first, so it is not even read
    keep = is_first == 0
    place = row[:, None] * HEAD_DIM + dim[None, :]
    is_dim = (dim < HEAD_DIM)[None, :]
    out = tl.load(out_ptr + place, mask=is_dim & keep, other=0.0)
    lse = tl.load(lse_ptr + row, mask=keep & (row < rows), other=float("-inf"))
    out, lse = merged(out, lse, part_out, part_lse)
    tl.store(out_ptr + place, out, mask=is_dim)
    tl.store(lse_ptr + row, lse)


@triton.jit(do_not_specialize=["rows", "q_tokens"])
def _finish_kernel(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    result_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    rows: tl.tensor,
    q_tokens: tl.tensor,
    stride_batch: tl.tensor,
    stride_token: tl.tensor,
    stride_head: tl.tensor,
    stride_dim: tl.tensor,
    Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    inside = row < rows
    both = inside[:, None] & (dim < HEAD_DIM)[None, :]
    out = tl.load(out_ptr + row.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :], mask=both, other=0.0)
    head = row % Q_HEADS
    if sinks_ptr is not None:
        lse = tl.load(lse_ptr + row, mask=inside, other=float("-inf"))
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        share = 1.0 / (1.0 + tl.exp(sink - lse))  # of the values, not of the sink
        out *= tl.where(lse == float("-inf"), 0.0, share)[:, None]  # also where the sink is -inf
    batch = (row // (Q_HEADS * q_tokens)).to(tl.int64)
    token = (row // Q_HEADS % q_tokens).to(tl.int64)
    place = batch * stride_batch + token * stride_token + head * stride_head
    tl.store(result_ptr + place[:, None] + dim[None, :] * stride_dim, out, mask=both)
