"""Device memory that holds one thing after another, and the tensors that see it.

Owns nothing but these: who may write is for the transfer engine to say. A tensor that views a part takes the host
microseconds to make, and a decode step needs the same ones again in every layer, so each is made once.
"""

from __future__ import annotations

import math

import torch


class DeviceMemory:
    """A piece of device memory.

    Args:
        data: uint8, one-dimensional.
    """

    __slots__ = ("_parts", "_views", "bytes")

    def __init__(self, data: torch.Tensor) -> None:
        self.bytes = data
        self._parts: dict[int, torch.Tensor] = {}
        self._views: dict[tuple[torch.dtype, tuple[int, ...]], torch.Tensor] = {}

    def part(self, num_bytes: int) -> torch.Tensor:
        """Its first bytes; the same tensor at every call."""
        found = self._parts.get(num_bytes)
        if found is None:
            with torch.inference_mode(False):  # else the view could not be written outside of inference mode
                found = self._parts[num_bytes] = self.bytes[:num_bytes]
        return found

    def view(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Its first bytes as a tensor; the same one at every call."""
        found = self._views.get((dtype, shape))
        if found is None:
            part = self.part(math.prod(shape) * dtype.itemsize)
            with torch.inference_mode(False):
                found = self._views[dtype, shape] = part.view(dtype).view(shape)
        return found

    def empty(self) -> None:
        """Hold no memory any more."""
        self._parts.clear()
        self._views.clear()
        self.bytes = self.bytes[:0].clone()
