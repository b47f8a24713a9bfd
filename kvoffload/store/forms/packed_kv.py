"""bfloat16 without loss: sign and mantissa as bytes, exponents as 4-bit distances from the largest of a row and head.

A block, one part behind the other. A column is a stored row's keys, or values, of one head. Distances 0 to 14 count
down from the column's largest exponent; 15 stands for what is further away, whose place and exponent are listed. There
is room for a few such in each column: a block with more is not packed.

    rest        uint8   [tokens, rows, 2, heads, head_dim]      sign, then mantissa
    distances   uint8   [tokens, rows, 2, heads, head_dim / 2]  the first half of a head in the low bits
    largest     uint8   [rows, 2, heads]
    count       uint16  [rows, 2, heads]
    places      uint16  [rows, 2, heads, capacity]              token * head_dim + element
    exponents   uint8   [rows, 2, heads, capacity]

Source: SplitZip (arXiv 2605.01708) for distances from the largest exponent in a fixed size; a list per column is ours.
"""

from __future__ import annotations

import torch

from kvoffload.kernels import scratch
from kvoffload.planning.forms import MOST_PLACES, listed_exponents
from kvoffload.store.forms.encoded import Encoded, field_bytes, fields
from kvoffload.store.forms.quantized import join, part
from kvoffload.store.tail import KVShape

FAR = 15  # the distance that stands for larger ones


class Stored(Encoded):
    """Blocks of 12 bits a value and what is listed."""

    name = "packed_kv"

    @classmethod
    def of(cls, shape: KVShape, block_tokens: int) -> Encoded | None:
        return super().of(shape, block_tokens) if block_tokens * shape.key_dim <= MOST_PLACES else None

    @classmethod
    def holds_dtype(cls, dtype: torch.dtype) -> bool:
        return dtype is torch.bfloat16

    def block_bytes(self, rows: int) -> int:
        return field_bytes(*self._parts(rows))

    def _parts(self, rows: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        vectors, head_dim = (self.block_tokens, rows, 2, self.shape.key_heads), self.shape.key_dim
        columns, listed = vectors[1:], listed_exponents(self.block_tokens, head_dim)
        return (
            ((*vectors, head_dim), torch.uint8),
            ((*vectors, head_dim // 2), torch.uint8),
            (columns, torch.uint8),
            (columns, torch.int16),
            ((*columns, listed), torch.int16),
            ((*columns, listed), torch.uint8),
        )

    def encode(self, kv: torch.Tensor, out: torch.Tensor) -> None:
        rest, distances, largest, count, places, exponents = fields(out, *self._parts(kv.shape[2]))
        bits = kv.contiguous().view(torch.int16)
        rest.copy_(((bits >> 8) & 0x80) | (bits & 0x7F))
        exponent = _exponents(bits)
        most = exponent.amax((1, -1))
        largest.copy_(most)
        distance = (most[:, None, ..., None] - exponent).clamp_(max=FAR)
        distances.copy_(join(distance.to(torch.uint8), 2))
        # those that are listed, one behind the other: places and exponents by column
        far = (distance == FAR).movedim(1, -2).flatten(-2)  # [blocks, rows, 2, heads, tokens * head_dim]
        slots = places.shape[-1]
        number = far.cumsum(-1, dtype=torch.int32)
        count.copy_(number[..., -1].clamp(max=slots))
        slot = torch.where(far & (number <= slots), number - 1, slots).long()  # one more takes all others
        place = torch.arange(far.shape[-1], device=far.device).expand_as(slot).to(torch.int32)
        room = slot.new_zeros(*slot.shape[:-1], slots + 1, dtype=torch.int32)
        places.copy_(room.scatter(-1, slot, place)[..., :slots].to(torch.int16))
        values = exponent.movedim(1, -2).flatten(-2).to(torch.int32)
        exponents.copy_(room.scatter(-1, slot, values)[..., :slots])

    def decode(self, data: torch.Tensor, rows: int, out: torch.Tensor) -> None:
        rest, distances, largest, count, places, exponents = fields(data, *self._parts(rows))
        exponent = scratch.take("exponents", tuple(rest.shape), torch.uint8, data.device)
        part(distances, 2, exponent)
        torch.sub(largest[:, None, ..., None], exponent, out=exponent)  # where it is listed, anything
        columns = exponent.movedim(1, -2).flatten(-2)
        slots = torch.arange(places.shape[-1], device=data.device)
        size = columns.shape[-1]
        place = torch.where(slots < count[..., None], places.to(torch.int64) & 0xFFFF, size)
        room = torch.cat([columns, columns[..., :1]], dim=-1)  # one more takes what is no place
        room.scatter_(-1, place, exponents)
        exponent = room[..., :size].unflatten(-1, (-1, self.shape.key_dim)).movedim(-2, 1)
        wide = rest.to(torch.int16)
        bits: torch.Tensor = ((wide & 0x80) << 8) | (exponent.to(torch.int16) << 7) | (wide & 0x7F)
        out.copy_(bits.view(torch.bfloat16).flatten(0, 1))

    def held(self, kv: torch.Tensor) -> torch.Tensor:
        exponent = _exponents(kv.contiguous().view(torch.int16))
        far = exponent.amax((1, -1))[:, None, ..., None] - exponent >= FAR
        fits: torch.Tensor = far.sum((1, -1)) <= listed_exponents(self.block_tokens, self.shape.key_dim)
        return fits.flatten(1).all(1)


def _exponents(bits: torch.Tensor) -> torch.Tensor:
    """Of bfloat16, given as int16."""
    return (bits >> 7) & 0xFF
