"""8 bits: keys, rotated, and values as signed codes with one float16 scale for each token and head.

A block, one part behind the other:

    codes   int8     [tokens, rows, 2, heads, head_dim]
    scales  float16  [tokens, rows, 2, heads]
"""

from __future__ import annotations

import torch

from kvoffload.store.forms.encoded import Encoded, field_bytes, fields
from kvoffload.store.forms.quantized import is_whole

MOST = 127


class Stored(Encoded):
    """Blocks of 8 bits a value. Source: symmetric quantisation per token, as LLM.int8 (arXiv 2208.07339), section 2."""

    name = "int8"
    rotates_keys = True

    def block_bytes(self, rows: int) -> int:
        return field_bytes(*self._parts(rows))

    def _parts(self, rows: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        vectors = (self.block_tokens, rows, 2, self.shape.key_heads)
        return (((*vectors, self.shape.key_dim), torch.int8), (vectors, torch.float16))

    def encode(self, kv: torch.Tensor, out: torch.Tensor) -> None:
        codes, scales = fields(out, *self._parts(kv.shape[2]))
        scale = _scale(kv)
        scales.copy_(scale)
        step = scale.float().unsqueeze(-1)
        codes.copy_((kv.float() / torch.where(step > 0, step, 1.0)).round_().clamp_(-MOST, MOST))

    def decode(self, data: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
        codes, scales = fields(data, *self._parts(rows))
        return codes.to(dtype).mul_(scales.to(dtype).unsqueeze(-1)).flatten(0, 1)

    def held(self, kv: torch.Tensor) -> torch.Tensor:
        return is_whole(_scale(kv))


def _scale(kv: torch.Tensor) -> torch.Tensor:
    return (kv.float().abs().amax(-1) / MOST).half()
