"""Device memory of the pipeline, and the account of it: the ring of slots, layer buffers, scratch and gather buffer.

Owns how much there is of each and that old memory goes before new comes. Who may write where, and when, is for the
engine to say (see there); a buffer that is replaced is free by then, or compute waits for it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvoffload.backend import Backend, Event
from kvoffload.pipeline.write_back import D2HSlot
from kvoffload.store.device_memory import DeviceMemory


class Account:
    """Device memory by purpose, and the most there was at once."""

    def __init__(self) -> None:
        self.held_bytes: dict[str, int] = {}
        self.peak_bytes = 0

    def note(self, purpose: str, num_bytes: int) -> None:
        """A purpose holds so much now."""
        self.held_bytes[purpose] = num_bytes
        if not num_bytes:
            del self.held_bytes[purpose]
        self.peak_bytes = max(self.peak_bytes, self.total_bytes)

    @property
    def total_bytes(self) -> int:
        """What all purposes hold."""
        return sum(self.held_bytes.values())

    def take_peak(self) -> int:
        """The most device memory held since the last call."""
        peak, self.peak_bytes = self.peak_bytes, self.total_bytes
        return peak


@dataclass(slots=True, eq=False)
class Slot:
    """Device memory for one chunk."""

    room: DeviceMemory
    released: Event  # compute is done with it
    is_busy: bool = False  # holds a chunk that compute has not released


@dataclass(slots=True, eq=False)
class LayerBuffer(D2HSlot):
    """Device memory for one layer's whole K/V in stored row order, or for what a layer stores during a prefill."""

    released: Event = field(kw_only=True)

    def empty(self) -> None:
        """Hold no memory any more."""
        self.bytes = self.bytes[:0].clone()


class Buffers:
    """What the engine moves chunks into, and compute works in.

    Args:
        backend: gives the memory.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.account = Account()
        self.slots: list[Slot] = []
        self.layer_buffers: list[LayerBuffer] = []
        self._gathered: torch.Tensor | None = None
        self._scratch: DeviceMemory | None = None

    def configure(self, *, slot_bytes: int, num_slots: int, buffer_bytes: int, scratch_bytes: int) -> None:
        """Make the ring, two layer buffers and the scratch exactly that large; nothing may be in flight."""
        if [slot.room.bytes.numel() for slot in self.slots] != [slot_bytes] * num_slots:
            slots = self._replace("slots", [slot.room for slot in self.slots], num_slots, slot_bytes)
            self.slots = [Slot(DeviceMemory(data), released=self._backend.release()) for data in slots]
        if [buffer.bytes.numel() for buffer in self.layer_buffers] != [buffer_bytes] * 2:
            for buffer in self.layer_buffers:
                buffer.take_over(self._backend)
            buffers = self._replace("layer_buffers", self.layer_buffers, 2, buffer_bytes)
            self.layer_buffers = [LayerBuffer(data, released=self._backend.release()) for data in buffers]
        if self._scratch is None or self._scratch.bytes.numel() != scratch_bytes:
            self._scratch = None
            self.account.note("scratch", scratch_bytes)
            self._scratch = DeviceMemory(self._backend.allocate_device(scratch_bytes))

    def _replace(
        self, purpose: str, old: Sequence[DeviceMemory | LayerBuffer], count: int, num_bytes: int
    ) -> list[torch.Tensor]:
        """New buffers of one purpose; the old ones go first, so that both never exist at once."""
        for holder in old:
            self._backend.free_device(holder.bytes)
            holder.empty()
        self.account.note(purpose, 0)
        made = [self._backend.allocate_device(num_bytes) for _ in range(count)]
        self.account.note(purpose, num_bytes * count)
        return made

    @property
    def sizes(self) -> dict[str, int]:
        """As `configure` takes them."""
        return {
            "slot_bytes": self.slots[0].room.bytes.numel() if self.slots else 0,
            "num_slots": len(self.slots),
            "buffer_bytes": self.layer_bytes,
            "scratch_bytes": 0 if self._scratch is None else self._scratch.bytes.numel(),
        }

    @property
    def layer_bytes(self) -> int:
        """Size of each of the two layer buffers."""
        return self.layer_buffers[0].bytes.numel()

    @property
    def scratch(self) -> DeviceMemory:
        """Memory that compute alone uses: for K and V of a chunk that attention cannot read itself."""
        assert self._scratch is not None
        return self._scratch

    def gather_buffer(self, num_bytes: int) -> torch.Tensor:
        """The third layer buffer, in which beams find their rows in logical order; used by compute alone."""
        if self._gathered is None or self._gathered.numel() < num_bytes:
            self._gathered = self._backend.allocate_device(max(num_bytes, self.layer_bytes))
            self.account.note("gather_buffer", self._gathered.numel())
        return self._gathered

    def measuring_room(self) -> torch.Tensor:
        """Where recomputation writes in a step, to time it while nothing is in flight; synchronise before and after."""
        room = self.layer_buffers[0].bytes if self.layer_bytes else self.scratch.bytes
        self._backend.compute(writes=(room,))
        return room

    def idle_slots(self) -> list[torch.Tensor]:
        """The ring, to time attention and copies in while nothing is in flight; synchronise before and after."""
        slots = [slot.room.bytes for slot in self.slots]
        self._backend.compute(writes=slots)
        return slots

    def close(self) -> None:
        """Give the device memory back."""
        self.slots, self.layer_buffers = [], []
        self._gathered = self._scratch = None
        self.account.held_bytes.clear()
