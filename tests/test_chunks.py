"""Blocks become chunks: consecutive, contiguous on the host, of one form and as many rows, and land in their place."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from kvoffload.config import Schedule
from kvoffload.pipeline.chunks import Chunk, chunks_of, resident_runs
from kvoffload.planning.placement import Form
from kvoffload.store.block import Block

BLOCK_BYTES = {"kv": 8, "activation": 4}  # of one row
KV_BYTES_PER_ROW = BLOCK_BYTES["kv"]


def on_host(*forms: Form, rows: int = 2) -> list[Block]:
    """Blocks as a layer stores them: each form appends to a slab of its own, which counts its bytes."""
    slabs = {form: torch.arange(100, dtype=torch.uint8) for form in get_args(Form)}
    blocks = []
    for form in forms:
        size = rows * BLOCK_BYTES[form]
        blocks.append(Block(form, rows, size, host=slabs[form][:size]))
        slabs[form] = slabs[form][size:]
    return blocks


def chunks(blocks: list[Block], chunk_blocks: int = 2, schedule: Schedule = "pipelined") -> list[Chunk]:
    return list(chunks_of(blocks, chunk_blocks=chunk_blocks, kv_bytes_per_row=KV_BYTES_PER_ROW, schedule=schedule))


def extents(found: list[Chunk]) -> list[tuple[int, int]]:
    """First block and number of blocks of each."""
    return [(chunk.first_block, len(chunk.blocks)) for chunk in found]


def test_a_chunk_is_one_copy_of_as_many_blocks_as_it_may_have() -> None:
    blocks = on_host("kv", "kv", "kv", "kv", "kv")
    found = chunks(blocks)
    assert extents(found) == [(0, 2), (2, 2), (4, 1)]
    for chunk in found:
        assert list(chunk.blocks) == blocks[chunk.first_block :][: len(chunk.blocks)]
        assert torch.equal(chunk.source, torch.cat([block.host for block in chunk.blocks if block.host is not None]))


def test_blocks_of_another_form_or_with_other_rows_begin_a_chunk() -> None:
    found = sorted(chunks(on_host("kv", "kv", "activation", "kv"), chunk_blocks=4), key=lambda c: c.first_block)
    assert extents(found) == [(0, 2), (2, 1), (3, 1)]
    assert [chunk.form for chunk in found] == ["kv", "activation", "kv"]
    blocks = on_host("kv", "kv", "kv")
    assert blocks[0].host is not None
    blocks[0] = Block("kv", 1, KV_BYTES_PER_ROW, host=blocks[0].host[KV_BYTES_PER_ROW:])
    assert extents(chunks(blocks, chunk_blocks=3)) == [(0, 1), (1, 2)]


def test_blocks_that_are_not_consecutive_or_not_contiguous_begin_a_chunk() -> None:
    first, second = on_host("kv", "kv")
    resident = Block("kv", 2, first.num_bytes, resident=torch.zeros(1))
    assert extents(chunks([first, resident, second])) == [(0, 1), (2, 1)]
    first, _, third = on_host("kv", "kv", "kv")
    (elsewhere,) = on_host("kv")
    assert extents(chunks([first, third])) == [(0, 1), (1, 1)]
    assert extents(chunks([first, elsewhere])) == [(0, 1), (1, 1)]


def test_neighbours_of_another_form_or_slab_begin_a_chunk() -> None:
    first, second = on_host("kv", "kv")
    second.form = "activation"  # the last of one extent beside the first of another, in one slab
    assert len(chunks([first, second])) == 2
    first, second = on_host("kv", "kv")
    memory = bytearray(first.num_bytes + second.num_bytes)  # two slabs, one behind the other
    first.host = torch.frombuffer(memory, dtype=torch.uint8, count=first.num_bytes)
    second.host = torch.frombuffer(memory, dtype=torch.uint8, offset=first.num_bytes)
    assert first.host.data_ptr() + first.num_bytes == second.host.data_ptr()
    assert len(chunks([first, second])) == 2


def test_chunks_land_where_their_tokens_are_in_the_layer_whatever_stays_on_the_device() -> None:
    first, second, third = on_host("kv", "activation", "kv")
    first.host, first.resident = None, torch.zeros(1)
    third.rows = 1
    found = {chunk.first_block: chunk.landing_offset for chunk in chunks([first, second, third])}
    assert found == {1: 2 * KV_BYTES_PER_ROW, 2: 4 * KV_BYTES_PER_ROW}


@pytest.mark.parametrize(("schedule", "order"), [("pipelined", [2, 0, 3, 1]), ("kvpr", [2, 3, 0, 1])])
def test_the_schedule_says_in_which_order_the_forms_travel(schedule: Schedule, order: list[int]) -> None:
    found = chunks(on_host("kv", "kv", "activation", "activation"), chunk_blocks=1, schedule=schedule)
    assert [chunk.first_block for chunk in found] == order


def test_a_layer_without_blocks_on_the_host_has_no_chunks() -> None:
    assert chunks([]) == []


def test_runs_of_resident_blocks_are_of_one_form_equal_rows_and_contiguous() -> None:
    memory = torch.zeros(10, 4, 4, 6, dtype=torch.float32)  # of blocks, each [tokens, rows, width]

    def block(idx: int, form: Form = "kv", rows: int = 4) -> Block:
        data = memory[idx, :, :rows]
        return Block(form, rows, 4 * rows * 6 * 4, resident=data)

    on_host = Block("kv", 4, 1, host=torch.zeros(1, dtype=torch.uint8))
    assert list(resident_runs([block(0), block(1), block(2), on_host])) == [3, 2, 1]
    assert list(resident_runs([block(0), block(2), block(3)])) == [1, 2, 1]
    assert list(resident_runs([block(0), block(1, "activation"), block(2, "activation")])) == [1, 2, 1]
    assert list(resident_runs([block(0), block(1, rows=2), block(2, rows=2)])) == [1, 1, 1]
    assert list(resident_runs([on_host])) == list(resident_runs([])) == []
    tight = torch.zeros(2 * 4 * 4 * 6, dtype=torch.float32)  # fewer rows right behind: no run either
    full, fewer = tight[:96].view(4, 4, 6), tight[96:144].view(4, 2, 6)
    blocks = [Block("kv", 4, 384, resident=full), Block("kv", 2, 192, resident=fewer)]
    assert list(resident_runs(blocks)) == [1, 1]
