"""What travels over the link: bytes on the host, and where they go. Knows neither blocks nor models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvoffload.backend import Event


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cargo:
    """One copy to the device. It has a slot of the ring, unless its job has a layer buffer and it says where in that.

    Whoever needs it to be more than bytes derives from this.
    """

    source: torch.Tensor  # uint8 on the host
    after: Event  # completes when `source` is valid
    landing_offset: int | None = None  # bytes from the start of the layer buffer; None: always in a slot
    waits_for_others: bool = False  # used only when all such cargo of its layer is there, or as much as slots hold
