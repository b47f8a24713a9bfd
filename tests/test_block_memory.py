"""Memory of a layer's blocks: as much as the plan says, of the forms that blocks can have, with a place for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvoffload.backend import EmulatedBackend
from kvoffload.config import EmulatedLink
from kvoffload.planning.placement import Placement
from kvoffload.store.block import Block, Place
from kvoffload.store.block_memory import BlockMemory
from kvoffload.store.pool import HostPool
from kvoffload.store.tail import RowShape

KV, ACTIVATION = RowShape(128, torch.float16), RowShape(128, torch.uint8)  # so that sizes are a pool's


class Sized:
    """Of a form only how large its blocks are."""

    def __init__(self, row: RowShape) -> None:
        self._row = row

    def num_bytes(self, tokens: int, rows: int) -> int:
        return tokens * rows * self._row.num_bytes


SHAPES: dict[str, Any] = {"kv": Sized(KV), "activation": Sized(ACTIVATION)}
ROWS = 4


@pytest.fixture
def backend() -> Iterator[EmulatedBackend]:
    backend = EmulatedBackend(EmulatedLink())
    yield backend
    backend.close()


@pytest.fixture
def memory(backend: EmulatedBackend) -> BlockMemory:
    return BlockMemory(HostPool(backend, 2**27))


def placement(**kwargs: Any) -> Placement:
    return Placement(**{"block_tokens": 2, "chunk_blocks": 1, **kwargs})


def reserved(memory: BlockMemory) -> dict[str, int]:
    return memory.reserved_bytes


def test_resident_places_do_not_overlap_and_fill_what_was_made(backend: EmulatedBackend, memory: BlockMemory) -> None:
    plan = placement(resident={"kv": 3, "activation": 2})
    memory.make_resident(backend, plan, SHAPES, ROWS)
    assert memory.device_bytes == 2 * ROWS * (3 * KV.num_bytes + 2 * ACTIVATION.num_bytes)
    for form, row, count in (("kv", KV, 3), ("activation", ACTIVATION, 2)):
        places = [memory.keep(form, 2 * ROWS * row.num_bytes, ROWS) for _ in range(count)]
        for idx, place in enumerate(places):
            assert place.numel() == 2 * ROWS * row.num_bytes
            place.fill_(idx)
        assert [place.unique().tolist() for place in places] == [[idx] for idx in range(count)]


def test_a_block_of_fewer_rows_lies_at_the_start_of_its_place(backend: EmulatedBackend, memory: BlockMemory) -> None:
    memory.make_resident(backend, placement(resident={"kv": 2}), SHAPES, ROWS)
    whole_bytes = 2 * ROWS * KV.num_bytes
    first, part = memory.keep("kv", whole_bytes, ROWS), memory.keep("kv", whole_bytes // 2, ROWS)
    assert part.data_ptr() == first.data_ptr() + whole_bytes
    assert part.numel() == whole_bytes // 2


def test_rows_that_were_repeated_have_no_room(backend: EmulatedBackend, memory: BlockMemory) -> None:
    assert memory.resident_room(ROWS) == {}  # nothing is to be resident
    memory.make_resident(backend, placement(resident={"kv": 2}), SHAPES, ROWS)
    assert memory.resident_room(ROWS) == {"kv": 2}
    assert memory.resident_room(2 * ROWS) == {"kv": 0}


def test_room_that_is_added_comes_behind_what_there_is(backend: EmulatedBackend, memory: BlockMemory) -> None:
    block_bytes = 2 * ROWS * KV.num_bytes
    memory.make_resident(backend, placement(resident={"kv": 1}), SHAPES, ROWS)
    first = memory.keep("kv", block_bytes, ROWS).fill_(1)
    memory.make_resident(backend, placement(resident={"kv": 3}), SHAPES, ROWS)
    assert memory.resident_places(ROWS) == {"kv": 3}
    second, third = (memory.keep("kv", block_bytes, ROWS).fill_(idx) for idx in (2, 3))
    assert [place.unique().tolist() for place in (first, second, third)] == [[1], [2], [3]]
    assert memory.resident_room(ROWS) == {"kv": 0}
    block = Block("kv", ROWS, block_bytes, Place("device", third))
    memory.drop([block, block], None)
    assert memory.resident_room(ROWS) == {"kv": 2}
    assert memory.keep("kv", block_bytes, ROWS).data_ptr() == second.data_ptr()


def test_forms_that_blocks_cannot_have_get_nothing(backend: EmulatedBackend, memory: BlockMemory) -> None:
    plan = placement(resident={"kv": 1, "activation": 1}, shares={"activation": 1.0}, max_tokens=12)
    memory.make_resident(backend, plan, {"kv": SHAPES["kv"]}, ROWS)
    memory.reserve(plan, {"kv": SHAPES["kv"]}, ROWS, 1)
    assert memory.device_bytes == 2 * ROWS * KV.num_bytes
    assert reserved(memory) == {"kv": 4 * 2 * ROWS * KV.num_bytes}


def test_full_blocks_that_are_not_resident_are_reserved_by_their_forms(memory: BlockMemory) -> None:
    plan = placement(max_tokens=21, resident={"kv": 1, "activation": 1}, shares={"activation": 0.25})
    memory.reserve(plan, SHAPES, ROWS, 1)  # eight blocks, and one to spare of each form
    assert reserved(memory) == {"kv": 7 * 2 * ROWS * KV.num_bytes, "activation": 3 * 2 * ROWS * ACTIVATION.num_bytes}
    assert not memory.extent("kv").doubles


def test_nothing_is_reserved_where_all_blocks_are_resident(memory: BlockMemory) -> None:
    memory.reserve(placement(max_tokens=7, prompt_tokens=5, resident={"kv": 4}), SHAPES, ROWS, prompt_copies=2)
    assert reserved(memory) == {}


@pytest.mark.parametrize("copies", [2, 3])
def test_a_prompt_that_rows_share_is_reserved_once(copies: int, memory: BlockMemory) -> None:
    memory.reserve(placement(max_tokens=20, prompt_tokens=13), SHAPES, 6, copies)  # 6 blocks of the prompt, 4 others
    assert reserved(memory)["kv"] == (6 * 6 // copies + 4 * 6) * 2 * KV.num_bytes


def test_extents_double_where_the_length_is_not_known(memory: BlockMemory) -> None:
    memory.reserve(placement(), SHAPES, ROWS, 1)
    assert reserved(memory) == {}
    assert memory.extent("kv").doubles


def test_closing_gives_all_of_it_back(backend: EmulatedBackend) -> None:
    pool = HostPool(backend, 2**27)
    memory = BlockMemory(pool)
    plan = placement(max_tokens=20, resident={"kv": 1})
    memory.make_resident(backend, plan, SHAPES, ROWS)
    memory.reserve(plan, SHAPES, ROWS, 1)
    assert pool.used_bytes
    memory.close(None)
    assert pool.used_bytes == memory.device_bytes == 0
