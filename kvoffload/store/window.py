"""The window: copies on the device of the first and the newest blocks of one layer, whose own place is on the host.

Owns which block has a copy, and where: the first block, to which attention goes whatever the text is (attention sinks:
StreamingLLM, arXiv 2309.17453), at the front, and behind it the newest in a ring. All of it is compute's, which writes
a copy and reads it. The window belongs to one copy of a cache, and is not shared.
"""

from __future__ import annotations

import torch

from kvoffload.backend import Backend
from kvoffload.planning.placement import PLAIN
from kvoffload.store.block import Block, Place

NUM_FIRST = 1


class Window:
    """Room for some blocks, one behind the other; the first `NUM_FIRST` places are for the first blocks.

    Args:
        backend: gives the memory.
        num_places: blocks, at least 1.
        place_bytes: of K and V of a block of all logical rows.
    """

    def __init__(self, backend: Backend, num_places: int, place_bytes: int) -> None:
        self.num_places, self.place_bytes = num_places, place_bytes
        self._backend = backend
        self._data = backend.allocate_device(num_places * place_bytes)
        self._copies: dict[int, Block] = {}  # by number of the block

    @property
    def num_bytes(self) -> int:
        return self._data.numel()

    def __len__(self) -> int:
        return len(self._copies)

    def copy_of(self, index: int) -> Block | None:
        """K and V of a block on the device; None where there is no copy."""
        return self._copies.get(index)

    def take(self, index: int, block: Block, num_bytes: int) -> torch.Tensor | None:
        """The place of the copy of a block, uint8, to be filled; blocks that are not the newest any more have no copy.

        Args:
            index: of the block in its layer.
            block: as it is stored on the host, perhaps in another form.
            num_bytes: of its K and V; None is returned where that is more than a place has.
        """
        in_ring = self.num_places - NUM_FIRST
        for before in [before for before in self._copies if NUM_FIRST <= before <= index - in_ring]:
            del self._copies[before]
        place = self._place(index)
        if num_bytes > self.place_bytes or place >= self.num_places:
            return None
        start = place * self.place_bytes
        with torch.inference_mode(False):
            data = self._data[start : start + num_bytes]
        self._copies[index] = Block(PLAIN, block.rows, num_bytes, Place("device", data), block.row_step)
        return data

    def wants(self, index: int, num_blocks: int) -> bool:
        """Whether a block is the first of a layer, or among the newest that there is room for."""
        return index < NUM_FIRST or index >= num_blocks - (self.num_places - NUM_FIRST)

    @property
    def whole(self) -> torch.Tensor | None:
        """All copies one behind the other, in the order of their places; None where something is between them."""
        full = sum(block.num_bytes == self.place_bytes for block in self._copies.values())
        places = {self._place(index) for index in self._copies}
        if full < len(self._copies) or places != set(range(full)):
            return None
        with torch.inference_mode(False):
            return self._data[: full * self.place_bytes]

    def _place(self, index: int) -> int:
        """Where the copy of a block lies."""
        in_ring = max(1, self.num_places - NUM_FIRST)
        return index if index < NUM_FIRST else NUM_FIRST + (index - NUM_FIRST) % in_ring

    def forget(self, first: int) -> None:
        """Blocks from `first` on are gone."""
        for index in [index for index in self._copies if index >= first]:
            del self._copies[index]

    def move_to(self, other: Window) -> None:
        """Give another window the copies that it has room for; this one is not used any more."""
        for index, block in sorted(self._copies.items()):
            data = other.take(index, block, block.num_bytes)
            if data is not None:
                data.copy_(block.bytes)
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        self._copies.clear()
        self._backend.free_device(self._data)
