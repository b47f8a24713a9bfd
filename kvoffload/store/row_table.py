"""Which stored row is which logical row, so that a beam search reorders a table and never a stored byte.

Source: the idea of block tables, PagedAttention (Kwon et al. 2023, section 4).
"""

from __future__ import annotations

import copy

import torch


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

    def fork(self) -> RowTable:
        """The same, for a copy of the cache; `table` is never written, only replaced."""
        return copy.copy(self)

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
