"""Memory of a layer's blocks: as much as the plan says, of the forms that blocks can have, with a place for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvoffload.backend import EmulatedBackend
from kvoffload.config import EmulatedLink
from kvoffload.planning.placement import Form, Placement
from kvoffload.store.block_memory import BlockMemory
from kvoffload.store.pool import HostPool
from kvoffload.store.tail import RowShape

KV, ACTIVATION = RowShape(128, torch.float16), RowShape(128, torch.uint8)  # so that sizes are a pool's
SHAPES: dict[Form, RowShape] = {"kv": KV, "activation": ACTIVATION}
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
    return {form: extent.capacity_bytes for form, extent in memory.extents.items()}


def test_resident_places_do_not_overlap_and_fill_what_was_made(backend: EmulatedBackend, memory: BlockMemory) -> None:
    plan = placement(resident_kv_blocks=3, resident_activation_blocks=2)
    memory.make_resident(backend, plan, SHAPES, ROWS)
    assert memory.device_bytes == 2 * ROWS * (3 * KV.num_bytes + 2 * ACTIVATION.num_bytes)
    for form, count in (("kv", 3), ("activation", 2)):
        places = [memory.resident_place(form, idx, 2, ROWS) for idx in range(count)]
        assert {place.shape for place in places} == {(2, ROWS, SHAPES[form].width)}
        for idx, place in enumerate(places):
            place.fill_(idx)
        assert [place.unique().tolist() for place in places] == [[idx] for idx in range(count)]


def test_a_block_of_fewer_rows_lies_at_the_start_of_its_place(backend: EmulatedBackend, memory: BlockMemory) -> None:
    memory.make_resident(backend, placement(resident_kv_blocks=2), SHAPES, ROWS)
    whole, part = memory.resident_place("kv", 1, 2, ROWS), memory.resident_place("kv", 1, 2, ROWS // 2)
    assert part.is_contiguous()
    assert part.shape == (2, ROWS // 2, KV.width)
    assert part.data_ptr() == whole.data_ptr()


def test_rows_that_were_repeated_have_no_room(backend: EmulatedBackend, memory: BlockMemory) -> None:
    assert memory.has_resident_room(ROWS)  # nothing is to be resident
    memory.make_resident(backend, placement(resident_kv_blocks=1), SHAPES, ROWS)
    assert memory.has_resident_room(ROWS)
    assert not memory.has_resident_room(2 * ROWS)


def test_forms_that_blocks_cannot_have_get_nothing(backend: EmulatedBackend, memory: BlockMemory) -> None:
    plan = placement(resident_kv_blocks=1, resident_activation_blocks=1, activation_share=1.0, max_tokens=12)
    memory.make_resident(backend, plan, {"kv": KV}, ROWS)
    memory.reserve(plan, {"kv": KV}, ROWS, 1)
    assert memory.device_bytes == 2 * ROWS * KV.num_bytes
    assert reserved(memory) == {"kv": 4 * 2 * ROWS * KV.num_bytes, "activation": 0}


def test_full_blocks_that_are_not_resident_are_reserved_by_their_forms(memory: BlockMemory) -> None:
    plan = placement(max_tokens=21, resident_kv_blocks=1, resident_activation_blocks=1, activation_share=0.25)
    memory.reserve(plan, SHAPES, ROWS, 1)  # eight blocks, and one to spare of each form
    assert reserved(memory) == {"kv": 7 * 2 * ROWS * KV.num_bytes, "activation": 3 * 2 * ROWS * ACTIVATION.num_bytes}
    assert not any(extent.doubles for extent in memory.extents.values())


def test_nothing_is_reserved_where_all_blocks_are_resident(memory: BlockMemory) -> None:
    memory.reserve(placement(max_tokens=7, prompt_tokens=5, resident_kv_blocks=4), SHAPES, ROWS, prompt_copies=2)
    assert reserved(memory) == {"kv": 0, "activation": 0}


@pytest.mark.parametrize("copies", [2, 3])
def test_a_prompt_that_rows_share_is_reserved_once(copies: int, memory: BlockMemory) -> None:
    memory.reserve(placement(max_tokens=20, prompt_tokens=13), SHAPES, 6, copies)  # 6 blocks of the prompt, 4 others
    assert reserved(memory)["kv"] == (6 * 6 // copies + 4 * 6) * 2 * KV.num_bytes


def test_extents_double_where_the_length_is_not_known(memory: BlockMemory) -> None:
    memory.reserve(placement(), SHAPES, ROWS, 1)
    assert reserved(memory) == {"kv": 0, "activation": 0}
    assert all(extent.doubles for extent in memory.extents.values())


def test_closing_gives_all_of_it_back(backend: EmulatedBackend) -> None:
    pool = HostPool(backend, 2**27)
    memory = BlockMemory(pool)
    plan = placement(max_tokens=20, resident_kv_blocks=1)
    memory.make_resident(backend, plan, SHAPES, ROWS)
    memory.reserve(plan, SHAPES, ROWS, 1)
    assert pool.used_bytes
    memory.close(None)
    assert pool.used_bytes == memory.device_bytes == 0
