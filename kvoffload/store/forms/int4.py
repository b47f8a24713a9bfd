"""4 bits: keys, rotated, and values in groups of 32 along a head, each with a float16 scale and least value.

A block, one part behind the other; element i of a head is in byte i % (head_dim / 2), the first half in the low bits:

    codes   uint8    [tokens, rows, 2, heads, head_dim / 2]
    scales  float16  [tokens, rows, 2, heads, groups]
    least   float16  [tokens, rows, 2, heads, groups]
"""

from __future__ import annotations

import torch

from kvoffload.store.forms.encoded import Encoded, field_bytes, fields
from kvoffload.store.forms.quantized import bounds, dequantize, is_whole, join, num_groups, part, quantize

LEVELS = 15


class Stored(Encoded):
    """Blocks of 4 bits a value. Source: QuaRot (arXiv 2404.00456), section 4, for rotated keys in groups."""

    name = "int4"
    rotates_keys = True

    def block_bytes(self, rows: int) -> int:
        return field_bytes(*self._parts(rows))

    def _parts(self, rows: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        vectors, head_dim = (self.block_tokens, rows, 2, self.shape.key_heads), self.shape.key_dim
        groups = ((*vectors, num_groups(head_dim)), torch.float16)
        return (((*vectors, head_dim // 2), torch.uint8), groups, groups)

    def encode(self, kv: torch.Tensor, out: torch.Tensor) -> None:
        codes, scales, least = fields(out, *self._parts(kv.shape[2]))
        kv = kv.float()
        found = bounds(kv, -1, LEVELS)
        scales.copy_(found[0])
        least.copy_(found[1])
        codes.copy_(join(quantize(kv, *found, -1, LEVELS), 2))

    def decode(self, data: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
        codes, scales, least = fields(data, *self._parts(rows))
        return dequantize(part(codes, 2), scales, least, -1, dtype).flatten(0, 1)

    def held(self, kv: torch.Tensor) -> torch.Tensor:
        return is_whole(*bounds(kv.float(), -1, LEVELS))
