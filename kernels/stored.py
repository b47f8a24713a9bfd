"""K and V in a form of fewer bytes, as attention is given them: blocks one behind the other, and who can read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvoffload.kernels import scratch


class StoredKV(NamedTuple):
    """Consecutive blocks of one form.

    `decode(data, rows, out)` writes keys and values of some of the blocks, [tokens, rows, 2, heads, head_dim]: those
    that the kernel's reader (`readers/<name>.py`) gives, which is the other half of the definition.
    """

    name: str  # of the form
    data: Tensor  # uint8 [blocks, bytes of a block], contiguous
    block_tokens: int
    rows: int  # that are stored
    heads: int  # of K and V
    head_dim: int
    decode: Callable[[Tensor, int, Tensor], None]

    def decoded(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """K and V of some of the blocks, [tokens, rows, 2, heads, head_dim], until the next call in this thread."""
        data = self.data[start:stop]
        shape = (len(data) * self.block_tokens, self.rows, 2, self.heads, self.head_dim)
        found = scratch.take("decoded", shape, dtype, data.device)
        self.decode(data, self.rows, found)
        return found

    @property
    def num_tokens(self) -> int:
        return self.data.shape[0] * self.block_tokens
