"""Weights on their way: decoder layers that live on the host take turns in two slabs of device memory.

Owns which layer is in which slab, and every wait on these. Layers are asked for one after another, over and over; the
one behind travels while a layer computes (FlexGen, arXiv 2303.06865, section 4, and KVPR, arXiv 2411.17089, section
3.2, overlap the same way). Does not own the order between weights and chunks of a cache on the one link (`engine`),
what the bytes are (`store/layer_weights.py`), nor who reads them (`hf`).

Ownership:
    slab    H2D until the passage's last piece is there, then compute until `released`, recorded when the layer's
            forward has been issued
What was brought ahead stays valid from one forward to the next, whatever happens to a cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvoffload.backend import Backend, Event
from kvoffload.planning.rates import WEIGHT_PIECE_BYTES
from kvoffload.planning.weights import NUM_SLABS


class WeightSource(Protocol):
    """What is known here of a layer's weights."""

    layer_idx: int
    num_bytes: int

    @property
    def source(self) -> torch.Tensor: ...


@dataclass(slots=True, eq=False)
class _Slab:
    """Device memory for one layer's weights."""

    bytes: torch.Tensor
    released: Event  # compute is done with it


@dataclass(slots=True, eq=False)
class _Passage:
    """One layer's weights on their way to a slab, or there."""

    weights: WeightSource
    slab: _Slab
    issued_bytes: int = 0
    arrived: Event = None  # of the last piece issued

    @property
    def is_issued(self) -> bool:
        return self.issued_bytes >= self.weights.num_bytes

    @property
    def fraction(self) -> float:
        """Of its bytes that are issued."""
        return self.issued_bytes / self.weights.num_bytes


def brought(backend: Backend, weights: WeightSource) -> torch.Tensor:
    """A copy of a layer's weights in device memory of its own, for a layer that stays; compute waits for it."""
    data = backend.allocate_device(weights.num_bytes)
    fresh = backend.release()  # the memory may have been used by earlier compute
    arrived = backend.copy_to_device(data, weights.source, [fresh])
    backend.compute_waits(arrived)
    backend.compute(reads=(data,))
    return data


class WeightStream:
    """Brings the weights of layers to the device, in the order of the layers.

    Args:
        backend: the queues.
        num_layers: of the decoder.
        layers: whose weights are streamed, in order.
        overlap: False begins a copy when it is needed, behind all earlier compute.
        piece_bytes: in one copy.
    """

    def __init__(
        self,
        backend: Backend,
        num_layers: int,
        layers: Sequence[WeightSource],
        *,
        overlap: bool = True,
        piece_bytes: int = WEIGHT_PIECE_BYTES,
    ) -> None:
        self._backend = backend
        self._num_layers = num_layers
        self.layers = tuple(layers)
        self._overlap = overlap
        self._piece_bytes = piece_bytes
        slab_bytes = max(layer.num_bytes for layer in layers)
        self._slabs = [_Slab(backend.allocate_device(slab_bytes), backend.release()) for _ in range(NUM_SLABS)]
        self._ahead: deque[_Passage] = deque()  # issued, or begun, for layers to come
        self._current: _Passage | None = None  # of the layer that computes
        self._expected = 0  # the layer whose passage begins next
        self._at = self._num_layers - 1  # the decoder layer begun last
        self.delivered_bytes = 0  # so far, to layers that asked for them

    @property
    def device_bytes(self) -> int:
        """Of the slabs."""
        return sum(slab.bytes.numel() for slab in self._slabs)

    def begin(self, layer: WeightSource) -> torch.Tensor:
        """The layer's weights, on the device: uint8, valid until `end`. Compute waits for them."""
        if self._current is not None:  # an interrupt ended the layer before
            self.end()
        if not self._ahead or self._ahead[0].weights is not layer:
            self.drop()
            self._expected = self.layers.index(layer)
            self._next_passage()
        passage = self._ahead.popleft()
        while not passage.is_issued:
            self._issue(passage)
        self._backend.compute_waits(passage.arrived)  # first: of an interrupted layer compute may use the slab at once
        self._current, self._at = passage, layer.layer_idx
        self.delivered_bytes += layer.num_bytes
        data = passage.slab.bytes
        self._backend.compute(reads=(data[: layer.num_bytes],))
        return data

    def end(self) -> None:
        """All compute that reads the weights begun last has been issued; nothing where none were."""
        passage = self._current
        if passage is not None:
            passage.slab.released = self._backend.release(passage.slab.bytes)
            self._current = None  # last: an interrupt may come between these two

    def goes_first(self, layer_idx: int | None, fraction: float, *, goes_on: bool) -> bool:
        """Whether the next copy over the link is one of weights: they are needed sooner, or it is their turn.

        Chunks of one layer and the weights of the next travel mixed in equal shares, so that the device has work while
        either is on its way.

        Args:
            layer_idx: the decoder layer that the next chunk of a cache is for; None: there is none to copy.
            fraction: of that layer's chunks that are issued.
            goes_on: whether another forward is expected to follow this one.
        """
        passage = next((one for one in self._ahead if not one.is_issued), None)
        if passage is None and (goes_on or self._expected > 0):
            passage = self._next_passage()
        if passage is None:
            return False
        if layer_idx is None:
            return True
        if (self._distance(passage.weights.layer_idx) or self._num_layers) <= self._distance(layer_idx):
            return True
        return passage.fraction < fraction

    def issue(self) -> None:
        """Queue the next copy; `goes_first` has said so."""
        self._issue(next(one for one in self._ahead if not one.is_issued))

    def drop(self) -> None:
        """Forget what was brought ahead: layers are asked for in another order, or weights have changed."""
        self._ahead.clear()  # whatever comes into these slabs next comes behind in the same queue

    def close(self) -> None:
        """Give the slabs back; nothing may be in flight."""
        self.drop()
        for slab in self._slabs:
            self._backend.free_device(slab.bytes)
        self._slabs = []

    def _next_passage(self) -> _Passage | None:
        """Begin the passage of the layer that is expected next; None where both slabs are taken."""
        taken = [one.slab for one in (*self._ahead, self._current) if one is not None]
        slab = next((one for one in self._slabs if not any(one is other for other in taken)), None)
        if slab is None:
            return None
        passage = _Passage(self.layers[self._expected], slab)
        self._expected = (self._expected + 1) % len(self.layers)
        self._ahead.append(passage)
        return passage

    def _distance(self, layer_idx: int) -> int:
        """Layers from the one begun last to another, over the end of the decoder."""
        return (layer_idx - self._at) % self._num_layers

    def _issue(self, passage: _Passage) -> None:
        start = passage.issued_bytes
        stop = min(start + self._piece_bytes, passage.weights.num_bytes)
        # without overlap behind all earlier compute, which that of the slab is part of
        after = [passage.slab.released] if self._overlap else [self._backend.release()]
        source = passage.weights.source[start:stop]
        passage.arrived = self._backend.copy_to_device(passage.slab.bytes[start:stop], source, after, lane="weights")
        passage.issued_bytes = stop
