"""2 bits: keys in groups of 32 tokens of a channel, values in groups of 32 along a head.

A block, one part behind the other; element i of a head is in byte i % (head_dim / 4), the first quarter in the lowest
bits. Groups of tokens end with the block.

    codes               uint8    [tokens, rows, 2, heads, head_dim / 4]
    scales of keys      float16  [groups of tokens, rows, heads, head_dim]
    least of keys       float16  likewise
    scales of values    float16  [tokens, rows, heads, groups]
    least of values     float16  likewise
"""

from __future__ import annotations

import torch

from kvoffload.store.forms.encoded import Encoded, field_bytes, fields
from kvoffload.store.forms.quantized import are_finite, bounds, dequantize_, join, num_groups, part, quantize

LEVELS = 3
TOKENS = -4  # dimension of [blocks, tokens, rows, heads, head_dim]


class Stored(Encoded):
    """Blocks of 2 bits a value. Source: KIVI (arXiv 2402.02750), section 3: keys per channel, values per token."""

    name = "int2"

    def block_bytes(self, rows: int) -> int:
        return field_bytes(*self._parts(rows))

    def _parts(self, rows: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        tokens, heads, head_dim = self.block_tokens, self.shape.key_heads, self.shape.key_dim
        of_keys = ((num_groups(tokens), rows, heads, head_dim), torch.float16)
        of_values = ((tokens, rows, heads, num_groups(head_dim)), torch.float16)
        codes = ((tokens, rows, 2, heads, head_dim // 4), torch.uint8)
        return (codes, of_keys, of_keys, of_values, of_values)

    def encode(self, kv: torch.Tensor, out: torch.Tensor) -> None:
        codes, *halves = fields(out, *self._parts(kv.shape[2]))
        found = []
        for x, dim in zip(kv.float().unbind(3), (TOKENS, -1), strict=True):
            scale, least = bounds(x, dim, LEVELS)
            halves.pop(0).copy_(scale)
            halves.pop(0).copy_(least)
            found.append(join(quantize(x, scale, least, dim, LEVELS), 4))
        codes.copy_(torch.stack(found, dim=3))

    def decode(self, data: torch.Tensor, rows: int, out: torch.Tensor) -> None:
        codes, *halves = fields(data, *self._parts(rows))
        kv = out.unflatten(0, (-1, self.block_tokens))
        part(codes, 4, kv)
        for x, scale, least, dim in zip(kv.unbind(3), halves[::2], halves[1::2], (TOKENS, -1), strict=True):
            dequantize_(x, scale, least, dim)

    def held(self, kv: torch.Tensor) -> torch.Tensor:
        keys, values = kv.float().unbind(3)
        return are_finite(*bounds(keys, TOKENS, LEVELS), *bounds(values, -1, LEVELS))
