"""What a form of stored blocks is: how they are packed, what attention reads of them, how K and V come back.

A form belongs to one layer, whose shapes it knows. It moves nothing between host and device, and does not know which
blocks there are. All of it runs on the compute queue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from kvoffload.kernels import ops
from kvoffload.planning.placement import FormName, Part
from kvoffload.store.block import Span
from kvoffload.store.device_memory import DeviceMemory
from kvoffload.store.positions import PositionStore
from kvoffload.store.tail import KVShape, NewTokens, RowShape, Tail


class Leaving(NamedTuple):
    """Tokens on their way from the tail, or from this forward, into blocks.

    `first_token` is the number of the first one in the cache, and of those in `new` the first stand behind the tail's.
    """

    tail: Tail
    new: NewTokens
    first_token: int
    start: int  # of the tail and the new tokens together
    stop: int
    row_step: int  # every so manieth row is stored

    def between(self, start: int, stop: int) -> Leaving:
        """Some of these, as numbers from `start` on."""
        return self._replace(first_token=self.first_token + start, start=self.start + start, stop=self.start + stop)

    def copy(self, part: Part, out: torch.Tensor) -> None:
        """One part of these tokens into `out`, [tokens, stored rows, width]."""
        self.tail.copy(part, out, self.start, self.stop, self.row_step, self.new)

    def sample(self, part: Part, index: Sequence[int]) -> torch.Tensor:
        """One part of some of them, in ascending order, [tokens, stored rows, width]."""
        return self.tail.sample(part, [self.start + idx for idx in index], self.row_step, self.new)


class Form(ABC):
    """One way to store the tokens of one layer.

    `row` says how a block lies: its bytes are [tokens, rows, row.width] of `row.dtype`, unless `num_bytes` and the
    other methods agree on something else.
    """

    name: ClassVar[FormName]
    row: RowShape
    shape: KVShape

    @classmethod
    def of(cls, shape: KVShape, block_tokens: int) -> Form | None:
        """The form for a layer with such K and V; None where these are not all it takes, or it cannot hold them."""
        return None

    def fork(self, positions: PositionStore, work: Counter[str]) -> Form:
        """The form for the same layer of a copy of the cache.

        Args:
            positions: of the copy.
            work: its count of what forms do.
        """
        return self

    def num_bytes(self, tokens: int, rows: int) -> int:
        """Of a block."""
        return tokens * rows * self.row.num_bytes

    def accepts(self, rows: int) -> bool:
        """Whether new blocks of so many stored rows can have it."""
        return True

    def agrees(self, tokens: Sequence[int], leaving: Leaving) -> bool:
        """Whether K and V will come back from what is to be stored; may wait for the device.

        Args:
            tokens: those to be stored in this form, as numbers from `leaving.start` on.
            leaving: all tokens that are about to be stored.
        """
        return True

    def holds(self, leaving: Leaving) -> torch.Tensor | None:
        """Which of the blocks about to be stored can have it, bool [blocks] on the device; None: all of them."""
        return None

    def is_as_it_was(self) -> bool:
        """Whether K and V still come back as they would have when the first tokens were cached."""
        return True

    @abstractmethod
    def pack(self, out: torch.Tensor, leaving: Leaving) -> None:
        """Fill the bytes of consecutive blocks, uint8."""

    def pack_kv(self, out: torch.Tensor, kv: torch.Tensor) -> None:
        """The same by K and V alone, [tokens, stored rows, width]; only of forms that are made of these."""
        raise NotImplementedError(f"blocks of {self.name} are made of more than K and V")

    @abstractmethod
    def restore(self, stored: DeviceMemory, span: Span, out: torch.Tensor) -> None:
        """K and V of blocks on the device, into `out` [tokens, rows, width]."""

    @abstractmethod
    def segment(self, stored: DeviceMemory, span: Span, scratch: DeviceMemory) -> Any:
        """What attention reads of blocks on the device, as `attend` takes it.

        Args:
            stored: begins with them.
            span: which they are.
            scratch: that compute alone uses, for K and V of a chunk where attention cannot read the blocks themselves.
        """

    def question(self, query: torch.Tensor) -> torch.Tensor:
        """What queries [rows, tokens, heads, head_dim] are for its segments, in every one of a layer."""
        return query

    def attend(self, query: torch.Tensor, segment: Any, out: torch.Tensor, lse: torch.Tensor, **options: Any) -> None:
        """Attention over a segment; arguments and effect as of `ops.segment_attention`."""
        ops.segment_attention(query, segment, out, lse, **options)

    def reopened(self, stored: DeviceMemory, span: Span) -> Mapping[Part, torch.Tensor]:
        """What of a block that a crop made partial goes back to the tail, each [tokens, stored rows, width]."""
        kv = torch.empty(
            span.num_tokens, span.rows, self.shape.width, dtype=self.shape.dtype, device=stored.bytes.device
        )
        self.restore(stored, span, kv)
        return {"kv": kv}


def attention_layout(shape: KVShape, span: Span) -> tuple[torch.dtype, tuple[int, ...]]:
    """How attention reads K and V of equal head sizes: [tokens, rows, 2, heads, head_dim]."""
    return shape.dtype, (span.num_tokens, span.rows, 2, shape.key_heads, shape.key_dim)
