"""Copies on the device of blocks of one layer whose own place is on the host: what drafts read of these.

Owns which block has a copy, and where: the first ones there is room for, or the first, to which attention goes whatever
the text is (attention sinks: StreamingLLM, arXiv 2309.17453), and the newest. In the form of K and V copies are exact,
and a pass reads them as well (a window). In one of few bits there is room for more, for drafts alone (a shadow). All of
it is compute's, which writes a copy and reads it. Copies belong to one copy of a cache, and are not shared.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import torch

from kvoffload.backend import Backend
from kvoffload.planning.placement import PLAIN, FormName
from kvoffload.store.block import Block, Place

NUM_FIRST = 1


class NearCopies:
    """Room for some blocks, one behind the other.

    Args:
        backend: gives the memory.
        form: of the copies.
        num_places: blocks, at least 1.
        place_bytes: of a copy of all logical rows.
        rolls: whether newer blocks take the places of older ones.
    """

    def __init__(
        self, backend: Backend, form: FormName, num_places: int, place_bytes: int, *, rolls: bool = True
    ) -> None:
        self.form, self.num_places, self.place_bytes, self.rolls = form, num_places, place_bytes, rolls
        self._backend = backend
        self._data = backend.allocate_device(num_places * place_bytes)
        self._copies: dict[int, Block] = {}  # by number of the block
        self._places: dict[int, int] = {}  # the same
        self._free = list(range(num_places))  # a heap

    @property
    def is_exact(self) -> bool:
        """Whether a pass may read a copy in the place of the block."""
        return self.form == PLAIN

    @property
    def num_bytes(self) -> int:
        return self._data.numel()

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def copies(self) -> Mapping[int, Block]:
        """By number of the block."""
        return self._copies

    def wanted(self, indices: Sequence[int]) -> list[int]:
        """Which of these blocks, ascending, would have a copy after all of them were taken."""
        if not self.rolls:
            there = [index for index in indices if index in self._copies]
            missing = [index for index in indices if index not in self._copies]
            return sorted([*there, *missing[: len(self._free)]])
        first = [index for index in indices if index < NUM_FIRST]
        has_first = first or any(index < NUM_FIRST for index in self._copies)
        room = self.num_places - (NUM_FIRST if has_first else 0)
        others = indices[len(first) :]
        return first + list(others[max(0, len(others) - room) :])

    def take(self, index: int, block: Block, num_bytes: int) -> torch.Tensor | None:
        """The place of the copy of a block, uint8, to be filled; where none is free and copies roll the oldest goes.

        Args:
            index: of the block in its layer.
            block: as it is stored on the host, perhaps in another form.
            num_bytes: of the copy; None is returned where that is more than a place has, or there is no place.
        """
        if num_bytes > self.place_bytes or not (self._free or self.rolls):
            return None
        if not self._free:
            oldest = min((before for before in self._copies if NUM_FIRST <= before < index), default=None)
            if oldest is None:
                return None
            self._let_go(oldest)
        place = heapq.heappop(self._free)
        start = place * self.place_bytes
        with torch.inference_mode(False):
            data = self._data[start : start + num_bytes]
        self._copies[index] = Block(self.form, block.rows, num_bytes, Place("device", data), block.row_step)
        self._places[index] = place
        return data

    @property
    def whole(self) -> torch.Tensor | None:
        """All copies one behind the other, in the order of their places; None where something is between them."""
        full = sum(block.num_bytes == self.place_bytes for block in self._copies.values())
        if full < len(self._copies) or set(self._places.values()) != set(range(full)):
            return None
        with torch.inference_mode(False):
            return self._data[: full * self.place_bytes]

    def _let_go(self, index: int) -> None:
        del self._copies[index]
        heapq.heappush(self._free, self._places.pop(index))

    def forget(self, first: int) -> None:
        """Blocks from `first` on are gone."""
        for index in [index for index in self._copies if index >= first]:
            self._let_go(index)

    def move_to(self, other: NearCopies) -> None:
        """Give copies to others of the same form, as far as these have room; these are not used any more."""
        for index in other.wanted(sorted(self._copies)):
            block = self._copies[index]
            data = other.take(index, block, block.num_bytes)
            if data is not None:
                data.copy_(block.bytes)
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        self._copies.clear()
        self._places.clear()
        self._backend.free_device(self._data)
