"""Blocks that stay on the device, handed out bit by bit beside the chunks that arrive."""

from __future__ import annotations

from collections.abc import Iterator

from kvoffload.cache.layer import CacheLayer
from kvoffload.planning.forms import FORMS
from kvoffload.store.block import Span


class ResidentBlocks:
    """The blocks of a layer that live on the device, taken bit by bit.

    Args:
        layer: whose blocks.
        max_blocks: the most that are taken together, of forms for which there is a scratch of that size.
    """

    def __init__(self, layer: CacheLayer, max_blocks: int | None = None) -> None:
        self._left = list(reversed(layer.resident_spans()))
        self._count = sum(span.num_blocks for span in self._left)
        self._max_blocks = max_blocks or max(1, self._count)
        self._taken = 0
        self._due = 0.0

    def due(self, share: float) -> Iterator[Span]:
        """A further share of the blocks: consecutive ones of one form, contiguous on the device."""
        self._due = min(float(self._count), self._due + share * self._count)
        while self._taken < round(self._due):
            span = self._left.pop()
            num_blocks = min(span.num_blocks, round(self._due) - self._taken)
            if not FORMS[span.form].is_read_as_stored:
                num_blocks = min(num_blocks, self._max_blocks)
            if num_blocks < span.num_blocks:
                rest = span._replace(first_block=span.first_block + num_blocks, num_blocks=span.num_blocks - num_blocks)
                self._left.append(rest)
            self._taken += num_blocks
            yield span._replace(num_blocks=num_blocks)
