"""K (after RoPE) and V as attention reads them, token-major: [tokens, rows, k_width + v_width]."""

from __future__ import annotations

import torch

from kvoffload.store.block import Span
from kvoffload.store.device_memory import DeviceMemory
from kvoffload.store.forms.form import Form, Leaving, attention_layout
from kvoffload.store.tail import KVShape, RowShape


class Stored(Form):
    """Blocks of K and V.

    Args:
        shape: of the layer's K and V.
    """

    name = "kv"

    def __init__(self, shape: KVShape) -> None:
        self.shape, self.row = shape, RowShape(shape.width, shape.dtype)

    @classmethod
    def of(cls, shape: KVShape, block_tokens: int) -> Form:
        return cls(shape)

    def pack(self, out: torch.Tensor, leaving: Leaving) -> None:
        tokens = leaving.stop - leaving.start
        leaving.copy("kv", self.row.view(out, tokens, out.numel() // tokens // self.row.num_bytes))

    def pack_kv(self, out: torch.Tensor, kv: torch.Tensor) -> None:
        self.row.view(out, *kv.shape[:2]).copy_(kv)

    def restore(self, stored: DeviceMemory, span: Span, out: torch.Tensor) -> None:
        out.copy_(stored.view(self.row.dtype, (span.num_tokens, span.rows, self.row.width)))

    def segment(self, stored: DeviceMemory, span: Span, scratch: DeviceMemory) -> torch.Tensor:
        return stored.view(*attention_layout(self.shape, span))
