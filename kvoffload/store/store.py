"""Where cached tokens live on the host: a pool of slabs, extents in it, blocks in these, and the row table.

Owns host memory and the map from a block to its bytes. Does not move bytes (transfer.py) and does not know layers'
tails (cache.py). Every cached token is stored once, in the form of its block.

The row table is what makes beam search free: `row_table[block, logical_row] -> physical row`; reordering beams
changes the table, never a stored byte (the idea of block tables: PagedAttention, Kwon et al. 2023, section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kvoffload.backend import Backend, Event
from kvoffload.backend.base import HostBuffer
from kvoffload.errors import HostMemoryError
from kvoffload.planning.placement import Form
from kvoffload.units import gib

SLAB_BYTES = 64 * 2**20
ALIGNMENT_BYTES = 256


@dataclass(slots=True)
class Region:
    """A contiguous part of a slab. `guard` completes when nobody reads its earlier contents any more."""

    slab_idx: int
    offset: int
    bytes: torch.Tensor  # uint8
    guard: Event | None

    @property
    def num_bytes(self) -> int:
        return self.bytes.numel()


@dataclass(slots=True)
class _Free:
    offset: int
    num_bytes: int
    guard: Event | None


class HostPool:
    """Slabs of host memory that outlive `generate()` calls.

    Args:
        backend: allocates (and pins) the slabs.
        cap_bytes: what the slabs may add up to.
        on_progress: called with bytes allocated so far while slabs are being made.
    """

    def __init__(self, backend: Backend, cap_bytes: int, on_progress: Callable[[int], None] | None = None) -> None:
        self._backend = backend
        self.cap_bytes = cap_bytes
        self._on_progress = on_progress
        self._slabs: list[HostBuffer] = []
        self._free: list[list[_Free]] = []  # per slab, by offset

    @property
    def slab_bytes(self) -> int:
        """Host memory held, used or not."""
        return sum(slab.tensor.numel() for slab in self._slabs)

    @property
    def pinned_bytes(self) -> int:
        """Host memory that is really pinned."""
        return sum(slab.pinned_bytes for slab in self._slabs)

    @property
    def free_bytes(self) -> int:
        """Bytes of the slabs that no region uses."""
        return sum(span.num_bytes for spans in self._free for span in spans)

    @property
    def used_bytes(self) -> int:
        """Bytes that regions use."""
        return self.slab_bytes - self.free_bytes

    def close(self) -> None:
        """Forget all slabs; the backend has given them back."""
        self._slabs, self._free = [], []

    def allocate(self, num_bytes: int) -> Region:
        """A region of that size.

        Raises:
            HostMemoryError: the cap does not allow another slab; says by how much.
        """
        num_bytes = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        region = self._from_free(num_bytes)
        if region is None:
            self._add_slab(num_bytes)
            region = self._from_free(num_bytes)
            assert region is not None
        return region

    def _from_free(self, num_bytes: int) -> Region | None:
        for slab_idx, spans in enumerate(self._free):
            for idx, span in enumerate(spans):
                if span.num_bytes >= num_bytes:
                    offset = span.offset
                    if span.num_bytes == num_bytes:
                        del spans[idx]
                    else:
                        spans[idx] = _Free(offset + num_bytes, span.num_bytes - num_bytes, span.guard)
                    data = self._slabs[slab_idx].tensor[offset : offset + num_bytes]
                    return Region(slab_idx, offset, data, span.guard)
        return None

    def _add_slab(self, needed_bytes: int) -> None:
        room = self.cap_bytes - self.slab_bytes
        if needed_bytes > room:
            self._drop_unused_slabs()
            room = self.cap_bytes - self.slab_bytes
        if needed_bytes > room:
            raise HostMemoryError(
                f"the cache needs {gib(needed_bytes)} more host memory, {gib(max(room, 0))} of the cap "
                f"of {gib(self.cap_bytes)} are left: raise host_gib, or lower the batch or max_new_tokens"
            )
        size = min(max(needed_bytes, SLAB_BYTES), room)
        self._slabs.append(self._backend.allocate_host(size))
        self._free.append([_Free(0, size, None)])
        if self._on_progress is not None:
            self._on_progress(self.slab_bytes)

    def _drop_unused_slabs(self) -> None:
        """Give back slabs without regions, so that a request of another size can have their room."""
        unused = [
            idx
            for idx, (slab, spans) in enumerate(zip(self._slabs, self._free, strict=True))
            if len(spans) == 1 and spans[0].num_bytes == slab.tensor.numel()
        ]
        if unused:
            self._backend.synchronize()  # a copy may still be reading what the last cache stored there
        for idx in unused:
            self._backend.release_host(self._slabs[idx])
            self._slabs[idx] = HostBuffer(torch.empty(0, dtype=torch.uint8), 0)  # keeps the other indices valid
            self._free[idx] = []

    def free(self, region: Region, guard: Event | None) -> None:
        """Give a region back; whoever gets it next must not write before `guard`."""
        if not self._slabs:
            return  # the pool is closed
        spans = self._free[region.slab_idx]
        spans.append(_Free(region.offset, region.num_bytes, guard))
        spans.sort(key=lambda span: span.offset)
        merged = [spans[0]]
        for span in spans[1:]:
            last = merged[-1]
            if last.offset + last.num_bytes == span.offset:
                newest = guard if region.offset in (last.offset, span.offset) else last.guard
                merged[-1] = _Free(last.offset, last.num_bytes + span.num_bytes, newest)
            else:
                merged.append(span)
        self._free[region.slab_idx] = merged


@dataclass(slots=True, eq=False)
class Block:
    """`block_tokens` cached tokens of one layer, for all rows that are stored.

    Exactly one of `host` and `resident` is set. `written` completes when the bytes on the host are valid.
    """

    form: Form
    rows: int
    num_bytes: int
    row_step: int = 1  # stored row i was logical row i * row_step when it was written
    host: torch.Tensor | None = None  # uint8
    resident: torch.Tensor | None = None  # on the device: [block_tokens, rows, width]
    written: Event | None = None


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
            piece = _Piece(self.pool.allocate(max(num_bytes, self.capacity_bytes if self.doubles else 0)))
            self.pieces.append(piece)
        start = piece.used_bytes
        piece.used_bytes += num_bytes
        return piece.region.bytes[start : start + num_bytes], self.guard or piece.region.guard

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


class RowTable:
    """`table[block, logical_row] -> physical row` of one cache, shared by its layers.

    `table` is None while every stored row is its own logical row.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.rows = 0
        self.num_blocks = 0
        self.table: torch.Tensor | None = None  # int32 [num_blocks, rows]
        self.version = 0

    def extend(self, num_blocks: int, rows: int, copies: int = 1) -> None:
        """Append blocks written in logical order; each stored row serves `copies` consecutive logical rows."""
        self.rows = rows
        self.num_blocks += num_blocks
        if copies > 1 and self.table is None:
            self.table = self._identity(self.num_blocks - num_blocks, 1)
        if self.table is not None:
            self.table = torch.cat([self.table, self._identity(num_blocks, copies)])
        self.version += 1

    def select(self, indices: torch.Tensor) -> None:
        """Logical row i becomes what row `indices[i]` was (int64, any length: rows may be repeated or dropped)."""
        indices = indices.to(self._device)
        if self.num_blocks:
            table = self._identity(self.num_blocks, 1) if self.table is None else self.table
            self.table = table.index_select(1, indices)
        self.rows = indices.numel()
        self.version += 1

    def truncate(self, num_blocks: int) -> None:
        """Forget the blocks behind the first `num_blocks`."""
        self.num_blocks = num_blocks
        if self.table is not None:
            self.table = self.table[:num_blocks] if num_blocks else None
        self.version += 1

    def _identity(self, num_blocks: int, copies: int) -> torch.Tensor:
        with torch.inference_mode(False):
            row = torch.arange(self.rows, dtype=torch.int32, device=self._device).div(copies, rounding_mode="floor")
            return row.expand(num_blocks, -1)
