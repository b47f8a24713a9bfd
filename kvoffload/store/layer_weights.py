"""The weights of one decoder layer as one run of bytes: on the host, where they live, and wherever they are read.

Owns how parameters and buffers of any dtype lie behind one another, and that each of them, the same object as before,
points to its place in whichever run is in use. Does not own which tensors these are (`hf`), nor when their bytes travel
(`pipeline/weights.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvoffload.backend import Backend
from kvoffload.backend.base import HostBuffer
from kvoffload.errors import KVOffloadError
from kvoffload.machine import mapped_files

ALIGNMENT_BYTES = 256  # of each tensor, as kernels like it


def can_be_packed(tensor: torch.Tensor) -> bool:
    """Whether all there is of a tensor is its bytes: no subclass, and none of them twice or left out."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return is_plain and tensor.layout == torch.strided and tensor.numel() > 0 and _is_dense(tensor)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill their memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _is_same(tensor: torch.Tensor, view: torch.Tensor) -> bool:
    """Whether both are the same bytes, read in the same way."""
    return (
        tensor.data_ptr() == view.data_ptr()
        and tensor.dtype == view.dtype
        and tensor.shape == view.shape
        and tensor.stride() == view.stride()
    )


def absorb(layers: Sequence[LayerWeights]) -> None:
    """Take over what somebody put in the place of weights of these layers, as a merged adapter does.

    Args:
        layers: all there are: one may have been given what another had.

    Raises:
        KVOffloadError: something of another shape or dtype.
    """
    set_apart(layers)
    for layer in layers:
        layer.absorb()


def set_apart(layers: Sequence[LayerWeights]) -> None:
    """Have nothing that somebody put in the place of weights lie in memory of these layers, which is written next."""
    replaced = [tensor for layer in layers for tensor in layer.replaced()]
    ours = {address for layer in layers for address in layer.storages} if replaced else set()
    for tensor in replaced:
        if tensor.untyped_storage().data_ptr() in ours:
            with torch.inference_mode(False):
                tensor.data = tensor.data.clone()


