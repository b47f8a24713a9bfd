"""The memory of one layer's blocks: its resident blocks on the device, and an extent per form on the host.

Owns how much is made for a plan, and which resident place a block gets. Does not know which blocks there are, nor fills
or moves any (`kvoffload/cache/layer.py` and `kvoffload/pipeline/write_back.py` do).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvoffload.backend import Backend, Event
from kvoffload.planning.placement import Form, Placement, reserved_blocks
from kvoffload.store.extent import Extent
from kvoffload.store.pool import HostPool
from kvoffload.store.tail import RowShape


class BlockMemory:
    """Where the blocks of one layer lie.

    Args:
        pool: host memory.
    """

    def __init__(self, pool: HostPool) -> None:
        self.extents: dict[Form, Extent] = {"kv": Extent(pool), "activation": Extent(pool)}
        self._resident: dict[Form, torch.Tensor] = {}  # [tokens, rows, width]

    @property
    def device_bytes(self) -> int:
        """Device memory of the resident blocks."""
        return sum(data.numel() * data.element_size() for data in self._resident.values())

    def make_resident(
        self, backend: Backend, placement: Placement, row_shapes: Mapping[Form, RowShape], rows: int
    ) -> None:
        """Make room on the device for the resident blocks.

        Args:
            backend: gives the memory.
            placement: how many there are of each form.
            row_shapes: of one token in a block, for the forms that blocks can have.
            rows: logical rows.
        """
        bt = placement.block_tokens
        resident: dict[Form, int] = {
            "kv": placement.resident_kv_blocks,
            "activation": placement.resident_activation_blocks,
        }
        for form, count in resident.items():
            if count and form in row_shapes:
                row = row_shapes[form]
                data = backend.allocate_device(count * bt * rows * row.num_bytes)
                self._resident[form] = row.view(data, count * bt, rows)

    def reserve(self, placement: Placement, row_shapes: Mapping[Form, RowShape], rows: int, prompt_copies: int) -> None:
        """Make room on the host for the other blocks, as far as the length is known; beyond it extents double.

        Args:
            placement: how many tokens there will be, and the share of the forms.
            row_shapes: of one token in a block, for the forms that blocks can have.
            rows: logical rows.
            prompt_copies: consecutive rows that hold the same prompt, stored once.

        Raises:
            HostMemoryError: the pool may not grow that much.
        """
        for extent in self.extents.values():
            extent.doubles = placement.max_tokens is None or placement.lives_on
        if placement.max_tokens is None:
            return
        bt = placement.block_tokens
        in_place = placement.resident_kv_blocks + placement.resident_activation_blocks
        num_blocks = max(0, placement.max_tokens // bt - in_place)
        x, t = reserved_blocks(num_blocks, placement.activation_share if "activation" in row_shapes else 0.0)
        saved = min(placement.prompt_tokens // bt, num_blocks) * (rows - rows // prompt_copies) * bt
        full = num_blocks * rows * bt
        reserved: dict[Form, int] = {"activation": x, "kv": t}
        for form, count in reserved.items():
            if count:
                whole = count * bt * rows * row_shapes[form].num_bytes
                self.extents[form].reserve(whole * (full - saved) // full)

    def has_resident_room(self, rows: int) -> bool:
        """Whether resident places are wide enough: rows may have been repeated since they were made."""
        return all(data.shape[1] >= rows for data in self._resident.values())

    def resident_place(self, form: Form, idx: int, block_tokens: int, rows: int) -> torch.Tensor:
        """Where the resident block `idx` of a form goes, [block_tokens, rows, width]."""
        data = self._resident[form][idx * block_tokens :]
        width = data.shape[2]
        return data.reshape(-1)[: block_tokens * rows * width].view(block_tokens, rows, width)

    def close(self, guard: Event | None) -> None:
        """Give all of it back; the host's may be read until `guard`."""
        for extent in self.extents.values():
            extent.close(guard)
        self._resident.clear()
