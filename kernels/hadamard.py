"""The Hadamard transform of heads: a rotation that spreads what stands out in one channel over all of them.

Products of keys and queries stay what they are when both are rotated. A head size that is no power of two is rotated in
blocks of powers of two, the largest first. Source: QuaRot (arXiv 2404.00456), section 3.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor


def rotated(x: Tensor) -> Tensor:
    """`x` [..., head_dim] rotated, in its own dtype; applied twice it gives `x` back, up to rounding.

    By butterflies, so that a vector's result does not depend on what stands beside it.
    """
    parts, start = [], 0
    for size in blocks(x.shape[-1]):
        part, half = x[..., start : start + size], 1
        while half < size:
            first, second = part.unflatten(-1, (size // (2 * half), 2, half)).unbind(-2)
            part = torch.stack((first + second, first - second), dim=-2).flatten(-3)
            half *= 2
        parts.append(part * size**-0.5)
        start += size
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def rotated_queries(q: Tensor) -> Tensor:
    """`q` [..., head_dim] rotated as keys are, in one product; computed in float32, or float64 for such queries."""
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return (q.to(dtype) @ _matrix(q.shape[-1], q.device, dtype)).to(q.dtype)


@functools.lru_cache(maxsize=32)
def _matrix(head_dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The rotation as a symmetric matrix."""
    with torch.inference_mode(False):
        return rotated(torch.eye(head_dim, dtype=dtype, device=device))


@functools.lru_cache(maxsize=32)
def blocks(head_dim: int) -> tuple[int, ...]:
    """Powers of two that add up to a head size, the largest first."""
    powers = (1 << bit for bit in itertools.count() if head_dim >> bit & 1 or head_dim >> bit == 0)
    found = list(itertools.takewhile(lambda power: power <= head_dim, powers))
    return tuple(reversed(found))
