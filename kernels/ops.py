"""Every device operation of ours, and the only place that picks its implementation.

In this order: on CUDA a Triton kernel; for attention on the CPU torch's own operator; else, and where these cannot do a
shape or dtype, the twin in `kernels/reference.py`, which says what each operation means. Triton is imported when a CUDA
tensor is first seen: it does not exist for every system. Kernels are launched on the current device, unlike PyTorch's
operations, so each is called with that of its tensors as the current one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from kvoffload.kernels import cpu_attention, pieces, reference
from kvoffload.kernels.stored import StoredKV

_NOTHING_TO_DO = contextlib.nullcontext()


class _Required(TypedDict):
    scale: float
    is_first: bool
    first_position: int
    query_position: int


class SegmentOptions(_Required, total=False):
    """Keyword arguments of `segment_attention`; `reference.segment_attention` explains each."""

    valid: Tensor | None
    row_table: Tensor | None
    block_tokens: int
    window: int | None
    softcap: float | None


def segment_attention(q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, **options: Unpack[SegmentOptions]) -> None:
    """Attention of some queries over one segment of the cache, merged into `out` and `lse`.

    Args:
        q: [batch, q_tokens, q_heads, head_dim], unit stride in head_dim.
        kv: [tokens, rows, 2, kv_heads, head_dim], dtype of q, unit stride in head_dim.
        out: float32 [batch, q_tokens, q_heads, head_dim], contiguous; changed in place.
        lse: float32 [batch, q_tokens, q_heads], contiguous; changed in place.
        options: see `SegmentOptions`.

    Raises:
        ValueError: if shapes, dtypes, strides or devices do not fit.
    """
    if _on_cpu(q):
        cpu_attention.segment_attention(q, kv, out, lse, **options)
        return
    with _on_its_device(q):
        (_triton("segment_attention", q) or reference).segment_attention(q, kv, out, lse, **options)


def stored_attention(q: Tensor, stored: StoredKV, out: Tensor, lse: Tensor, **options: Unpack[SegmentOptions]) -> None:
    """Attention over blocks of a form of fewer bytes, which are read as they lie; see `pieces.stored_attention`.

    Raises:
        ValueError: if shapes, dtypes, strides or devices do not fit.
    """
    with _on_its_device(q):
        (_triton("segment_attention", q) or pieces).stored_attention(q, stored, out, lse, **options)


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge the attention over some tokens into that over others, in place; see `reference.merge_`."""
    with _on_its_device(out):
        (_triton("merge", out) or reference).merge_(out, lse, part_out, part_lse)


def finish(out: Tensor, lse: Tensor, result: Tensor, sinks: Tensor | None = None) -> None:
    """Write the attention of all segments into `result`, after the sinks took their share; see `reference.finish`."""
    with _on_its_device(out):
        (_triton("merge", out) or reference).finish(out, lse, result, sinks)


def rope_(keys: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary position embedding of keys `[tokens, rows, heads, head_dim]` in place; see `reference.rope_`."""
    with _on_its_device(keys):
        (_triton("rope", keys) or reference).rope_(keys, cos, sin)


def linear_into(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """`out = x @ weight.T + bias`, also where `out` is a strided view.

    Without a bias no copy is made. A GPU's library adds a bias within the product only where the result is contiguous:
    into a strided one it would copy the bias to every row first, and read that again. There the product gets memory of
    its own and is copied: as much moves, and the result is the model's own to the last bit.

    Args:
        x: [m, k].
        weight: [n, k].
        bias: [n] or None.
        out: [m, n], unit stride in the last dimension.
    """
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    elif x.is_cuda and not out.is_contiguous():
        out.copy_(torch.nn.functional.linear(x, weight, bias))
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.is_cpu


def _triton(name: str, tensor: Tensor) -> Any:
    """The module of a Triton kernel, or None if it cannot do this tensor: on a CUDA device that is warned of, once."""
    if not _on_gpu(tensor):
        return None
    module = _module(name)
    if module is None:
        return None
    if reason := module.unsupported(tensor):
        _warn_once(f"kernels/{name}.py cannot do {reason}: it runs unfused")
        return None
    return module


@functools.cache
def _module(name: str) -> Any:
    """A module of kernels, None where Triton cannot be imported; looked up once, as that takes microseconds."""
    try:
        return importlib.import_module(f"kvoffload.kernels.{name}")
    except ImportError as error:
        _warn_once(f"{error}: attention and rotary embedding run unfused")
        return None


def _on_its_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A tensor's device as the current one, on which kernels are launched; nothing to do where it is."""
    if not _on_gpu(tensor) or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING_TO_DO
    return torch.cuda.device_of(tensor)


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)