class LayerWeights:
    """The weights of one decoder layer.

    Args:
        layer_idx: of the layer in its decoder.
        tensors: parameters and buffers, for each of which `can_be_packed`; they travel in this order.
    """

    def __init__(self, layer_idx: int, tensors: Sequence[torch.Tensor]) -> None:
        self.layer_idx = layer_idx
        self._tensors = tuple(tensors)
        self._layouts: list[tuple[int, int, torch.dtype, tuple[int, ...], tuple[int, ...]]] = []
        end = 0
        for tensor in tensors:
            start, size = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES, tensor.numel() * tensor.element_size()
            self._layouts.append((start, size, tensor.dtype, tuple(tensor.shape), tensor.stride()))
            end = start + size
        self.num_bytes = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.device = tensors[0].device  # where they were
        self._host: HostBuffer | None = None
        self._views: dict[int, list[torch.Tensor]] = {}  # by the address of the bytes
        self._resident: torch.Tensor | None = None

    @property
    def source(self) -> torch.Tensor:
        """The bytes on the host, uint8."""
        assert self._host is not None
        return self._host.tensor

    @property
    def is_pinned(self) -> bool:
        """Whether the link reads them at full speed."""
        return self._host is not None and self._host.pinned_bytes > 0

    @property
    def is_resident(self) -> bool:
        """Whether there is a copy of them on the device that stays."""
        return self._resident is not None

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """Where their bytes lie now: address and number of each tensor."""
        return [(one.data_ptr(), one.numel() * one.element_size()) for one in self._tensors]

    def move_to_host(self, backend: Backend) -> None:
        """Live on the host from now on, in memory the link can read; what held them before is given back."""
        self._host = backend.allocate_host(self.num_bytes)
        for tensor, view in zip(self._tensors, self._at(self._host.tensor), strict=True):
            before, is_on_host = tensor.detach(), tensor.device.type == "cpu"
            view.copy_(before)
            tensor.data = view
            if is_on_host:  # of a mapped file pages count until the last tensor of the file is gone
                mapped_files.let_go(before.data_ptr(), before.numel() * before.element_size())

    @property
    def is_replaced(self) -> bool:
        """Whether somebody has put something in the place of these weights."""
        return next(self.replaced(), None) is not None

    def replaced(self) -> Iterator[torch.Tensor]:
        """The tensors in whose place somebody has put others, which they are now; none where they do not live here."""
        if self._host is None:
            return
        here = self._at(self.source if self._resident is None else self._resident)
        for idx, tensor in enumerate(self._tensors):
            if not (_is_same(tensor, here[idx]) or self._is_passing(idx)):
                yield tensor

    @property
    def storages(self) -> set[int]:
        """Addresses of all memory that these weights are read from."""
        return {views[0].untyped_storage().data_ptr() for views in self._views.values()}

    def absorb(self) -> None:
        """Take over what was put in the place of these weights, none of which lies in memory of any layer.

        Raises:
            KVOffloadError: something of another shape or dtype.
        """
        where = self.source if self._resident is None else self._resident
        for idx, view in enumerate(self._at(where)):
            if not self._absorbed(idx, view):
                tensor = self._tensors[idx]
                raise KVOffloadError(
                    f"weights of layer {self.layer_idx} were replaced by others of another shape or dtype "
                    f"({tuple(view.shape)} of {view.dtype} by {tuple(tensor.shape)} of {tensor.dtype}): close() the "
                    "session before changing the model, and offload it again"
                )

    def _absorbed(self, idx: int, view: torch.Tensor) -> bool:
        """Have a tensor be that view, with the values it has; False where these do not fit."""
        tensor = self._tensors[idx]
        if _is_same(tensor, view):
            return True
        if not self._is_passing(idx):
            if (tensor.shape, tensor.dtype) != (view.shape, view.dtype):
                return False
            view.copy_(tensor.detach())
        tensor.data = view
        return True

    def _is_passing(self, idx: int) -> bool:
        """Whether a tensor is in its place in other memory: an interrupt may have left it in a slab."""
        return any(_is_same(self._tensors[idx], views[idx]) for views in self._views.values())

    def read_from(self, data: torch.Tensor) -> None:
        """Whoever reads these weights finds them in other bytes, which were copied from `source`."""
        for tensor, view in zip(self._tensors, self._at(data), strict=True):
            tensor.data = view

    def read_from_host(self) -> None:
        """Whoever reads these weights finds them where they live."""
        self.read_from(self.source)

    def forget_slabs(self) -> None:
        """Hold nothing of memory that these weights were read from in passing; nothing may read them meanwhile."""
        stays = {one.data_ptr() for one in (self.source, self._resident) if one is not None}
        self._views = {address: views for address, views in self._views.items() if address in stays}

    def stay_in(self, data: torch.Tensor) -> None:
        """Be read from a copy on the device from now on, which stays."""
        self._resident = data
        self.read_from(data)

    def leave(self) -> None:
        """Have no copy on the device any more; compute that reads it has been issued."""
        if self._resident is not None:
            self.source.copy_(self._resident)  # where somebody changed them
            self.read_from_host()
            self._views.pop(self._resident.data_ptr(), None)
            self._resident = None

    def restore(self, backend: Backend) -> None:
        """Be where they were, with the values that they have now; nothing may be in flight."""
        if self._host is None:
            return
        where = self.source if self._resident is None else self._resident
        replaced = [idx for idx, view in enumerate(self._at(where)) if not self._absorbed(idx, view)]
        # of another dtype, as after model.half()
        stays = {idx: self._tensors[idx].data.to(self.device) for idx in replaced}
        self.leave()
        if self.device.type == "cpu":  # the memory stays theirs, and is not pinned any more
            backend.release_host(self._host)
        else:
            for tensor, view in zip(self._tensors, self._at(self.source), strict=True):
                moved = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=self.device)
                tensor.data = moved.copy_(view)
            backend.release_host(self._host)
        for idx, data in stays.items():
            self._tensors[idx].data = data
        self._views.clear()
        self._host = None

    def _at(self, data: torch.Tensor) -> list[torch.Tensor]:
        """The tensors as views of such bytes."""
        address = data.data_ptr()
        if address not in self._views:
            with torch.inference_mode(False):
                self._views[address] = [
                    data[start : start + size].view(dtype).as_strided(shape, stride)
                    for start, size, dtype, shape, stride in self._layouts
                ]
        return self._views[address]
