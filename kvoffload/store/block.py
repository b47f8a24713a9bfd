"""A block: consecutive cached tokens of one layer, stored once, in one form. Moves no bytes (`kvoffload/pipeline/`).

A block does not change once it is stored, so that copies of a cache share it; who holds the memory it lies in is
counted there (`extent`, `resident_room`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvoffload.backend import Event
from kvoffload.planning.placement import FormName, Tier


class Place(NamedTuple):
    """Where the bytes of a block lie."""

    tier: Tier
    bytes: torch.Tensor  # uint8, contiguous
    written: Event | None = None  # completes when they are valid; None where compute wrote them


@dataclass(slots=True, eq=False)
class Block:
    """`block_tokens` cached tokens of one layer, for all rows that are stored."""

    form: FormName
    rows: int
    num_bytes: int
    place: Place | None = None  # None until it is stored
    row_step: int = 1  # stored row i was logical row i * row_step when it was written

    @property
    def bytes(self) -> torch.Tensor:
        """The block, where it is stored."""
        assert self.place is not None
        return self.place.bytes

    @property
    def written(self) -> Event | None:
        """Completes when the bytes are valid; None where compute wrote them."""
        assert self.place is not None
        return self.place.written

    @property
    def is_resident(self) -> bool:
        """Whether it stays on the device."""
        assert self.place is not None
        return self.place.tier == "device"


class Span(NamedTuple):
    """Consecutive blocks of a layer, of one form and with equal rows, contiguous where they lie."""

    form: FormName
    first_block: int
    num_blocks: int
    block_tokens: int
    rows: int
    row_step: int

    @property
    def first_token(self) -> int:
        return self.first_block * self.block_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_tokens
