"""The blocks of one layer and their copies on the device: when a copy is made, and from what.

Owns the making of copies, from tokens that are about to be stored or over the link. Where they lie and which are kept
is in `store/near_copies`, who reads them in `layer_blocks`, and how many there are is planned.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch

from kvoffload.cache.layer_blocks import LayerBlocks
from kvoffload.pipeline.chunks import chunks_of, joined, resident_spans
from kvoffload.planning.placement import PLAIN, FormName
from kvoffload.store import forms
from kvoffload.store.forms.form import Leaving
from kvoffload.store.near_copies import NearCopies


class CopiedBlocks(LayerBlocks):
    """Of one offloaded layer."""

    @property
    def window_places(self) -> int:
        """Exact copies that there are on the device, or that can come there, of blocks that are on the host as well."""
        return sum(near.num_places for near in self._near if near.is_exact)

    def make_copies(self) -> None:
        """Room for the copies that the placement foresees; those there are stay, as many as it has room for.

        Blocks that were stored before there was room for their copy cross the link once.
        """
        wanted = self._wanted_copies()
        if wanted == [(near.form, near.num_places, near.place_bytes, near.rolls) for near in self._near]:
            return
        before, self._near = {near.form: near for near in self._near}, ()
        self._forget_views()  # they would keep the memory of those before
        self.version += 1
        for form in before.keys() - {form for form, *_ in wanted}:
            before.pop(form).close()  # first: there may be no room for all of them
        for form, num_places, place_bytes, rolls in wanted:
            near = NearCopies(self.cache.engine.backend, form, num_places, place_bytes, rolls=rolls)
            if form in before:
                before.pop(form).move_to(near)
            self._near = (*self._near, near)
        self._copy_stored()

    def _wanted_copies(self) -> list[tuple[FormName, int, int, bool]]:
        """Form, places, bytes of a place, and whether newer ones take the places of older ones."""
        assert self.shape is not None
        placement, rows = self.cache.placement, self.cache.rows
        bt, has_shadow = placement.block_tokens, placement.shadow_blocks > 0
        counts = {PLAIN: placement.window_blocks}
        if has_shadow:
            self.forms |= forms.made_of_kv({placement.shadow_form} - self.forms.keys(), self.shape, bt)
            counts[placement.shadow_form] = placement.shadow_blocks
        return [
            (name, count, self.forms[name].num_bytes(bt, rows), name != PLAIN or not has_shadow)
            for name, count in counts.items()
            if count and name in self.forms
        ]

    def copy_newest(self, count: int, leaving: Leaving) -> None:
        """Copy what is on the host of the last `count` blocks, as far as there is room."""
        first, bt = len(self.blocks) - count, self.cache.placement.block_tokens
        try:
            for near, taken in self._take_copies(first):
                for start, end, out in self._taken_together(near, taken, first, count):
                    self.forms[near.form].pack(out, leaving.between(start * bt, end * bt))
        except BaseException:
            for near in self._near:
                near.forget(first)
            raise

    def _copy_stored(self) -> None:
        """Copy what is on the host of all blocks and has no copy yet, as far as there is room: over the link."""
        placement, engine, shape, all_taken = self.cache.placement, self.cache.engine, self.shape, self._take_copies(0)
        assert shape is not None
        bt = placement.block_tokens
        chunks = chunks_of(
            self.blocks,
            block_tokens=bt,
            chunk_blocks=placement.chunk_blocks,
            kv_row_bytes=shape.row_bytes,
            schedule=engine.schedule,
            chosen=set().union(*(taken for _, taken in all_taken)),
        )
        try:
            for chunk in chunks:
                span, stored = chunk.span, engine.fetch(chunk)
                kv = torch.empty(span.num_tokens, span.rows, shape.width, dtype=shape.dtype, device=stored.bytes.device)
                self.forms[span.form].restore(stored, span, kv)
                for near, taken in all_taken:
                    for start, end, out in self._taken_together(near, taken, span.first_block, span.num_blocks):
                        self.forms[near.form].pack_kv(out, kv[start * bt : end * bt])
        except BaseException:
            for near in self._near:  # what was taken and is not filled would be read
                near.close()
            self._near = ()
            self.version += 1
            raise

    def _take_copies(self, first: int) -> list[tuple[NearCopies, set[int]]]:
        """Take places for copies of the blocks on the host from `first` on, as far as there are any: their numbers."""
        bt, found = self.cache.placement.block_tokens, []
        left = [idx for idx in range(first, len(self.blocks)) if not self.blocks[idx].is_resident]
        for near in self._near:
            taken = set()
            for idx in near.wanted(left):
                num_bytes = self.forms[near.form].num_bytes(bt, self.blocks[idx].rows)
                if idx not in near.copies and near.take(idx, self.blocks[idx], num_bytes) is not None:
                    taken.add(idx)
            found.append((near, taken))
            left = [idx for idx in left if idx not in near.copies]
        return found

    def _taken_together(
        self, near: NearCopies, taken: Container[int], first: int, count: int
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Of `count` blocks those whose copies were taken, as many together as are contiguous: numbers, and bytes."""
        copies = [near.copies[idx] if idx in taken else None for idx in range(first, first + count)]
        blocks = [copy or self.blocks[first + idx] for idx, copy in enumerate(copies)]
        for span in resident_spans(blocks, self.cache.placement.block_tokens):
            start, end = span.first_block, span.first_block + span.num_blocks
            if copies[start] is not None:
                yield start, end, joined(blocks[start:end])
