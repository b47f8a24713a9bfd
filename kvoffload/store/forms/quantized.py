"""Codes of few bits with a scale and a least value for each group: what the forms of 4 and 2 bits have in common."""

from __future__ import annotations

import torch

from kvoffload.kernels import scratch
from kvoffload.planning.forms import GROUP


def num_groups(size: int) -> int:
    """Groups along `size` values; the last one may be smaller."""
    return -(-size // GROUP)


def bounds(x: torch.Tensor, dim: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and least value, float16, of groups along `dim` (negative): the groups stand there instead."""
    groups = list(x.split(GROUP, dim))
    least = torch.stack([one.amin(dim) for one in groups], dim)
    most = torch.stack([one.amax(dim) for one in groups], dim)
    return ((most - least) / levels).half(), least.half()


def quantize(x: torch.Tensor, scale: torch.Tensor, least: torch.Tensor, dim: int, levels: int) -> torch.Tensor:
    """Codes 0..levels, uint8, of `x` in groups along `dim`."""
    scale, least = (spread(part.float(), dim, x.shape[dim]) for part in (scale, least))
    steps = (x - least) / torch.where(scale > 0, scale, 1.0)
    return steps.round_().clamp_(0, levels).to(torch.uint8)


def dequantize_(codes: torch.Tensor, scale: torch.Tensor, least: torch.Tensor, dim: int) -> None:
    """Codes, as floats, become what they stand for."""
    size, dtype = codes.shape[dim], codes.dtype
    if dim == -1 and size % GROUP == 0:
        grouped = codes.unflatten(-1, (-1, GROUP))
        grouped.mul_(scale.to(dtype).unsqueeze(-1)).add_(least.to(dtype).unsqueeze(-1))
        return
    scale, least = (spread(part.to(dtype), dim, size) for part in (scale, least))
    codes.mul_(scale).add_(least)


def spread(groups: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """A value of each group for each of its members."""
    return groups.repeat_interleave(GROUP, dim).narrow(dim, 0, size)


def join(codes: torch.Tensor, per_byte: int) -> torch.Tensor:
    """Codes [..., n] as bytes [..., n / per_byte]: the first part of them in the lowest bits."""
    bits = 8 // per_byte
    parts = codes.chunk(per_byte, dim=-1)
    found = parts[0].clone()
    for idx, part in enumerate(parts[1:], start=1):
        found |= part << (bits * idx)
    return found


def part(data: torch.Tensor, per_byte: int, out: torch.Tensor) -> None:
    """Codes of bytes [..., n / per_byte] into `out` [..., n], of any dtype."""
    bits, size = 8 // per_byte, data.shape[-1]
    for idx in range(per_byte):
        codes = scratch.take("codes", tuple(data.shape), data.dtype, data.device)
        torch.bitwise_right_shift(data, bits * idx, out=codes)
        if idx < per_byte - 1:
            codes &= (1 << bits) - 1
        out[..., idx * size : (idx + 1) * size] = codes


def means(keys: torch.Tensor) -> torch.Tensor:
    """Of keys [blocks, tokens, rows, heads, head_dim] over the tokens of each block, float16.

    Summed in float64, so that they do not depend on the order of the sum.
    """
    return keys.mean(1, dtype=torch.float64).half()


def are_finite(*parts: torch.Tensor) -> torch.Tensor:
    """Which blocks have finite scales and the like, bool [blocks]; NaN or infinite K and V give others."""
    return torch.stack([part.isfinite().flatten(1).all(1) for part in parts]).all(0)
