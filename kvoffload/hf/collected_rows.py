"""What an attention module hands over for one layer, and the rows of a forward that come in slices put together.

Owns that all rows are complete before anything of them is cached. Does not own which slices there are (`row_slices`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Embeddings = tuple[torch.Tensor, ...]


class Update(NamedTuple):
    """What an attention module handed over in one forward."""

    keys: torch.Tensor  # [rows, heads, tokens, head_dim]
    values: torch.Tensor
    activation: torch.Tensor | None  # [rows, tokens, hidden]


class Collected(NamedTuple):
    """Rows of a forward."""

    update: Update
    embeddings: Embeddings | None  # each [rows or 1, tokens, width]; None: of a kind that cannot be stored
    is_segmented: bool  # attention may take chunks of these rows one by one


class CollectedRows:
    """The slices of one layer in one forward.

    Args:
        num_rows: of all of them together.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._slices: list[Collected] = []

    def add(self, found: Collected) -> Collected | None:
        """The next rows; all of them with the last ones, else None."""
        self._slices.append(found)
        if sum(one.update.keys.shape[0] for one in self._slices) < self.num_rows:
            return None
        slices, self._slices = self._slices, []
        activations = [one.update.activation for one in slices if one.update.activation is not None]
        embeddings = [one.embeddings for one in slices if one.embeddings is not None]
        return Collected(
            Update(
                torch.cat([one.update.keys for one in slices]),
                torch.cat([one.update.values for one in slices]),
                torch.cat(activations) if len(activations) == len(slices) else None,
            ),
            _of_all_rows(embeddings) if len(embeddings) == len(slices) else None,
            all(one.is_segmented for one in slices),
        )


def _of_all_rows(slices: Sequence[Embeddings]) -> Embeddings:
    """Position embeddings of all rows, where each slice has those of its own or the very same as the others."""
    return tuple(
        parts[0] if len({part.data_ptr() for part in parts}) == 1 else torch.cat(parts)
        for parts in (list(same) for same in zip(*slices, strict=True))
    )
