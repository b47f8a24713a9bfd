"""8 bits: signed codes, one float16 scale for each token and head; keys are rotated, and may be less their mean.

A block, one part behind the other:

    codes   int8     [tokens, rows, 2, heads, head_dim]
    scales  float16  [tokens, rows, 2, heads]            negative: of a key less the mean
    means   float16  [rows, heads, head_dim]             of the keys over the block's tokens
"""

from __future__ import annotations

import torch

from kvoffload.store.forms.encoded import Encoded, field_bytes, fields
from kvoffload.store.forms.quantized import are_finite, means

MOST = 127


class Stored(Encoded):
    """Blocks of 8 bits a value.

    Source: symmetric quantisation per token, as LLM.int8 (arXiv 2208.07339), section 2; keys less their mean as in
    SageAttention (arXiv 2410.02367), section 4.2, where that makes them smaller: those of attention sinks it does not.
    """

    name = "int8"
    rotates_keys = True

    def block_bytes(self, rows: int) -> int:
        return field_bytes(*self._parts(rows))

    def _parts(self, rows: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        vectors, heads, head_dim = (self.block_tokens, rows, 2, self.shape.key_heads), *self.shape[:2]
        return (
            ((*vectors, head_dim), torch.int8),
            (vectors, torch.float16),
            ((rows, heads, head_dim), torch.float16),
        )

    def encode(self, kv: torch.Tensor, out: torch.Tensor) -> None:
        codes, scales, mean = fields(out, *self._parts(kv.shape[2]))
        kv, found, scale = self._chosen(kv)
        mean.copy_(found)
        scales.copy_(scale)
        step = scale.float().abs().unsqueeze(-1)
        codes.copy_((kv / torch.where(step > 0, step, 1.0)).round_().clamp_(-MOST, MOST))

    @staticmethod
    def _chosen(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """K less their mean where that is smaller, and V; the means; scales, negative where a mean is to be added."""
        keys, values = kv.float().unbind(3)
        mean = means(keys)
        centred = keys - mean.float().unsqueeze(1)
        scale, less = _scale(keys), _scale(centred)
        is_less = less < scale
        keys = torch.where(is_less.unsqueeze(-1), centred, keys)
        scales = torch.stack((torch.where(is_less, -less, scale), _scale(values)), dim=3)
        return torch.stack((keys, values), dim=3), mean, scales

    def decode(self, data: torch.Tensor, rows: int, out: torch.Tensor) -> None:
        codes, scales, mean = fields(data, *self._parts(rows))
        kv = out.unflatten(0, (-1, self.block_tokens))
        kv.copy_(codes)
        kv.mul_(scales.abs().to(out.dtype).unsqueeze(-1))
        is_less = scales[:, :, :, 0].signbit().to(out.dtype).unsqueeze(-1)
        kv[:, :, :, 0].addcmul_(is_less, mean.to(out.dtype).unsqueeze(1))

    def held(self, kv: torch.Tensor) -> torch.Tensor:
        _, mean, scales = self._chosen(kv)
        return are_finite(mean, scales)


def _scale(vectors: torch.Tensor) -> torch.Tensor:
    return (vectors.abs().amax(-1) / MOST).half()
