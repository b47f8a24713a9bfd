"""Blocks that stay on the device, handed out run by run beside the chunks that arrive."""

from __future__ import annotations

from collections.abc import Iterator

from kvoffload.cache.layer import CacheLayer
from kvoffload.store.block import Span


class ResidentBlocks:
    """The blocks of a layer that live on the device (its first ones), taken bit by bit.

    Args:
        layer: whose blocks.
        max_blocks: the most that one run may have.
    """

    def __init__(self, layer: CacheLayer, max_blocks: int | None = None) -> None:
        self._layer = layer
        self._runs = layer.resident_runs()
        self._count = len(self._runs)
        self._max_blocks = max_blocks or max(1, self._count)
        self._taken = 0
        self._due = 0.0

    def due(self, share: float) -> Iterator[Span]:
        """A further share of the blocks: consecutive ones of one form, contiguous on the device."""
        self._due = min(float(self._count), self._due + share * self._count)
        while self._taken < round(self._due):
            first = self._taken
            length = min(self._runs[first], round(self._due) - first, self._max_blocks)
            self._taken += length
            yield self._layer.span(first, length)
