"""Host memory of one layer and form, to which blocks append, so that consecutive blocks are one contiguous copy."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch

from kvoffload.backend import Event
from kvoffload.errors import HostMemoryError
from kvoffload.store.pool import HostPool, Region


@dataclass(slots=True)
class _Piece:
    region: Region
    used_bytes: int = 0


@dataclass(slots=True)
class Extent:
    """Host memory of one layer and form; blocks append, so consecutive blocks are one contiguous copy."""

    pool: HostPool
    doubles: bool = False  # grow by doubling, where the maximum length is not known
    pieces: list[_Piece] = field(default_factory=list)
    guard: Event | None = None  # the last read of a block that was removed again

    @property
    def capacity_bytes(self) -> int:
        return sum(piece.region.num_bytes for piece in self.pieces)

    @property
    def used_bytes(self) -> int:
        return sum(piece.used_bytes for piece in self.pieces)

    def reserve(self, num_bytes: int) -> None:
        """Make room for that many bytes in all, in one piece if nothing was reserved before."""
        missing = num_bytes - self.capacity_bytes
        if missing > 0:
            self.pieces.append(_Piece(self.pool.allocate(missing)))

    def append(self, num_bytes: int) -> tuple[torch.Tensor, Event | None]:
        """Bytes for a new block behind the last, and the event to wait for before writing them."""
        room = [p for p in self.pieces if p.region.num_bytes - p.used_bytes >= num_bytes]
        # Only the first piece behind the last used one keeps the order of blocks.
        last_used = max((i for i, p in enumerate(self.pieces) if p.used_bytes), default=0)
        piece = next((p for p in self.pieces[last_used:] if p in room), None)
        if piece is None:
            piece = _Piece(self._allocate(num_bytes))
            self.pieces.append(piece)
        start = piece.used_bytes
        piece.used_bytes += num_bytes
        return piece.region.bytes[start : start + num_bytes], self.guard or piece.region.guard

    def _allocate(self, num_bytes: int) -> Region:
        """As much again as there is, where the length is not known and the pool may grow so much."""
        if self.doubles and self.capacity_bytes > num_bytes:
            with contextlib.suppress(HostMemoryError):  # there may be room for what is needed now
                return self.pool.allocate(self.capacity_bytes)
        return self.pool.allocate(num_bytes)

    def pop(self, num_bytes: int, guard: Event | None) -> None:
        """Remove the last block; its bytes may be read until `guard`."""
        piece = next(p for p in reversed(self.pieces) if p.used_bytes)
        piece.used_bytes -= num_bytes
        self.guard = guard

    def close(self, guard: Event | None) -> None:
        """Give all memory back to the pool."""
        for piece in self.pieces:
            self.pool.free(piece.region, guard)
        self.pieces, self.guard = [], None
