"""The memory of one layer's blocks: room on the device for its resident blocks, and an extent per form on the host.

Owns how much is made for a plan, and where a block goes. Does not know which blocks there are, nor fills or moves any
(`kvoffload/cache/layer.py` and `kvoffload/pipeline/write_back.py` do).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from kvoffload.backend import Backend, Event
from kvoffload.planning.placement import FormName, Placement, reserved_blocks
from kvoffload.store.block import Block
from kvoffload.store.extent import Extent
from kvoffload.store.forms.form import Form
from kvoffload.store.pool import HostPool
from kvoffload.store.resident_room import ResidentRoom


@dataclass(slots=True)
class _Kept:
    """What one copy of a cache has in a room."""

    room: ResidentRoom
    count: int = 0  # of its places, from the first on

    @property
    def num_free(self) -> int:
        """Places for more blocks; a copy that has taken the next one has taken those behind it as well, if any."""
        return self.room.num_places - self.count if self.room.is_free(self.count) else 0


class BlockMemory:
    """Where the blocks of one layer lie.

    Args:
        pool: host memory.
    """

    def __init__(self, pool: HostPool) -> None:
        self._pool = pool
        self._extents: dict[FormName, Extent] = {}
        self._doubles = False
        self._rooms: dict[FormName, list[_Kept]] = {}

    @property
    def _all_rooms(self) -> list[_Kept]:
        return [kept for rooms in self._rooms.values() for kept in rooms]

    @property
    def device_bytes(self) -> int:
        """Device memory of the resident blocks; what copies of a cache share counts for one of them."""
        for kept in self._all_rooms:
            kept.room.owner = kept.room.owner or self
        return sum(kept.room.num_bytes for kept in self._all_rooms if kept.room.owner is self)

    @property
    def reserved_bytes(self) -> dict[FormName, int]:
        """Host memory there is for each form, used or not."""
        return {form: extent.capacity_bytes for form, extent in self._extents.items()}

    def make_resident(self, backend: Backend, placement: Placement, forms: Mapping[FormName, Form], rows: int) -> None:
        """Make room on the device for the resident blocks that there is none for yet.

        Args:
            backend: gives the memory.
            placement: how many there are to be of each form.
            forms: that blocks can have.
            rows: logical rows.
        """
        for name, count in placement.resident.items():
            # Places that a copy of the cache has taken are not made again: its memory is the same.
            rooms = self._rooms.get(name, ())
            missing = count - sum(kept.room.num_places if kept.room.rows >= rows else kept.count for kept in rooms)
            if missing > 0 and name in forms:
                place_bytes = forms[name].num_bytes(placement.block_tokens, rows)
                data = backend.allocate_device(missing * place_bytes)
                self._rooms.setdefault(name, []).append(_Kept(ResidentRoom(data, place_bytes, rows)))

    def reserve(self, placement: Placement, forms: Mapping[FormName, Form], rows: int, prompt_copies: int) -> None:
        """Make room on the host for the other blocks, as far as the length is known; beyond it extents double.

        Args:
            placement: how many tokens there will be, and the share of the forms.
            forms: that blocks can have.
            rows: logical rows.
            prompt_copies: consecutive rows that hold the same prompt, stored once.

        Raises:
            HostMemoryError: the pool may not grow that much.
        """
        self._doubles = placement.max_tokens is None or placement.lives_on
        for extent in self._extents.values():
            extent.doubles = self._doubles
        if placement.max_tokens is None:
            return
        bt = placement.block_tokens
        num_blocks = max(0, placement.max_tokens // bt - placement.num_resident)
        shares = {name: share for name, share in placement.shares.items() if name in forms}
        saved = min(placement.prompt_tokens // bt, num_blocks) * (rows - rows // prompt_copies) * bt
        full = num_blocks * rows * bt
        for name, count in reserved_blocks(num_blocks, shares).items():
            if count:
                whole = count * forms[name].num_bytes(bt, rows)
                self.extent(name).reserve(whole * (full - saved) // full)

    def extent(self, form: FormName) -> Extent:
        """The host memory of a form."""
        found = self._extents.get(form)
        if found is None:
            found = self._extents[form] = Extent(self._pool, doubles=self._doubles)
        return found

    def resident_places(self, rows: int) -> dict[FormName, int]:
        """Blocks that there are on the device or that can come there, by form; see `resident_room`."""
        room = self.resident_room(rows)
        return {form: sum(kept.count for kept in rooms) + room[form] for form, rooms in self._rooms.items()}

    def resident_room(self, rows: int) -> dict[FormName, int]:
        """How many more blocks there are places for, by form.

        Rows may have been repeated since places were made, and a copy of the cache may have taken the next ones.
        """
        return {
            form: sum(kept.num_free for kept in self._usable(form) if kept.room.rows >= rows) for form in self._rooms
        }

    def _usable(self, form: FormName) -> list[_Kept]:
        """Rooms that keep the order of blocks: from the last used one on."""
        rooms = self._rooms[form]
        return rooms[max((idx for idx, kept in enumerate(rooms) if kept.count), default=0) :]

    def keep(self, form: FormName, num_bytes: int, rows: int) -> torch.Tensor:
        """The place of the next resident block of a form, uint8, made for so many logical rows."""
        kept = next(kept for kept in self._usable(form) if kept.num_free and kept.room.rows >= rows)
        kept.count += 1
        return kept.room.take(kept.count - 1, num_bytes)

    def drop(self, blocks: Iterable[Block], guard: Event | None) -> None:
        """Let go of the last blocks, the last one first; their bytes on the host may be read until `guard`."""
        for block in blocks:
            if block.is_resident:
                kept = next(kept for kept in reversed(self._rooms[block.form]) if kept.count)
                kept.count -= 1
                kept.room.let_go(kept.count)
            else:
                self._extents[block.form].pop(block.num_bytes, guard)

    def fork(self) -> BlockMemory:
        """That of a copy of the cache, with the same blocks; nothing is copied."""
        other = BlockMemory(self._pool)
        other._doubles = self._doubles
        other._extents = {form: extent.fork() for form, extent in self._extents.items()}
        other._rooms = {form: [replace(kept) for kept in rooms] for form, rooms in self._rooms.items()}
        for kept in self._all_rooms:
            kept.room.share(kept.count)
        return other

    def close(self, guard: Event | None) -> None:
        """Give all of it back that no copy of the cache has; the host's may be read until `guard`."""
        for extent in self._extents.values():
            extent.close(guard)
        for kept in self._all_rooms:
            for idx in range(kept.count):
                kept.room.let_go(idx)
            if kept.room.owner is self:
                kept.room.owner = None
        self._extents.clear()
        self._rooms.clear()
