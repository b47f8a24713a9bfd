"""Triton: keys from activations in one pass, `x @ weight.T + bias` and the rotary embedding of the result.

A candidate for `torch.mm` followed by `rope.py`: it saves one read and one write of the keys, and has to make up for
being slower than the vendor's matrix product. `ops` keeps the two steps until measurements say otherwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload.kernels import checks
from kvoffload.kernels.sizes import divided_up, power_of_2

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_GROUP_ROWS = 8  # tiles of rows that are worked on together, so that a head's weights are found in the L2 cache


def unsupported(x: Tensor, head_dim: int) -> str:
    """Why this kernel cannot work on activations, "" if it can."""
    if x.dtype not in _DTYPES:
        return f"activations of {x.dtype}"
    if head_dim % 2 or head_dim > _MAX_HEAD_DIM:
        return f"a head_dim of {head_dim}, odd or more than {_MAX_HEAD_DIM}"
    return ""


def linear_rope(x: Tensor, weight: Tensor, bias: Tensor | None, keys: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As `reference.linear_rope`, summed and rotated in float32 and rounded once."""
    checks.linear_rope(x, weight, bias, keys, cos, sin)
    _, rows, heads, head_dim = keys.shape
    if reason := unsupported(x, head_dim):
        raise ValueError(f"the kernel cannot do {reason}")
    if not keys.numel():
        return
    m, hidden = x.shape
    block_half = max(16, power_of_2(head_dim // 2))
    full_size = x.element_size() == 4  # without tensor cores, smaller tiles for the same registers
    most_rows = 32 if full_size else 128 if block_half <= 64 else 64  # two sums of a row for each index of `block_half`
    block_m = min(most_rows, max(16, power_of_2(m)))
    block_k = min(16 if full_size else 64, max(16, power_of_2(hidden)))
    one_row = cos.shape[1] == 1
    _linear_rope_kernel[(divided_up(m, block_m) * heads,)](
        x,
        weight,
        bias,
        keys,
        cos,
        sin,
        m,
        hidden,
        rows,
        heads,
        x.stride(0),
        weight.stride(0),
        *keys.stride()[:3],
        cos.stride(0),
        0 if one_row else cos.stride(1),
        cos.stride(2),
        sin.stride(0),
        0 if one_row else sin.stride(1),
        sin.stride(2),
        HEAD_DIM=head_dim,
        ROTARY_DIM=cos.shape[2],
        GROUP_ROWS=_GROUP_ROWS,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_HALF=block_half,
        EVEN_K=hidden % block_k == 0,
        num_stages=3,
        num_warps=8 if block_m > 16 else 4,
    )


@triton.jit(do_not_specialize=["m", "rows", "heads"])
def _linear_rope_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    m: tl.tensor,
    hidden: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    stride_x: tl.tensor,
    stride_weight: tl.tensor,
    stride_token: tl.tensor,
    stride_row: tl.tensor,
    stride_head: tl.tensor,
    stride_cos_token: tl.tensor,
    stride_cos_row: tl.tensor,
    stride_cos_dim: tl.tensor,
    stride_sin_token: tl.tensor,
    stride_sin_row: tl.tensor,
    stride_sin_dim: tl.tensor,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    EVEN_K: tl.constexpr,
) -> None:
    # GROUP_ROWS tiles of rows times all heads, then the next tiles
    group = tl.program_id(0) // (GROUP_ROWS * heads)
    group_rows = tl.minimum(tl.cdiv(m, BLOCK_M) - group * GROUP_ROWS, GROUP_ROWS)
    within = tl.program_id(0) % (GROUP_ROWS * heads)
    head = within // group_rows
    x_row = (group * GROUP_ROWS + within % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = x_row < m

    # Two columns of a head per index, those that are rotated against each other; behind them the rest of the head.
    idx = tl.arange(0, BLOCK_HALF)
    turned = idx < ROTARY_DIM // 2
    first = tl.where(turned, idx, idx + ROTARY_DIM // 2)
    second = first + tl.where(turned, ROTARY_DIM // 2, (HEAD_DIM - ROTARY_DIM) // 2)
    is_dim = idx < HEAD_DIM // 2

    k = tl.arange(0, BLOCK_K)
    x_places = x_ptr + x_row.to(tl.int64)[:, None] * stride_x + k[None, :]
    weight_row = (head * HEAD_DIM).to(tl.int64) + idx * 0
    first_places = weight_ptr + (weight_row + first)[None, :] * stride_weight + k[:, None]
    second_places = weight_ptr + (weight_row + second)[None, :] * stride_weight + k[:, None]
    sum_first = tl.zeros((BLOCK_M, BLOCK_HALF), tl.float32)
    sum_second = tl.zeros((BLOCK_M, BLOCK_HALF), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_places, mask=is_row[:, None], other=0.0)
            weight_first = tl.load(first_places, mask=is_dim[None, :], other=0.0)
            weight_second = tl.load(second_places, mask=is_dim[None, :], other=0.0)
        else:
            is_k = k < hidden - start
            x = tl.load(x_places, mask=is_row[:, None] & is_k[None, :], other=0.0)
            weight_first = tl.load(first_places, mask=is_dim[None, :] & is_k[:, None], other=0.0)
            weight_second = tl.load(second_places, mask=is_dim[None, :] & is_k[:, None], other=0.0)
        sum_first = tl.dot(x, weight_first, sum_first, input_precision="ieee")
        sum_second = tl.dot(x, weight_second, sum_second, input_precision="ieee")
        x_places += BLOCK_K
        first_places += BLOCK_K
        second_places += BLOCK_K

    if bias_ptr is not None:
        bias_ptr += head * HEAD_DIM
        sum_first += tl.load(bias_ptr + first, mask=is_dim, other=0.0).to(tl.float32)[None, :]
        sum_second += tl.load(bias_ptr + second, mask=is_dim, other=0.0).to(tl.float32)[None, :]

    token, row = (x_row // rows).to(tl.int64)[:, None], (x_row % rows).to(tl.int64)[:, None]
    is_turned = is_row[:, None] & turned[None, :]
    cos_places = cos_ptr + token * stride_cos_token + row * stride_cos_row
    sin_places = sin_ptr + token * stride_sin_token + row * stride_sin_row
    cos_first = tl.load(cos_places + first[None, :] * stride_cos_dim, mask=is_turned, other=1.0).to(tl.float32)
    sin_first = tl.load(sin_places + first[None, :] * stride_sin_dim, mask=is_turned, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_places + second[None, :] * stride_cos_dim, mask=is_turned, other=1.0).to(tl.float32)
    sin_second = tl.load(sin_places + second[None, :] * stride_sin_dim, mask=is_turned, other=0.0).to(tl.float32)

    places = keys_ptr + token * stride_token + row * stride_row + head.to(tl.int64) * stride_head
    inside = is_row[:, None] & is_dim[None, :]
    tl.store(places + first[None, :], sum_first * cos_first - sum_second * sin_first, mask=inside)
    tl.store(places + second[None, :], sum_second * cos_second + sum_first * sin_second, mask=inside)
