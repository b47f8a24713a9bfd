"""Blocks that stay on the device, handed out run by run beside the chunks that arrive."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from kvoffload.cache.layer import CacheLayer
from kvoffload.planning.placement import Form


class ResidentRun(NamedTuple):
    """Consecutive resident blocks of one form, contiguous on the device."""

    form: Form
    first_block: int
    data: torch.Tensor  # [tokens, stored rows, width]


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

    def due(self, share: float) -> Iterator[ResidentRun]:
        """A further share of the blocks."""
        blocks, block_tokens = self._layer.blocks, self._layer.cache.placement.block_tokens
        self._due = min(float(self._count), self._due + share * self._count)
        while self._taken < round(self._due):
            first, idx = blocks[self._taken], self._taken
            length = min(self._runs[idx], round(self._due) - idx, self._max_blocks)
            assert first.resident is not None
            shape = (length * block_tokens, first.rows, first.resident.shape[2])
            self._taken += length
            yield ResidentRun(first.form, idx, first.resident.as_strided(shape, first.resident.stride()))
