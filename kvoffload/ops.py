"""Every device operation of ours, and the only place that picks its implementation."""

from __future__ import annotations

import torch

from kvoffload.kernels import reference

segment_attention = reference.segment_attention
merge_ = reference.merge_
finish = reference.finish
rope_ = reference.rope_


def linear_into(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """`out = x @ weight.T + bias` without a copy, also where `out` is a strided view.

    Args:
        x: [m, k].
        weight: [n, k].
        bias: [n] or None.
        out: [m, n], unit stride in the last dimension.
    """
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
