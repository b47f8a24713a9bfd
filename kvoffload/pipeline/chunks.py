"""Chunks: a layer's blocks on the host, in the copies in which they travel to the device.

Owns which blocks share a copy, where a chunk's K and V land in a layer buffer, and the order of a layer's chunks. Moves
nothing (`engine` does) and does not choose how many blocks a chunk has (`kvoffload/planning/sizing.py` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvoffload.config import Schedule
from kvoffload.planning.chunk_order import transfer_order
from kvoffload.planning.placement import Form
from kvoffload.store.block import Block


class Chunk(NamedTuple):
    """Blocks that travel in one copy: consecutive in the layer, contiguous on the host, of one form."""

    form: Form
    first_block: int
    blocks: tuple[Block, ...]
    source: torch.Tensor  # uint8 on the host
    landing_offset: int  # bytes from the start of the layer buffer to this chunk's K/V


def chunks_of(
    blocks: Sequence[Block], *, chunk_blocks: int, kv_bytes_per_row: int, schedule: Schedule
) -> Sequence[Chunk]:
    """The blocks that are on the host as chunks in order of transfer.

    Args:
        blocks: all of a layer.
        chunk_blocks: the most that a chunk may have.
        kv_bytes_per_row: of the K and V of one block, per stored row, in a layer buffer.
        schedule: decides the order of the two forms.
    """
    runs: list[tuple[int, int, list[Block]]] = []  # first block, landing offset, blocks
    offset = 0
    for idx, block in enumerate(blocks):
        if block.host is not None:
            last = runs[-1] if runs else None
            if (
                last is not None
                and last[0] + len(last[2]) == idx
                and len(last[2]) < chunk_blocks
                and _follows(last[2][-1], block)
            ):
                last[2].append(block)
            else:
                runs.append((idx, offset, [block]))
        offset += block.rows * kv_bytes_per_row
    chunks = [Chunk(run[0].form, first, tuple(run), _span(run), landing) for first, landing, run in runs]
    by_form = {
        True: iter([chunk for chunk in chunks if chunk.form == "activation"]),
        False: iter([chunk for chunk in chunks if chunk.form == "kv"]),
    }
    num_activation = sum(chunk.form == "activation" for chunk in chunks)
    order = transfer_order(num_activation, len(chunks) - num_activation, schedule)
    return [next(by_form[is_activation]) for is_activation in order]


def resident_runs(blocks: Sequence[Block]) -> Sequence[int]:
    """Of each block on the device, which are the first, how many from it on are of one form, equal rows and contiguous.

    Args:
        blocks: all of a layer.
    """
    count = next((i for i, block in enumerate(blocks) if block.resident is None), len(blocks))
    runs = [1] * count
    for idx in range(count - 2, -1, -1):
        block, following = blocks[idx], blocks[idx + 1]
        assert block.resident is not None and following.resident is not None
        is_alike = (block.form, block.rows) == (following.form, following.rows)  # fewer rows leave gaps between blocks
        if is_alike and block.resident.data_ptr() + block.num_bytes == following.resident.data_ptr():
            runs[idx] = runs[idx + 1] + 1
    return runs


def _follows(block: Block, next_block: Block) -> bool:
    """Whether the second block's bytes start where the first one's end."""
    assert block.host is not None and next_block.host is not None
    return (
        block.form == next_block.form
        and block.rows == next_block.rows
        and block.host.untyped_storage().data_ptr() == next_block.host.untyped_storage().data_ptr()
        and block.host.data_ptr() + block.num_bytes == next_block.host.data_ptr()
    )


def _span(blocks: Sequence[Block]) -> torch.Tensor:
    """The bytes of contiguous blocks as one tensor."""
    first = blocks[0].host
    assert first is not None
    return first.as_strided((sum(block.num_bytes for block in blocks),), (1,))
