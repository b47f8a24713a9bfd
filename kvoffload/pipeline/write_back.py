"""New blocks on their way to the host: where compute packs them, what waits for what, and until when D2H reads there.

Owns the D2H slots, the stages of a prefill and every copy to the host. Does not know which layer stores what (layer.py
gives it blocks), nor when a layer buffer is idle: the engine lends it these and gets them back.

Ownership:
    D2H slot      compute until `packed`, then D2H until `written`
    stage         the same for the many blocks that a layer stores during a prefill, so that compute does not wait for
                  the link: a layer buffer while these are idle, else memory that lives until decoding begins
Whoever lets compute write there again calls `take_over` first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvoffload.backend import Backend, Event
from kvoffload.store.block import Block, Place
from kvoffload.store.extent import Extent

ALIGNMENT = 16  # of blocks of different forms in a stage


@dataclass(slots=True, eq=False)
class D2HSlot:
    """Device memory in which compute packs new blocks, and from which D2H copies them."""

    bytes: torch.Tensor
    written: Event | None = None  # the last copy to the host that left from here

    def take_over(self, backend: Backend) -> None:
        """Let compute write here again."""
        if self.written is not None:
            backend.compute_waits(self.written)


class WriteBack:
    """Stores new blocks on the host.

    Args:
        backend: the queues.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._slots: list[D2HSlot] = []
        self._next_slot = 0
        self._stages: list[D2HSlot] = []  # of memory that no layer buffer has
        self._stage: tuple[D2HSlot, int] | None = None  # where a layer's blocks are packed, and how much is used
        self._next_stage = 0
        self.queued_bytes = 0  # so far, on their way or there

    @property
    def slot_bytes(self) -> int:
        """Size of each of the two D2H slots."""
        return self._slots[0].bytes.numel() if self._slots else 0

    @property
    def stage_bytes(self) -> int:
        """Device memory of the stages; what was lent is not in it."""
        return sum(stage.bytes.numel() for stage in self._stages)

    def configure(self, slot_bytes: int) -> None:
        """Make the D2H slots exactly that large; the old ones go first, so that both never exist at once."""
        self._next_slot = 0
        if [slot.bytes.numel() for slot in self._slots] != [slot_bytes] * 2:
            self._free(self._slots)
            self._slots += [D2HSlot(self._backend.allocate_device(slot_bytes)) for _ in range(2)]

    def start_layer(self, num_bytes: int, lent: Sequence[D2HSlot], limit_bytes: int | None) -> None:
        """A layer is about to store blocks of that many bytes: more than a D2H slot holds are staged if possible.

        Args:
            num_bytes: of all its new blocks together.
            lent: layer buffers while these are idle, of equal size.
            limit_bytes: what memory made for two stages may take; None: anything.
        """
        self._stage = None
        stages: Sequence[D2HSlot] = ()
        if num_bytes <= self.slot_bytes:
            return
        if lent and lent[0].bytes.numel() >= num_bytes:
            stages = lent
        elif limit_bytes is None or 2 * num_bytes <= limit_bytes:
            if not self._stages or self._stages[0].bytes.numel() < num_bytes:
                self.release_stages()
                self._stages = [D2HSlot(self._backend.allocate_device(num_bytes)) for _ in range(2)]
            stages = self._stages
        if stages:
            buffer = stages[self._next_stage]
            self._next_stage = (self._next_stage + 1) % len(stages)
            buffer.take_over(self._backend)
            self._stage = (buffer, 0)

    def release_stages(self) -> None:
        """Give back what a prefill staged its blocks in; compute waits for the copies from there."""
        self._stage = None
        self._free(self._stages)

    def _free(self, slots: list[D2HSlot]) -> None:
        for slot in slots:
            slot.take_over(self._backend)  # memory is reused in the order of compute
            self._backend.free_device(slot.bytes)
        slots.clear()

    @property
    def room_bytes(self) -> int:
        """How much the next `store` may carry."""
        if self._stage is not None:
            buffer, used = self._stage
            if buffer.bytes.numel() - used >= self.slot_bytes:
                return buffer.bytes.numel() - used
        return self.slot_bytes

    def _staging(self, num_bytes: int) -> tuple[D2HSlot, torch.Tensor]:
        """Device bytes that compute may fill now, and what owns them."""
        if self._stage is not None:
            buffer, used = self._stage
            if buffer.bytes.numel() - used >= num_bytes:
                self._stage = (buffer, -(-(used + num_bytes) // ALIGNMENT) * ALIGNMENT)  # of whatever comes next
                return buffer, buffer.bytes[used : used + num_bytes]
        slot = self._slots[self._next_slot]
        self._next_slot = (self._next_slot + 1) % len(self._slots)
        slot.take_over(self._backend)
        return slot, slot.bytes[:num_bytes]

    def store(self, extent: Extent, blocks: Sequence[Block], pack: Callable[[torch.Tensor], None]) -> None:
        """Store consecutive new blocks of equal size on the host.

        Args:
            extent: where they go.
            blocks: what they become; `place` is set.
            pack: fills the given bytes with the blocks, on the compute queue.
        """
        num_bytes = sum(block.num_bytes for block in blocks)
        holder, data = self._staging(num_bytes)
        self._backend.compute(writes=(data,))
        pack(data)
        packed = self._backend.release()
        host, guard = extent.append(num_bytes)
        after = [packed] if guard is None else [packed, guard]
        holder.written = self._backend.copy_to_host(host, data, after)
        self.queued_bytes += num_bytes
        offset = 0
        for block in blocks:
            block.place = Place("host", host[offset : offset + block.num_bytes], holder.written)
            offset += block.num_bytes

    def close(self) -> None:
        """Forget all memory."""
        self._slots, self._stages, self._stage = [], [], None
