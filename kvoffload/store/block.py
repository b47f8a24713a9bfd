"""A block: consecutive cached tokens of one layer, stored once, in one form. Moves no bytes (`kvoffload/pipeline/`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvoffload.backend import Event
from kvoffload.planning.placement import Form


@dataclass(slots=True, eq=False)
class Block:
    """`block_tokens` cached tokens of one layer, for all rows that are stored.

    Exactly one of `host` and `resident` is set. `written` completes when the bytes on the host are valid.
    """

    form: Form
    rows: int
    num_bytes: int
    row_step: int = 1  # stored row i was logical row i * row_step when it was written
    host: torch.Tensor | None = None  # uint8
    resident: torch.Tensor | None = None  # on the device: [block_tokens, rows, width]
    written: Event | None = None
