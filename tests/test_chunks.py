"""Blocks become chunks: consecutive, contiguous on the host, of one form and as many rows, and land in their place."""

from __future__ import annotations

import pytest
import torch

from kvoffload.config import Schedule
from kvoffload.pipeline.chunks import Chunk, chunks_of, resident_spans
from kvoffload.store.block import Block, Place

BLOCK_BYTES = {"kv": 8, "activation": 4}  # of one row
BLOCK_TOKENS = 2
KV_BYTES_PER_ROW = BLOCK_BYTES["kv"]


def host(data: torch.Tensor) -> Place:
    return Place("host", data)


def on_device(data: torch.Tensor) -> Place:
    return Place("device", data.view(torch.uint8).reshape(-1) if data.is_contiguous() else data.view(torch.uint8))


def on_host(*forms: str, rows: int = 2) -> list[Block]:
    """Blocks as a layer stores them: each form appends to a slab of its own, which counts its bytes."""
    slabs = {form: torch.arange(100, dtype=torch.uint8) for form in BLOCK_BYTES}
    blocks = []
    for form in forms:
        size = rows * BLOCK_BYTES[form]
        blocks.append(Block(form, rows, size, host(slabs[form][:size])))
        slabs[form] = slabs[form][size:]
    return blocks


def chunks(blocks: list[Block], chunk_blocks: int = 2, schedule: Schedule = "pipelined") -> list[Chunk]:
    found = chunks_of(
        blocks,
        block_tokens=BLOCK_TOKENS,
        chunk_blocks=chunk_blocks,
        kv_row_bytes=KV_BYTES_PER_ROW // BLOCK_TOKENS,
        schedule=schedule,
    )
    return list(found)


def extents(found: list[Chunk]) -> list[tuple[int, int]]:
    """First block and number of blocks of each."""
    return [chunk.span[1:3] for chunk in found]


def test_a_chunk_is_one_copy_of_as_many_blocks_as_it_may_have() -> None:
    blocks = on_host("kv", "kv", "kv", "kv", "kv")
    found = chunks(blocks)
    assert extents(found) == [(0, 2), (2, 2), (4, 1)]
    for chunk in found:
        held = blocks[chunk.span.first_block :][: chunk.span.num_blocks]
        assert torch.equal(chunk.source, torch.cat([block.bytes for block in held]))


def test_blocks_of_another_form_or_with_other_rows_begin_a_chunk() -> None:
    found = sorted(chunks(on_host("kv", "kv", "activation", "kv"), chunk_blocks=4), key=lambda c: c.span.first_block)
    assert extents(found) == [(0, 2), (2, 1), (3, 1)]
    assert [chunk.span.form for chunk in found] == ["kv", "activation", "kv"]
    blocks = on_host("kv", "kv", "kv")
    blocks[0] = Block("kv", 1, KV_BYTES_PER_ROW, host(blocks[0].bytes[KV_BYTES_PER_ROW:]))
    assert extents(chunks(blocks, chunk_blocks=3)) == [(0, 1), (1, 2)]


def test_blocks_that_are_not_consecutive_or_not_contiguous_begin_a_chunk() -> None:
    first, second = on_host("kv", "kv")
    resident = Block("kv", 2, first.num_bytes, on_device(torch.zeros(1)))
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
    first.place = host(torch.frombuffer(memory, dtype=torch.uint8, count=first.num_bytes))
    second.place = host(torch.frombuffer(memory, dtype=torch.uint8, offset=first.num_bytes))
    assert first.bytes.data_ptr() + first.num_bytes == second.bytes.data_ptr()
    assert len(chunks([first, second])) == 2


def test_chunks_land_where_their_tokens_are_in_the_layer_whatever_stays_on_the_device() -> None:
    first, second, third = on_host("kv", "activation", "kv")
    first.place = on_device(torch.zeros(1))
    third.rows = 1
    found = {
        chunk.span.first_block: (chunk.kv_offset, chunk.landing_offset) for chunk in chunks([first, second, third])
    }
    at = 4 * KV_BYTES_PER_ROW
    assert found == {1: (2 * KV_BYTES_PER_ROW, None), 2: (at, at)}  # activations need a slot first


@pytest.mark.parametrize(("schedule", "order"), [("pipelined", [2, 0, 3, 1]), ("kvpr", [2, 3, 0, 1])])
def test_the_schedule_says_in_which_order_the_forms_travel(schedule: Schedule, order: list[int]) -> None:
    found = chunks(on_host("kv", "kv", "activation", "activation"), chunk_blocks=1, schedule=schedule)
    assert [chunk.span.first_block for chunk in found] == order
    assert [chunk.waits_for_others for chunk in found] == [schedule == "kvpr" and c.span.form != "kv" for c in found]


def test_a_layer_without_blocks_on_the_host_has_no_chunks() -> None:
    assert chunks([]) == []


def test_runs_of_resident_blocks_are_of_one_form_equal_rows_and_contiguous() -> None:
    memory = torch.zeros(10, 4, 4, 6, dtype=torch.float32)  # of blocks, each [tokens, rows, width]

    def block(idx: int, form: str = "kv", rows: int = 4) -> Block:
        data = memory[idx, :, :rows]
        return Block(form, rows, 4 * rows * 6 * 4, on_device(data))

    on_host = Block("kv", 4, 1, host(torch.zeros(1, dtype=torch.uint8)))

    def spans(blocks: list[Block]) -> list[tuple[int, int]]:
        return [span[1:3] for span in resident_spans(blocks, BLOCK_TOKENS)]

    assert spans([block(0), block(1), block(2), on_host]) == [(0, 3)]
    assert spans([block(0), on_host, block(1), block(2)]) == [(0, 1), (2, 2)]
    assert spans([block(0), block(2), block(3)]) == [(0, 1), (1, 2)]
    assert spans([block(0), block(1, "activation"), block(2, "activation")]) == [(0, 1), (1, 2)]
    assert spans([block(0), block(1, rows=2), block(2, rows=2)]) == [(0, 1), (1, 1), (2, 1)]
    assert spans([on_host]) == spans([]) == []
    tight = torch.zeros(2 * 4 * 4 * 6, dtype=torch.float32)  # fewer rows right behind: no run either
    full, fewer = tight[:96].view(4, 4, 6), tight[96:144].view(4, 2, 6)
    blocks = [Block("kv", 4, 384, on_device(full)), Block("kv", 2, 192, on_device(fewer))]
    assert spans(blocks) == [(0, 1), (1, 1)]
