"""Memory for what is needed until the next call only.

On the CPU a large allocation is mapped anew each time, and to touch its pages for the first time takes longer than to
compute what is written there. A GPU's allocator keeps its memory anyway.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_kept = threading.local()


def take(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with any values, which the next call of this thread with the same name and dtype may overwrite."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size, key = math.prod(shape), (name, dtype)
    tensors: dict[tuple[str, torch.dtype], Tensor] = vars(_kept).setdefault("tensors", {})
    found = tensors.get(key)
    with torch.inference_mode(False):  # else it could not be written outside of inference mode
        if found is None or found.numel() < size:
            found = tensors[key] = torch.empty(size, dtype=dtype)
        return found[:size].view(shape)
