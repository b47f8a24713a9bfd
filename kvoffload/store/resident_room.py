"""Device memory for some resident blocks of one layer and form, in the order of the tokens; copies of a cache share it.

Owns which place holds a block. Nobody writes where another copy may still read: a place is taken by who comes first.
"""

from __future__ import annotations

import torch


class ResidentRoom:
    """Places for blocks, one behind the other.

    Args:
        data: uint8, one-dimensional.
        place_bytes: of a block of all logical rows.
        rows: logical rows that a place has room for.
    """

    def __init__(self, data: torch.Tensor, place_bytes: int, rows: int) -> None:
        self.rows = rows
        self.owner: object | None = None  # in whose account of device memory it is
        self._data = data
        self._place_bytes = place_bytes
        self._holders = [0] * (data.numel() // place_bytes)

    @property
    def num_bytes(self) -> int:
        return self._data.numel()

    @property
    def num_places(self) -> int:
        return len(self._holders)

    def is_free(self, idx: int) -> bool:
        """Whether a block may be stored in this place."""
        return idx < len(self._holders) and not self._holders[idx]

    def take(self, idx: int, num_bytes: int) -> torch.Tensor:
        """The place of block `idx`, uint8: as many bytes of it as a block of the stored rows takes."""
        assert self.is_free(idx), "another copy of the cache has a block here"
        self._holders[idx] = 1
        with torch.inference_mode(False):
            return self._data[idx * self._place_bytes :][:num_bytes]

    def share(self, count: int) -> None:
        """One more copy of the cache has the first `count` blocks."""
        for idx in range(count):
            self._holders[idx] += 1

    def let_go(self, idx: int) -> None:
        """One copy of the cache does not have block `idx` any more."""
        self._holders[idx] -= 1
