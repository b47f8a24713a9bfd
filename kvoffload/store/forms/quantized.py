"""Codes of few bits with a scale and a least value for each group: what the forms of 4 and 2 bits have in common."""

from __future__ import annotations

import torch

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


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, least: torch.Tensor, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """What the codes stand for."""
    size = codes.shape[dim]
    if dim == -1 and size % GROUP == 0:
        found: torch.Tensor = codes.unflatten(-1, (-1, GROUP)).to(dtype)
        found.mul_(scale.to(dtype).unsqueeze(-1)).add_(least.to(dtype).unsqueeze(-1))
        return found.flatten(-2)
    scale, least = (spread(part.to(dtype), dim, size) for part in (scale, least))
    return codes.to(dtype).mul_(scale).add_(least)


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


def part(data: torch.Tensor, per_byte: int) -> torch.Tensor:
    """Codes [..., n] of bytes [..., n / per_byte]."""
    bits, size = 8 // per_byte, data.shape[-1]
    found = data.new_empty(*data.shape[:-1], size * per_byte)
    for idx in range(per_byte):
        piece = found[..., idx * size : (idx + 1) * size]
        torch.bitwise_right_shift(data, bits * idx, out=piece)
        piece &= (1 << bits) - 1
    return found


def means(keys: torch.Tensor) -> torch.Tensor:
    """Of keys [blocks, tokens, rows, heads, head_dim] over the tokens of each block, float16.

    Summed in float64, so that they do not depend on the order of the sum.
    """
    return keys.mean(1, dtype=torch.float64).half()


def are_finite(*parts: torch.Tensor) -> torch.Tensor:
    """Which blocks have finite scales and the like, bool [blocks]; NaN or infinite K and V give others."""
    return torch.stack([part.isfinite().flatten(1).all(1) for part in parts]).all(0)
