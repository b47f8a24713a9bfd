"""The blocks of one layer as a forward reads them: which are on the device, which travel, and where their bytes are.

Owns the choice between a block and its copy on the device, and the views of both that are made once and used by every
step. Does not own which blocks there are, nor when one is stored (`layer`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from kvoffload.cache.state import CacheState
from kvoffload.pipeline.chunks import Chunk, chunks_of, joined, resident_spans
from kvoffload.planning.forms import FORMS
from kvoffload.planning.placement import FormName, Tier
from kvoffload.store.block import Block, Span
from kvoffload.store.device_memory import DeviceMemory
from kvoffload.store.forms.form import Form
from kvoffload.store.near_copies import NearCopies
from kvoffload.store.tail import KVShape


class LayerBlocks:
    """Of one offloaded layer; each change of them is another `version`.

    Args:
        cache: what the layer shares with the others.
    """

    def __init__(self, cache: CacheState) -> None:
        self.cache = cache
        self.version = 0
        self.blocks: list[Block] = []
        self.shape: KVShape | None = None
        self.forms: dict[FormName, Form] = {}  # that blocks can have
        self._near: tuple[
            NearCopies, ...
        ] = ()  # on the device, of blocks that are stored on the host; exact ones first
        self._forget_views()

    def _forget_views(self) -> None:
        """What was made of the blocks, each with the version it is of."""
        self._nearest: tuple[int, Sequence[Block]] = (-1, ())
        self._chunks: tuple[int, Sequence[Chunk]] = (-1, ())
        self._resident: tuple[int, Sequence[Span], dict[tuple[int, int], DeviceMemory]] = (-1, (), {})
        self._on_device: tuple[tuple[int, bool], Sequence[tuple[Span, DeviceMemory]]] = ((-1, False), ())

    @property
    def num_stored_tokens(self) -> int:
        """Cached tokens that are in blocks."""
        return len(self.blocks) * self.cache.placement.block_tokens

    @property
    def stored_kv_bytes(self) -> int:
        """Bytes the stored blocks need in a layer buffer."""
        return self.kv_offset(len(self.blocks))

    @property
    def nearest(self) -> Sequence[Block]:
        """The blocks as a pass reads them: the copy on the device where there is one that is exact."""
        exact = [near for near in self._near if near.is_exact]
        if not exact:
            return self.blocks
        if self._nearest[0] != self.version:
            self._nearest = (self.version, self._with_copies(exact))
        return self._nearest[1]

    def _with_copies(self, copies: Sequence[NearCopies]) -> Sequence[Block]:
        """The blocks, or the first copy of each where there are some."""
        found = list(self.blocks)
        for near in reversed(copies):
            for idx, copy in near.copies.items():
                found[idx] = copy
        return found

    def count(self, tier: Tier) -> dict[FormName, int]:
        """Blocks stored on the device or on the host, by form."""
        return Counter(block.form for block in self.blocks if block.is_resident == (tier == "device"))

    def count_read(self, tier: Tier) -> dict[FormName, int]:
        """Blocks that a forward reads on the device or from the host, by form."""
        return Counter(block.form for block in self.nearest if block.is_resident == (tier == "device"))

    def kv_offset(self, first_block: int) -> int:
        """Bytes from the start of a layer buffer to the place of a block's K and V."""
        assert self.shape is not None
        rows = sum(block.rows for block in self.blocks[:first_block])
        return rows * self.cache.placement.block_tokens * self.shape.row_bytes

    def cargo(self) -> Sequence[Chunk]:
        """The host blocks in order of transfer."""
        if self._chunks[0] != self.version:
            assert self.shape is not None
            placement = self.cache.placement
            chunks = chunks_of(
                self.nearest,
                block_tokens=placement.block_tokens,
                chunk_blocks=placement.chunk_blocks,
                kv_row_bytes=self.shape.row_bytes,
                schedule=self.cache.engine.schedule,
            )
            self._chunks = (self.version, chunks)
        return self._chunks[1]

    def resident_spans(self) -> Sequence[Span]:
        """The blocks on the device, as many together as are contiguous there."""
        if self._resident[0] != self.version:
            self._resident = (self.version, resident_spans(self.nearest, self.cache.placement.block_tokens), {})
        return self._resident[1]

    def on_device(self, is_any_order: bool) -> Sequence[tuple[Span, DeviceMemory]]:
        """What drafts read: all blocks that are on the device or have a copy there, with their bytes.

        Args:
            is_any_order: whether copies may be taken as they lie, whatever the order of their blocks, whose numbers
                are then not those of the span.
        """
        key = (self.version, is_any_order)
        if self._on_device[0] != key:
            bt, rows = self.cache.placement.block_tokens, self.cache.rows
            wholes = [near.whole for near in self._near] if is_any_order else [None]
            blocks = self._with_copies(self._near) if None in wholes else self.blocks
            spans = [part for span in resident_spans(blocks, bt) for part in self._parts(span)]
            found = [(span, self._bytes_of(blocks, span)) for span in spans]
            for near, whole in zip(self._near, () if None in wholes else wholes, strict=False):
                if whole is not None and whole.numel():
                    span = Span(near.form, 0, whole.numel() // near.place_bytes, bt, rows, 1)
                    found.append((span, DeviceMemory(whole)))
            self._on_device = (key, found)
        return self._on_device[1]

    def _parts(self, span: Span) -> Iterator[Span]:
        """A span in parts for which there is a scratch, where attention cannot read it as it lies."""
        most = span.num_blocks if FORMS[span.form].is_read_as_stored else self.cache.placement.chunk_blocks
        for start in range(0, span.num_blocks, most):
            count = min(most, span.num_blocks - start)
            yield span._replace(first_block=span.first_block + start, num_blocks=count)

    def _bytes_of(self, blocks: Sequence[Block], span: Span) -> DeviceMemory:
        with torch.inference_mode(False):
            return DeviceMemory(joined(blocks[span.first_block : span.first_block + span.num_blocks]))

    def resident(self, span: Span) -> DeviceMemory:
        """The bytes of contiguous blocks on the device; the same object until blocks change."""
        self.resident_spans()
        known, key = self._resident[2], (span.first_block, span.num_blocks)
        found = known.get(key)
        if found is None:
            found = known[key] = self._bytes_of(self.nearest, span)
        return found

    def span(self, first_block: int, num_blocks: int) -> Span:
        """Consecutive blocks, which are of one form and have equal rows."""
        block = self.blocks[first_block]
        bt = self.cache.placement.block_tokens
        return Span(block.form, first_block, num_blocks, bt, block.rows, block.row_step)
