"""4 bits: keys, rotated, and values in groups along a head, each with a float16 scale and least value.

Keys are in groups of 16, which most of the error comes from, values of 32. A block, one part behind the other; element
i of a head is in byte i % (head_dim / 2), the first half in the low bits:

    codes             uint8    [tokens, rows, 2, heads, head_dim / 2]
    scales of keys    float16  [tokens, rows, heads, groups of keys]
    least of keys     float16  likewise
    scales of values  float16  [tokens, rows, heads, groups of values]
    least of values   float16  likewise
"""

from __future__ import annotations

import torch

from kvoffload.store.forms.encoded import Encoded, field_bytes, fields
from kvoffload.store.forms.quantized import bounds, dequantize, is_whole, join, num_groups, part, quantize

LEVELS = 15
GROUPS = (16, 32)  # of keys, and of values


class Stored(Encoded):
    """Blocks of 4 bits a value. Source: QuaRot (arXiv 2404.00456), section 4, for rotated keys in groups."""

    name = "int4"
    rotates_keys = True

    def block_bytes(self, rows: int) -> int:
        return field_bytes(*self._parts(rows))

    def _parts(self, rows: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        tokens, heads, head_dim = self.block_tokens, self.shape.key_heads, self.shape.key_dim
        codes = ((tokens, rows, 2, heads, head_dim // 2), torch.uint8)
        of_keys, of_values = (((tokens, rows, heads, num_groups(head_dim, group)), torch.float16) for group in GROUPS)
        return (codes, of_keys, of_keys, of_values, of_values)

    def encode(self, kv: torch.Tensor, out: torch.Tensor) -> None:
        codes, *halves = fields(out, *self._parts(kv.shape[2]))
        found = []
        for x, group in zip(kv.float().unbind(3), GROUPS, strict=True):
            scale, least = bounds(x, -1, LEVELS, group)
            halves.pop(0).copy_(scale)
            halves.pop(0).copy_(least)
            found.append(join(quantize(x, scale, least, -1, LEVELS, group), 2))
        codes.copy_(torch.stack(found, dim=3))

    def decode(self, data: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
        codes, *halves = fields(data, *self._parts(rows))
        parts = zip(part(codes, 2).unbind(3), halves[::2], halves[1::2], GROUPS, strict=True)
        found = [dequantize(x, scale, least, -1, dtype, group) for x, scale, least, group in parts]
        return torch.stack(found, dim=3).flatten(0, 1)

    def held(self, kv: torch.Tensor) -> torch.Tensor:
        keys, values = (
            is_whole(*bounds(x, -1, LEVELS, group)) for x, group in zip(kv.float().unbind(3), GROUPS, strict=True)
        )
        return keys & values
