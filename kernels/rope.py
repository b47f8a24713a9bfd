"""Triton: rotary position embedding of keys where they lie, one read and one write of each.

Computes in float32 and rounds once, unlike `reference.rope_`, which rounds where transformers does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload.kernels import checks
from kvoffload.kernels.sizes import divided_up, power_of_2

_BLOCK_ELEMENTS = 2048  # pairs of numbers per program and step
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(keys: Tensor) -> str:
    """Why this kernel cannot work on keys, "" if it can."""
    if keys.dtype not in _DTYPES:
        return f"keys of {keys.dtype}"
    return ""


def rope_(keys: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As `reference.rope_`, with arithmetic in float32."""
    checks.rope(keys, cos, sin)
    if reason := unsupported(keys):
        raise ValueError(f"the kernel cannot do {reason}")
    tokens, rows, heads, _ = keys.shape
    if not keys.numel():
        return
    half = cos.shape[2] // 2
    block_half = power_of_2(half)
    block_heads = min(power_of_2(heads), max(1, _BLOCK_ELEMENTS // block_half))
    one_row = cos.shape[1] == 1
    _rope_kernel[(tokens * rows, divided_up(heads, block_heads))](
        keys,
        cos,
        sin,
        rows,
        heads,
        *keys.stride(),
        cos.stride(0),
        0 if one_row else cos.stride(1),
        cos.stride(2),
        sin.stride(0),
        0 if one_row else sin.stride(1),
        sin.stride(2),
        HALF=half,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
    )


@triton.jit(do_not_specialize=["rows", "heads"])
def _rope_kernel(
    keys_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    stride_token: tl.tensor,
    stride_row: tl.tensor,
    stride_head: tl.tensor,
    stride_dim: tl.tensor,
    stride_cos_token: tl.tensor,
    stride_cos_row: tl.tensor,
    stride_cos_dim: tl.tensor,
    stride_sin_token: tl.tensor,
    stride_sin_row: tl.tensor,
    stride_sin_dim: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    token = (tl.program_id(0) // rows).to(tl.int64)
    row = (tl.program_id(0) % rows).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, BLOCK_HALF)
    is_dim = dim < HALF

    cos_ptr += token * stride_cos_token + row * stride_cos_row + dim * stride_cos_dim
    sin_ptr += token * stride_sin_token + row * stride_sin_row + dim * stride_sin_dim
    cos_first = tl.load(cos_ptr, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin_ptr, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos_ptr + HALF * stride_cos_dim, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin_ptr + HALF * stride_sin_dim, mask=is_dim, other=0.0).to(tl.float32)[None, :]

    keys_ptr += token * stride_token + row * stride_row
    places = keys_ptr + head.to(tl.int64)[:, None] * stride_head + dim[None, :] * stride_dim
    inside = (head < heads)[:, None] & is_dim[None, :]
    first = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(places + HALF * stride_dim, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, first * cos_first - second * sin_first, mask=inside)
    tl.store(places + HALF * stride_dim, second * cos_second + first * sin_second, mask=inside)
