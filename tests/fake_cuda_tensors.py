"""Memory of a CUDA device that is not there, and tensors that lie in it: CPU tensors that say "cuda:0".

Owns what is allocated, as long as any tensor lies in it. Does not own operations on tensors (`fake_cuda`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

DEVICE = torch.device("cuda", 0)


def each_tensor(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Arguments or results with each tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each_tensor(change, one) for one in value))
    if isinstance(value, (list, tuple)):
        return type(value)(each_tensor(change, one) for one in value)
    if isinstance(value, slice):
        return slice(*(each_tensor(change, one) for one in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {name: each_tensor(change, one) for name, one in value.items()}
    return value


def inner(value: Any) -> Any:
    return each_tensor(lambda one: one.inner if isinstance(one, CudaTensor) else one, value)


class Allocation:
    """Device memory of one storage; alive as long as any tensor that lies in it."""

    def __init__(self, memory: Memory, num_bytes: int) -> None:
        self._memory, self._num_bytes = memory, num_bytes
        memory.allocated_bytes += num_bytes
        memory.peak_bytes = max(memory.peak_bytes, memory.allocated_bytes)

    def __del__(self) -> None:
        self._memory.allocated_bytes -= self._num_bytes


class Memory:
    """The device's memory: how much there is, and what is in use."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.others_bytes = 0  # of other processes
        self.fraction = 1.0
        self.allocated_bytes = self.peak_bytes = 0
        self._allocations: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.others_bytes - self.allocated_bytes

    def of(self, tensor: torch.Tensor) -> Allocation:
        """The allocation that a CPU tensor stands for.

        Raises:
            OutOfMemoryError: a new one does not fit.
        """
        storage = tensor.untyped_storage()
        found = self._allocations.get(storage._cdata)
        if found is None:
            num_bytes = -(-storage.nbytes() // 512) * 512
            room = min(self.free_bytes, int(self.fraction * self.total_bytes) - self.allocated_bytes)
            if num_bytes > room:
                raise torch.OutOfMemoryError(f"CUDA out of memory: {num_bytes} bytes wanted, {room} left")
            found = self._allocations[storage._cdata] = Allocation(self, num_bytes)
        return found


class CudaTensor(torch.Tensor):
    """A CPU tensor that says it is on the device."""

    inner: torch.Tensor
    allocation: Allocation
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, memory: Memory) -> CudaTensor:
        allocation = memory.of(inner)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner, made.allocation = inner, allocation
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a tensor of a fake device that is gone")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()
