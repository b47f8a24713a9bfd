"""Host memory of a session: slabs that outlive `generate()` calls, and the regions in use of them.

Owns host memory. Does not know what is kept in a region (`extent`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvoffload.backend import Backend, Event
from kvoffload.backend.base import HostBuffer
from kvoffload.errors import HostMemoryError
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
        num_bytes = _aligned(num_bytes)
        region = self._from_free(num_bytes)
        if region is None:
            self._add_slab(num_bytes)
            region = self._from_free(num_bytes)
            assert region is not None
        return region

    def _from_free(self, num_bytes: int) -> Region | None:
        for slab_idx, spans in enumerate(self._free):
            for idx, span in enumerate(spans):
                offset = _aligned(span.offset)
                left = span.offset + span.num_bytes - offset - num_bytes
                if left >= 0:
                    around = [
                        _Free(span.offset, offset - span.offset, span.guard),  # where a region was split
                        _Free(offset + num_bytes, left, span.guard),
                    ]
                    spans[idx : idx + 1] = [part for part in around if part.num_bytes]
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

    def split(self, region: Region, num_bytes: int) -> tuple[Region, Region]:
        """The first `num_bytes` bytes of a region and the others, in its place; each is freed by itself."""
        start, end = region.offset + num_bytes, region.offset + region.num_bytes
        slab = self._slabs[region.slab_idx].tensor
        return (
            Region(region.slab_idx, region.offset, slab[region.offset : start], region.guard),
            Region(region.slab_idx, start, slab[start:end], region.guard),
        )

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


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
