"""Chunks: a layer's blocks on the host, in the copies in which they travel to the device.

Owns which blocks share a copy, where a chunk's K and V land in a layer buffer, and the order of a layer's chunks. Moves
nothing (`engine` does) and does not choose how many blocks a chunk has (`kvoffload/planning/sizing.py` does).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import torch

from kvoffload.config import Schedule
from kvoffload.pipeline.cargo import Cargo
from kvoffload.planning.chunk_order import transfer_order
from kvoffload.planning.placement import PLAIN
from kvoffload.store.block import Block, Span


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk(Cargo):
    """Blocks that travel in one copy: consecutive in the layer, contiguous on the host, of one form."""

    span: Span
    kv_offset: int  # bytes from the start of the layer buffer to the place of these blocks' K and V


def chunks_of(
    blocks: Sequence[Block],
    *,
    block_tokens: int,
    chunk_blocks: int,
    kv_row_bytes: int,
    schedule: Schedule,
    chosen: Container[int] | None = None,
) -> Sequence[Chunk]:
    """The blocks that are on the host as chunks in order of transfer.

    Args:
        blocks: all of a layer.
        block_tokens: of each.
        chunk_blocks: the most that a chunk may have.
        kv_row_bytes: of the K and V of one token, per stored row, in a layer buffer.
        schedule: decides the order of the forms.
        chosen: numbers of the blocks that are wanted; None: all.
    """
    runs: list[tuple[int, int, list[Block]]] = []  # first block, offset of its K and V, blocks
    offset = 0
    for idx, block in enumerate(blocks):
        if not block.is_resident and (chosen is None or idx in chosen):
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
        offset += block.rows * block_tokens * kv_row_bytes
    plain, others = list[Chunk](), list[Chunk]()  # what lands as it is, and what is computed on first
    for first, kv_offset, run in runs:
        chunk = Chunk(
            source=joined(run),
            after=run[-1].written,  # blocks are written in order, so the last is enough
            span=Span(run[0].form, first, len(run), block_tokens, run[0].rows, run[0].row_step),
            kv_offset=kv_offset,
            landing_offset=kv_offset if run[0].form == PLAIN else None,
        )
        (plain if run[0].form == PLAIN else others).append(chunk)
    if schedule == "kvpr":
        others = [replace(chunk, waits_for_others=True) for chunk in others]
    turns = {True: iter(others), False: iter(plain)}
    return [next(turns[is_other]) for is_other in transfer_order(len(others), len(plain), schedule)]


def resident_spans(blocks: Sequence[Block], block_tokens: int) -> Sequence[Span]:
    """The blocks on the device, as many together as are consecutive, of one form and equal rows, and contiguous.

    Args:
        blocks: all of a layer.
        block_tokens: of each.
    """
    found: list[Span] = []
    for idx, block in enumerate(blocks):
        if not block.is_resident:
            continue
        last = found[-1] if found else None
        if last is not None and last.first_block + last.num_blocks == idx and _follows(blocks[idx - 1], block):
            found[-1] = last._replace(num_blocks=last.num_blocks + 1)  # fewer rows leave gaps between blocks
        else:
            found.append(Span(block.form, idx, 1, block_tokens, block.rows, block.row_step))
    return found


def joined(blocks: Sequence[Block]) -> torch.Tensor:
    """The bytes of contiguous blocks as one tensor."""
    return blocks[0].bytes.as_strided((sum(block.num_bytes for block in blocks),), (1,))


def _follows(block: Block, next_block: Block) -> bool:
    """Whether the second block's bytes start where the first one's end, and mean the same."""
    return (
        (block.form, block.rows, block.row_step) == (next_block.form, next_block.rows, next_block.row_step)
        and block.bytes.untyped_storage().data_ptr() == next_block.bytes.untyped_storage().data_ptr()
        and block.bytes.data_ptr() + block.num_bytes == next_block.bytes.data_ptr()
    )
