"""K and V in a form of fewer bytes, as attention is given them: blocks one behind the other, and who can read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class StoredKV(NamedTuple):
    """Consecutive blocks of one form.

    `decode(data, rows, dtype)` gives keys and values of some of the blocks, [tokens, rows, 2, heads, head_dim]: those
    that the kernel's reader (`readers/<name>.py`) gives, which is the other half of the definition.
    """

    name: str  # of the form
    data: Tensor  # uint8 [blocks, bytes of a block], contiguous
    block_tokens: int
    rows: int  # that are stored
    heads: int  # of K and V
    head_dim: int
    decode: Callable[[Tensor, int, torch.dtype], Tensor]

    @property
    def num_tokens(self) -> int:
        return self.data.shape[0] * self.block_tokens
