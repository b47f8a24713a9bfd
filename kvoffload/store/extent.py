"""Host memory of one layer and form, to which blocks append, so that consecutive blocks are one contiguous copy.

Copies of a cache share what they have in common: a piece of memory goes back to the pool when the last extent that
holds blocks in it lets go, and nobody writes where another may still read.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from kvoffload.backend import Event
from kvoffload.errors import HostMemoryError
from kvoffload.store.pool import HostPool, Region


@dataclass(slots=True, eq=False)
class _Memory:
    """A region, and by how many extents it is held."""

    region: Region
    holders: int = 1

    def note_read(self, guard: Event | None) -> None:
        """Blocks of it that were let go may be read until `guard`, which comes after all reads before."""
        self.region.guard = guard or self.region.guard


@dataclass(slots=True, eq=False)
class _Piece:
    """What one extent has of a region."""

    memory: _Memory
    used_bytes: int = 0

    @property
    def room_bytes(self) -> int:
        """How much may be appended: nothing where another extent may read."""
        return self.memory.region.num_bytes - self.used_bytes if self.memory.holders == 1 else 0


class Extent:
    """Host memory of one layer and form; blocks append, so consecutive blocks are one contiguous copy.

    Args:
        pool: gives the memory.
        doubles: grow by doubling, where the maximum length is not known.
    """

    def __init__(self, pool: HostPool, *, doubles: bool = False) -> None:
        self._pool = pool
        self._pieces: list[_Piece] = []
        self.doubles = doubles

    @property
    def capacity_bytes(self) -> int:
        return sum(piece.memory.region.num_bytes for piece in self._pieces)

    @property
    def used_bytes(self) -> int:
        return sum(piece.used_bytes for piece in self._pieces)

    def reserve(self, num_bytes: int) -> None:
        """Make room for that many bytes in all, in one piece if nothing was reserved before."""
        room = sum(piece.room_bytes for piece in self._pieces)
        missing = num_bytes - self.used_bytes - room
        if missing > 0:
            self._add(self._pool.allocate(missing))

    def append(self, num_bytes: int) -> tuple[torch.Tensor, Event | None]:
        """Bytes for a new block behind the last, and the event to wait for before writing them."""
        # Only a piece from the last used one on keeps the order of blocks.
        last_used = max((i for i, piece in enumerate(self._pieces) if piece.used_bytes), default=0)
        piece = next((piece for piece in self._pieces[last_used:] if piece.room_bytes >= num_bytes), None)
        if piece is None:
            piece = self._add(self._allocate(num_bytes))
        start = piece.used_bytes
        piece.used_bytes += num_bytes
        region = piece.memory.region
        return region.bytes[start : start + num_bytes], region.guard

    def _add(self, region: Region) -> _Piece:
        piece = _Piece(_Memory(region))
        self._pieces.append(piece)
        return piece

    def _allocate(self, num_bytes: int) -> Region:
        """As much again as is its own, where the length is not known and the pool may grow so much."""
        own_bytes = sum(piece.memory.region.num_bytes for piece in self._pieces if piece.memory.holders == 1)
        if self.doubles and own_bytes > num_bytes:
            with contextlib.suppress(HostMemoryError):  # there may be room for what is needed now
                return self._pool.allocate(own_bytes)
        return self._pool.allocate(num_bytes)

    def pop(self, num_bytes: int, guard: Event | None) -> None:
        """Remove the last block; its bytes may be read until `guard`."""
        piece = next(p for p in reversed(self._pieces) if p.used_bytes)
        piece.used_bytes -= num_bytes
        piece.memory.note_read(guard)
        if piece.memory.holders > 1 and not piece.used_bytes:
            self._pieces.remove(piece)
            piece.memory.holders -= 1

    def fork(self) -> Extent:
        """Another extent with the same blocks, of which nothing is copied; what either appends is its own.

        The room behind the blocks stays with this one.
        """
        other = Extent(self._pool, doubles=self.doubles)
        for idx in reversed([idx for idx, piece in enumerate(self._pieces) if piece.used_bytes]):
            piece = self._pieces[idx]
            if piece.room_bytes:
                memory = piece.memory
                memory.region, rest = self._pool.split(memory.region, piece.used_bytes)
                self._pieces.insert(idx + 1, _Piece(_Memory(rest)))
            piece.memory.holders += 1
            other._pieces.insert(0, _Piece(piece.memory, piece.used_bytes))
        return other

    def close(self, guard: Event | None) -> None:
        """Let go of all memory; what nobody else holds goes back to the pool, to be read until `guard`."""
        for piece in self._pieces:
            piece.memory.holders -= 1
            piece.memory.note_read(guard)
            if not piece.memory.holders:
                self._pool.free(piece.memory.region, piece.memory.region.guard)
        self._pieces = []
