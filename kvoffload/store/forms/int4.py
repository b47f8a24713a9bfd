"""4 bits: groups of 32 along a head with float16 scales and least values; keys are rotated, and may be less their mean.

A block, one part behind the other; element i of a head is in byte i % (head_dim / 2), the first half in the low bits:

    codes   uint8    [tokens, rows, 2, heads, head_dim / 2]
    scales  float16  [tokens, rows, 2, heads, groups]       sign bit: of keys less the mean
    least   float16  [tokens, rows, 2, heads, groups]
    means   float16  [rows, heads, head_dim]                of the keys over the block's tokens
"""

from __future__ import annotations

import torch

from kvoffload.planning.forms import GROUP
from kvoffload.store.forms.encoded import Encoded, field_bytes, fields
from kvoffload.store.forms.quantized import (
    are_finite,
    bounds,
    dequantize_,
    join,
    means,
    num_groups,
    part,
    quantize,
    spread,
)

LEVELS = 15


class Stored(Encoded):
    """Blocks of 4 bits a value.

    Source: QuaRot (arXiv 2404.00456), section 4, for rotated keys in groups; less their mean as `int8`, where that
    makes a group's range smaller.
    """

    name = "int4"
    rotates_keys = True

    def block_bytes(self, rows: int) -> int:
        return field_bytes(*self._parts(rows))

    def _parts(self, rows: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        vectors, heads, head_dim = (self.block_tokens, rows, 2, self.shape.key_heads), *self.shape[:2]
        groups = ((*vectors, num_groups(head_dim)), torch.float16)
        return (
            ((*vectors, head_dim // 2), torch.uint8),
            groups,
            groups,
            ((rows, heads, head_dim), torch.float16),
        )

    def encode(self, kv: torch.Tensor, out: torch.Tensor) -> None:
        codes, scales, least, mean = fields(out, *self._parts(kv.shape[2]))
        kv, found, scale, low = self._chosen(kv)
        mean.copy_(found)
        scales.copy_(scale)
        least.copy_(low)
        codes.copy_(join(quantize(kv, scale.abs(), low, -1, LEVELS), 2))

    @staticmethod
    def _chosen(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """K less their mean where its groups are smaller so, and V; the means; scales (sign: less the mean); least."""
        keys, values = kv.float().unbind(3)
        mean = means(keys)
        centred = keys - mean.float().unsqueeze(1)
        (scale, low), (less, low_less) = bounds(keys, -1, LEVELS), bounds(centred, -1, LEVELS)
        is_less = less < scale
        keys = torch.where(spread(is_less, -1, keys.shape[-1]), centred, keys)
        of_values = bounds(values, -1, LEVELS)
        scales = torch.stack((torch.where(is_less, -less, scale), of_values[0]), dim=3)
        lows = torch.stack((torch.where(is_less, low_less, low), of_values[1]), dim=3)
        return torch.stack((keys, values), dim=3), mean, scales, lows

    def decode(self, data: torch.Tensor, rows: int, out: torch.Tensor) -> None:
        codes, scales, least, mean = fields(data, *self._parts(rows))
        kv = out.unflatten(0, (-1, self.block_tokens))
        part(codes, 2, kv)
        dequantize_(kv, scales.abs(), least, -1)
        is_less, keys = scales[:, :, :, 0].signbit().to(out.dtype), kv[:, :, :, 0]
        mean = mean.to(out.dtype).unsqueeze(1)
        if self.shape.key_dim % GROUP == 0:
            by_groups = (-1, (-1, GROUP))
            keys.unflatten(*by_groups).addcmul_(is_less.unsqueeze(-1), mean.unflatten(*by_groups))
        else:
            keys.addcmul_(spread(is_less, -1, self.shape.key_dim), mean)

    def held(self, kv: torch.Tensor) -> torch.Tensor:
        return are_finite(*self._chosen(kv)[1:])
