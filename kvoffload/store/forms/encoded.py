"""What forms of K and V in fewer bytes have in common: they are encoded on the device, and attention decodes them.

A block is self-contained: its scales lie in it. Not a form itself.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from kvoffload.kernels import hadamard, ops
from kvoffload.kernels.stored import StoredKV
from kvoffload.planning.forms import can_encode
from kvoffload.store.block import Span
from kvoffload.store.device_memory import DeviceMemory
from kvoffload.store.forms.form import Form, Leaving
from kvoffload.store.tail import KVShape, RowShape

PIECE_BYTES = 2**22  # of K and V that are encoded or restored at a time, beside what a plan counts


class Encoded(Form):
    """Blocks of K and V of equal head sizes.

    Args:
        shape: of the layer's K and V.
        block_tokens: of each block.
    """

    rotates_keys = False  # keys are stored rotated, and queries rotated alike

    def __init__(self, shape: KVShape, block_tokens: int) -> None:
        self.shape, self.row = shape, RowShape(shape.width, shape.dtype)
        self.block_tokens = block_tokens

    @classmethod
    def of(cls, shape: KVShape, block_tokens: int) -> Encoded | None:
        is_usual = shape[:2] == shape[2:4] and can_encode(shape.key_dim)
        return cls(shape, block_tokens) if is_usual and cls.holds_dtype(shape.dtype) else None

    @classmethod
    def holds_dtype(cls, dtype: torch.dtype) -> bool:
        """Whether K and V of that dtype can have the form."""
        return dtype.is_floating_point

    @abstractmethod
    def block_bytes(self, rows: int) -> int:
        """Of one block."""

    @abstractmethod
    def encode(self, kv: torch.Tensor, out: torch.Tensor) -> None:
        """Fill blocks.

        Args:
            kv: [blocks, tokens, rows, 2, heads, head_dim] in the dtype of the cache; keys are rotated if the form
                wants it, and in float32 then.
            out: uint8 [blocks, bytes].
        """

    @abstractmethod
    def decode(self, data: torch.Tensor, rows: int, out: torch.Tensor) -> None:
        """Keys, rotated if the form rotates them, and values of blocks.

        Args:
            data: uint8 [blocks, bytes].
            rows: that are stored.
            out: [tokens, rows, 2, heads, head_dim], of any floating dtype.
        """

    @abstractmethod
    def held(self, kv: torch.Tensor) -> torch.Tensor:
        """Which of the blocks [blocks, tokens, rows, 2, heads, head_dim], as `encode` takes them, it can hold; bool."""

    def num_bytes(self, tokens: int, rows: int) -> int:
        return tokens // self.block_tokens * self.block_bytes(rows)

    def pack(self, out: torch.Tensor, leaving: Leaving) -> None:
        self._encode(out.view((leaving.stop - leaving.start) // self.block_tokens, -1), self._pieces(leaving))

    def pack_kv(self, out: torch.Tensor, kv: torch.Tensor) -> None:
        blocks = self._by_blocks(kv)
        self._encode(out.view(len(blocks), -1), map(self._as_encoded, blocks.split(self._per_piece(kv.shape[1]))))

    def _encode(self, data: torch.Tensor, pieces: Iterable[torch.Tensor]) -> None:
        done = 0
        for kv in pieces:
            self.encode(kv, data[done : done + len(kv)])
            done += len(kv)

    def holds(self, leaving: Leaving) -> torch.Tensor:
        return torch.cat([self.held(kv) for kv in self._pieces(leaving)])

    def _pieces(self, leaving: Leaving) -> Iterator[torch.Tensor]:
        """Blocks as `encode` takes them, not too many at a time."""
        bt, shape = self.block_tokens, self.shape
        rows = leaving.tail.rows // leaving.row_step
        per_piece = self._per_piece(rows)
        num_blocks = (leaving.stop - leaving.start) // bt
        for first in range(0, num_blocks, per_piece):
            count = min(per_piece, num_blocks - first)
            kv = torch.empty(count * bt, rows, shape.width, dtype=shape.dtype, device=leaving.tail.kv.device)
            leaving.between(first * bt, (first + count) * bt).copy("kv", kv)
            yield self._as_encoded(self._by_blocks(kv))

    def _by_blocks(self, kv: torch.Tensor) -> torch.Tensor:
        """[tokens, rows, width] as [blocks, tokens, rows, 2, heads, head_dim]."""
        return kv.view(-1, self.block_tokens, kv.shape[1], 2, self.shape.key_heads, self.shape.key_dim)

    def _as_encoded(self, kv: torch.Tensor) -> torch.Tensor:
        """Blocks as `encode` takes them."""
        return _with_rotated_keys(kv.float()) if self.rotates_keys else kv

    def _per_piece(self, rows: int) -> int:
        """Blocks that are worked on at a time."""
        return max(1, PIECE_BYTES // (self.block_tokens * rows * self.shape.width * 4))  # 4: in float32

    def restore(self, stored: DeviceMemory, span: Span, out: torch.Tensor) -> None:
        data, per_piece = self._blocks(stored, span), self._per_piece(span.rows)
        dtype = torch.float32 if self.rotates_keys else self.shape.dtype
        for first in range(0, span.num_blocks, per_piece):
            blocks = data[first : first + per_piece]
            shape = (len(blocks) * self.block_tokens, span.rows, 2, self.shape.key_heads, self.shape.key_dim)
            kv = torch.empty(shape, dtype=dtype, device=data.device)
            self.decode(blocks, span.rows, kv)
            if self.rotates_keys:
                kv = _with_rotated_keys(kv)
            start = first * self.block_tokens
            out[start : start + len(kv)] = kv.flatten(2)

    def _blocks(self, stored: DeviceMemory, span: Span) -> torch.Tensor:
        return stored.view(torch.uint8, (span.num_blocks, self.block_bytes(span.rows)))

    def segment(self, stored: DeviceMemory, span: Span, scratch: DeviceMemory) -> StoredKV:
        return StoredKV(
            name=self.name,
            data=self._blocks(stored, span),
            block_tokens=self.block_tokens,
            rows=span.rows,
            heads=self.shape.key_heads,
            head_dim=self.shape.key_dim,
            decode=self.decode,
        )

    def question(self, query: torch.Tensor) -> torch.Tensor:
        return hadamard.rotated_queries(query) if self.rotates_keys else query

    def attend(self, query: torch.Tensor, segment: Any, out: torch.Tensor, lse: torch.Tensor, **options: Any) -> None:
        ops.stored_attention(query, segment, out, lse, **options)


def _with_rotated_keys(kv: torch.Tensor) -> torch.Tensor:
    """Keys of [..., 2, heads, head_dim] rotated, values as they are."""
    keys, values = kv.unbind(-3)
    return torch.stack((hadamard.rotated(keys), values), dim=-3)


def fields(data: torch.Tensor, *parts: tuple[tuple[int, ...], torch.dtype]) -> Iterator[torch.Tensor]:
    """Parts of blocks uint8 [blocks, bytes], one behind the other: shape within a block and dtype of each."""
    start = 0
    for shape, dtype in parts:
        stop = start + math.prod(shape) * dtype.itemsize
        yield data[:, start:stop].view(dtype).unflatten(1, shape)
        start = stop


def field_bytes(*parts: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Of one block."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)
