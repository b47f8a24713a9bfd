"""What transformers' attention masks say, as the bits that attention over segments takes."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Padding(NamedTuple):
    """A mask that is causal, but for cached positions that some sequence must not see."""

    valid: torch.Tensor | None  # int32 [rows, words]; None: every position may be seen


class MaskReader:
    """Reads each mask once per forward, however many layers are given it."""

    def __init__(self) -> None:
        self._forward = -1
        self._read: list[tuple[torch.Tensor, Padding | None]] = []

    def read(
        self, mask: torch.Tensor | None, *, forward: int, rows: int, query_tokens: int, cached_tokens: int
    ) -> Padding | None:
        """The padding of a mask; None if it masks in another way (or adds a bias).

        Args:
            mask: None, bool (True: may be seen) or additive, [rows or 1, 1, query_tokens, cached + query_tokens].
            forward: number of the forward of the model, within which equal tensors are equal masks.
            rows: sequences.
            query_tokens: new tokens per sequence.
            cached_tokens: tokens before these.
        """
        if mask is None:
            return Padding(None) if query_tokens == 1 else None
        if forward != self._forward:
            self._forward, self._read = forward, []
        for seen, padding in self._read:  # kept alive, so that an address cannot mean two masks
            if seen.data_ptr() == mask.data_ptr() and seen.shape == mask.shape and seen.stride() == mask.stride():
                return padding
        padding = _padding(mask, rows, query_tokens, cached_tokens)
        self._read.append((mask, padding))
        return padding


def _padding(mask: torch.Tensor, rows: int, query_tokens: int, cached_tokens: int) -> Padding | None:
    total = cached_tokens + query_tokens
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != query_tokens or mask.shape[3] != total:
        return None
    if mask.shape[0] not in (1, rows):
        return None
    allowed = mask[:, 0]
    if mask.dtype != torch.bool:
        allowed = allowed == 0
        if not bool((allowed | (mask[:, 0] <= torch.finfo(mask.dtype).min / 2)).all()):
            return None  # a bias
    valid = allowed[:, -1]  # the newest token may see every position that any may
    if query_tokens > 1:
        position = torch.arange(total, device=mask.device)
        causal = position <= position[cached_tokens:, None]
        if not torch.equal(allowed, causal & valid[:, None]):
            return None
    return Padding(pack(valid.expand(rows, total)))


def pack(valid: torch.Tensor) -> torch.Tensor:
    """Bits of [rows, positions] as int32 [rows, words], position p in bit p % 32 of word p // 32."""
    rows, positions = valid.shape
    bits = torch.zeros(rows, -(-positions // 32) * 32, dtype=torch.int64, device=valid.device)
    bits[:, :positions] = valid
    weights = torch.ones((), dtype=torch.int64, device=valid.device) << torch.arange(32, device=valid.device)
    return (bits.view(rows, -1, 32) * weights).sum(-1).to(torch.int32)  # which wraps: bit 31 becomes the sign
