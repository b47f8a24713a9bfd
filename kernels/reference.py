"""PyTorch twins of the kernels: the definition of truth on any device."""

from __future__ import annotations

import torch


def rope_(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary position embedding in place, on the first `rotary_dim` of each head, halves rotated against each other.

    Computes in the dtype of the keys, in the order of operations of transformers' `apply_rotary_pos_emb`.

    Args:
        keys: [tokens, rows, heads, head_dim], any strides; changed in place.
        cos: [tokens, rows or 1, rotary_dim]; sin likewise.

    Source: RoFormer (arXiv 2104.09864), section 3.4.
    """
    rotary_dim = cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [tokens, rows or 1, 1, rotary_dim]
    part = keys[..., :rotary_dim]
    first, second = part.chunk(2, dim=-1)
    half = rotary_dim // 2
    new_first = first * cos[..., :half] + (-second) * sin[..., :half]
    new_second = second * cos[..., half:] + first * sin[..., half:]
    first.copy_(new_first)
    second.copy_(new_second)
