"""Position embeddings that travel with the blocks stored as activations, so that no table of them grows on the device.

Owns where they lie in such a block, and the embeddings of the newest tokens, which are in no block yet. Only for rows
with equal embeddings: a token's are stored once, spread over its rows, each of which has a share of them behind its
activation. So consecutive blocks remain one copy, and the activations in them one matrix for one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from kvoffload.store.derived import Derived
from kvoffload.store.positions import PositionStore

ALIGNMENT_BYTES = 16  # of a row, its share and each embedding: what a matrix product reads at once


class PositionLayout:
    """Where a token's position embeddings lie in a block of activations: some of its rows hold them between them.

    A row of a token is [row_width] of the activation's dtype: the activation, then `share_bytes` of the embeddings.

    Args:
        activation: [rows, tokens, hidden].
        embeddings: each [rows or 1, tokens, width].
        rows: the fewest that a block may have and carry them.
    """

    def __init__(self, activation: torch.Tensor, embeddings: tuple[torch.Tensor, ...], rows: int) -> None:
        self.hidden = activation.shape[2]
        self._places: list[tuple[slice, torch.dtype]] = []  # of each embedding, in the bytes of a token
        end = 0
        for embedding in embeddings:
            num_bytes = embedding.shape[2] * embedding.element_size()
            self._places.append((slice(end, end + num_bytes), embedding.dtype))
            end += _aligned(num_bytes)
        self.share_bytes = _aligned(-(-end // rows))
        self.num_shares = -(-end // self.share_bytes)
        self._shares_at = _aligned(self.hidden * activation.element_size())
        self.row_bytes = self._shares_at + self.share_bytes
        self.row_width = self.row_bytes // activation.element_size()
        self._activations = Derived(lambda stored: stored[..., : self.hidden])
        self._embeddings = Derived(self._read)

    def activation(self, stored: torch.Tensor) -> torch.Tensor:
        """[tokens, rows, hidden] of stored [tokens, rows, row_width], a view."""
        return self._activations.of(stored)

    def read(self, stored: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Embeddings in stored [tokens, rows, row_width], each [1, tokens, width]; views where one row holds all."""
        return self._embeddings.of(stored) if self.num_shares == 1 else self._read(stored)

    def _read(self, stored: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = self._shares(stored).flatten(1)  # [tokens, num_shares * share_bytes]
        return tuple(tokens[:, place].view(dtype).unsqueeze(0) for place, dtype in self._places)

    def write(self, stored: torch.Tensor, embeddings: tuple[torch.Tensor, ...]) -> None:
        """Put the embeddings, each [1, tokens, width], into stored [tokens, rows, row_width]."""
        shares = self._shares(stored)
        tokens = torch.zeros(shares.shape, dtype=torch.uint8, device=stored.device).flatten(1)
        for embedding, (place, _) in zip(embeddings, self._places, strict=True):
            tokens[:, place] = embedding[0].contiguous().view(torch.uint8)
        shares.copy_(tokens.view(shares.shape))

    def _shares(self, stored: torch.Tensor) -> torch.Tensor:
        """Bytes [tokens, num_shares, share_bytes]."""
        return stored.view(torch.uint8)[:, : self.num_shares, self._shares_at :]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def rows_are_equal(embedding: torch.Tensor) -> bool:
    """Whether all rows of [rows, tokens, width] are the same; waits for the device where there are several."""
    return embedding.shape[0] == 1 or bool((embedding == embedding[:1]).all())


@dataclass(slots=True)
class _Newest:
    """One stream of tokens that are in no block yet, each part [rows or 1, tokens, width]."""

    first: int  # token of the first part
    parts: list[torch.Tensor] = field(default_factory=list)
    has_equal_rows: bool = True  # of every token so far

    def settle(self) -> None:
        """Make one part of one row of what there is; the only place where rows are compared."""
        counts = {part.shape[0] for part in self.parts}
        for rows in counts - {1}:
            alike = [part for part in self.parts if part.shape[0] == rows]
            together = alike[0] if len(alike) == 1 else torch.cat(alike, dim=1)  # one comparison, one wait
            self.has_equal_rows = self.has_equal_rows and rows_are_equal(together)
        if len(self.parts) > 1 or counts - {1}:
            self.parts = [torch.cat([part[:1] for part in self.parts], dim=1)]

    def truncate(self, stop: int) -> None:
        self.first = min(self.first, stop)
        self._keep(self.first, stop)

    def drop(self, start: int) -> bool:
        """Forget the tokens before `start`; whether there were any."""
        if start <= self.first:
            return False
        self._keep(start, self.first + sum(part.shape[1] for part in self.parts))
        self.first = start
        return True

    def _keep(self, start: int, stop: int) -> None:
        kept, position = [], self.first
        for part in self.parts:
            low, high = (min(max(0, token - position), part.shape[1]) for token in (start, stop))
            if high - low == part.shape[1]:
                kept.append(part)
            elif high > low:
                kept.append(part[:, low:high].clone())  # a view would keep all of it
            position += part.shape[1]
        self.parts = kept


class CarriedPositions(PositionStore):
    """The position embeddings of the newest tokens; those of others are in their blocks."""

    def __init__(self) -> None:
        super().__init__()
        self._streams: list[_Newest] = []

    def fork(self) -> Self:
        other = super().fork()
        other._streams = [replace(newest, parts=list(newest.parts)) for newest in self._streams]
        return other

    def _append(self, stream: int, embedding: torch.Tensor, cached_tokens: int) -> None:
        if stream == len(self._streams):
            self._streams.append(_Newest(cached_tokens))
        self._streams[stream].parts.append(embedding.detach())

    def have_equal_rows(self, streams: tuple[int, ...]) -> bool:
        """Whether all rows had the same embeddings in these streams so far, so that blocks can carry them."""
        for idx in streams:
            self._streams[idx].settle()
        return all(self._streams[idx].has_equal_rows for idx in streams)

    def read(self, streams: tuple[int, ...], start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """Embeddings of tokens `start..stop`, each [1, tokens, width], where rows are equal."""
        found = []
        for idx in streams:
            newest = self._streams[idx]
            newest.settle()
            part = newest.parts[0][:, start - newest.first : stop - newest.first]
            assert start >= newest.first and part.shape[1] == stop - start, "a block's positions are gone"
            found.append(part)
        return tuple(found)

    def sample(
        self, streams: tuple[int, ...], tokens: Sequence[int], rows: int, row_step: int
    ) -> tuple[torch.Tensor, ...]:
        first = tokens[0]
        found = self.read(streams, first, tokens[-1] + 1)
        return tuple(part[:, [token - first for token in tokens]] for part in found)

    def reopen(self, streams: tuple[int, ...], start: int, embeddings: tuple[torch.Tensor, ...]) -> None:
        """The tokens of a block from `start` on, each [1, tokens, width], are the newest now; no others are kept."""
        for idx, embedding in zip(streams, embeddings, strict=True):
            newest = self._streams[idx]
            newest.first, newest.parts = start, [embedding.clone()]

    def drop_stored(self, num_tokens: int) -> bool:
        """The first `num_tokens` tokens are in blocks in every layer; whether any were forgotten by that."""
        dropped = [newest.drop(num_tokens) for newest in self._streams]
        if any(dropped):
            self._forget_captured()  # all layers have had theirs
        return any(dropped)

    def truncate(self, num_tokens: int) -> None:
        for newest in self._streams:
            newest.truncate(num_tokens)

    def restore(self, start: int, stop: int, columns: torch.Tensor, rows: int) -> None:
        """Nothing: rows are equal."""

    def select(self, indices: torch.Tensor, first_token: int, rows: int) -> None:
        """Nothing: rows are equal, or never stored again."""

    @property
    def device_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for newest in self._streams for part in newest.parts)
