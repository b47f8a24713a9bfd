"""The memory of one layer's blocks: room on the device for its resident blocks, and an extent per form on the host.

Owns how much is made for a plan, and where a block goes. Does not know which blocks there are, nor fills or moves any
(`kvoffload/cache/layer.py` and `kvoffload/pipeline/write_back.py` do).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from kvoffload.backend import Backend, Event
from kvoffload.planning.placement import FormName, Placement, reserved_blocks
from kvoffload.store.block import Block
from kvoffload.store.extent import Extent
from kvoffload.store.forms.form import Form
from kvoffload.store.pool import HostPool
from kvoffload.store.resident_room import ResidentRoom


class BlockMemory:
    """Where the blocks of one layer lie.

    Args:
        pool: host memory.
    """

    def __init__(self, pool: HostPool) -> None:
        self._pool = pool
        self._extents: dict[FormName, Extent] = {}
        self._doubles = False
        self._rooms: dict[FormName, ResidentRoom] = {}
        self._kept: Counter[FormName] = Counter()  # resident blocks

    @property
    def device_bytes(self) -> int:
        """Device memory of the resident blocks; what copies of a cache share counts for one of them."""
        for room in self._rooms.values():
            room.owner = room.owner or self
        return sum(room.num_bytes for room in self._rooms.values() if room.owner is self)

    @property
    def reserved_bytes(self) -> dict[FormName, int]:
        """Host memory there is for each form, used or not."""
        return {form: extent.capacity_bytes for form, extent in self._extents.items()}

    def make_resident(self, backend: Backend, placement: Placement, forms: Mapping[FormName, Form], rows: int) -> None:
        """Make room on the device for the resident blocks.

        Args:
            backend: gives the memory.
            placement: how many there are of each form.
            forms: that blocks can have.
            rows: logical rows.
        """
        for name, count in placement.resident.items():
            if count and name in forms:
                place_bytes = forms[name].num_bytes(placement.block_tokens, rows)
                data = backend.allocate_device(count * place_bytes)
                self._rooms[name] = ResidentRoom(data, place_bytes, rows)

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

    def has_resident_room(self, rows: int) -> bool:
        """Whether the next block of each form may be resident.

        Rows may have been repeated since places were made, and a copy of the cache may have taken the next one.
        """
        return all(
            room.rows >= rows and (room.is_free(self._kept[form]) or self._kept[form] >= room.num_places)
            for form, room in self._rooms.items()
        )

    def keep(self, form: FormName, num_bytes: int) -> torch.Tensor:
        """The place of the next resident block of a form, uint8."""
        idx = self._kept[form]
        self._kept[form] += 1
        return self._rooms[form].take(idx, num_bytes)

    def drop(self, blocks: Iterable[Block], guard: Event | None) -> None:
        """Let go of the last blocks, the last one first; their bytes on the host may be read until `guard`."""
        for block in blocks:
            if block.is_resident:
                self._kept[block.form] -= 1
                self._rooms[block.form].let_go(self._kept[block.form])
            else:
                self._extents[block.form].pop(block.num_bytes, guard)

    def fork(self) -> BlockMemory:
        """That of a copy of the cache, with the same blocks; nothing is copied."""
        other = BlockMemory(self._pool)
        other._doubles = self._doubles
        other._extents = {form: extent.fork() for form, extent in self._extents.items()}
        other._rooms, other._kept = dict(self._rooms), Counter(self._kept)
        for form, count in self._kept.items():
            self._rooms[form].share(count)
        return other

    def close(self, guard: Event | None) -> None:
        """Give all of it back that no copy of the cache has; the host's may be read until `guard`."""
        for extent in self._extents.values():
            extent.close(guard)
        for form, room in self._rooms.items():
            for idx in range(self._kept[form]):
                room.let_go(idx)
            if room.owner is self:
                room.owner = None
        self._extents.clear()
        self._rooms.clear()
        self._kept.clear()
