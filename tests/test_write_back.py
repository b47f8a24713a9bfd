"""New blocks reach the host whole, through D2H slots or stages that take turns, in no more memory than is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvoffload.backend import EmulatedBackend
from kvoffload.config import EmulatedLink
from kvoffload.pipeline.write_back import ALIGNMENT, D2HSlot, WriteBack
from kvoffload.store.block import Block
from kvoffload.store.extent import Extent
from kvoffload.store.pool import HostPool

SLOT = 64  # bytes; a block has half of that


class Counting(EmulatedBackend):
    """Knows how much device memory is held."""

    held_bytes = 0

    def allocate_device(self, num_bytes: int) -> torch.Tensor:
        self.held_bytes += num_bytes
        return super().allocate_device(num_bytes)

    def free_device(self, data: torch.Tensor) -> None:
        self.held_bytes -= data.numel()
        super().free_device(data)


@pytest.fixture
def backend() -> Iterator[Counting]:
    backend = Counting(EmulatedLink())
    yield backend
    backend.close()


@pytest.fixture
def write_back(backend: Counting) -> WriteBack:
    write_back = WriteBack(backend)
    write_back.configure(SLOT)
    return write_back


@pytest.fixture
def extent(backend: Counting) -> Extent:
    return Extent(HostPool(backend, 2**27))


def store(write_back: WriteBack, extent: Extent, num_blocks: int = 2) -> int:
    """Stores blocks; the address they were packed at."""
    blocks = [Block("kv", 1, SLOT // 2) for _ in range(num_blocks)]
    packed = []

    def pack(data: torch.Tensor) -> None:
        packed.append(data.data_ptr())
        data.copy_(torch.arange(data.numel()))

    write_back.store(extent, blocks, pack)
    write_back._backend.synchronize()
    found = [block.bytes for block in blocks if block.written is not None]
    assert torch.equal(torch.cat(found), torch.arange(num_blocks * SLOT // 2, dtype=torch.uint8))
    return packed[0]


def test_slots_take_turns_where_a_layer_stores_no_more_than_one_holds(
    backend: Counting, write_back: WriteBack, extent: Extent
) -> None:
    places = []
    for _ in range(4):
        write_back.start_layer(SLOT, (), None)
        assert write_back.room_bytes == SLOT
        places.append(store(write_back, extent))
    assert len(set(places)) == 2
    assert places[2:] == places[:2]
    assert write_back.queued_bytes == 4 * SLOT
    store(write_back, extent, 1)
    assert (backend.held_bytes, write_back.stage_bytes) == (2 * SLOT, 0)


def test_slots_are_made_anew_for_another_size_only(backend: Counting, write_back: WriteBack, extent: Extent) -> None:
    assert WriteBack(backend).slot_bytes == 0
    before = store(write_back, extent)
    write_back.configure(SLOT)
    assert store(write_back, extent) == before
    write_back.configure(3 * SLOT)
    assert write_back.slot_bytes == 3 * SLOT
    assert backend.held_bytes == 2 * 3 * SLOT


def test_more_than_a_slot_holds_is_staged_and_layers_take_turns(
    backend: Counting, write_back: WriteBack, extent: Extent
) -> None:
    places = []
    for _ in range(3):
        write_back.start_layer(4 * SLOT, (), None)
        assert write_back.room_bytes == 4 * SLOT
        first = store(write_back, extent)
        assert write_back.room_bytes == 3 * SLOT
        assert store(write_back, extent, 5) == first + SLOT
        assert write_back.room_bytes == SLOT  # of a slot: the stage has half of that
        assert not 0 <= store(write_back, extent) - first < 4 * SLOT
        assert store(write_back, extent, 1) == first + 7 * SLOT // 2
        places.append(first)
    assert places[0] == places[2] != places[1]
    assert (write_back.stage_bytes, backend.held_bytes) == (8 * SLOT, 10 * SLOT)
    write_back.start_layer(4 * SLOT, (), None)
    write_back.release_stages()
    assert (write_back.stage_bytes, backend.held_bytes) == (0, 2 * SLOT)
    assert write_back.room_bytes == SLOT


def test_stages_are_made_within_their_limit_and_grow(backend: Counting, write_back: WriteBack) -> None:
    for num, limit, each, room in (
        (2, 3, 0, 1),
        (2, 4, 2, 2),
        (1, None, 2, 1),
        (3, 6, 3, 3),
        (2, 5, 3, 3),
        (4, 7, 3, 1),
    ):
        write_back.start_layer(num * SLOT, (), None if limit is None else limit * SLOT)
        assert write_back.stage_bytes == 2 * each * SLOT
        assert backend.held_bytes == 2 * (1 + each) * SLOT
        assert write_back.room_bytes == room * SLOT


def test_layer_buffers_that_are_lent_are_used_where_they_are_large_enough(
    backend: Counting, write_back: WriteBack, extent: Extent
) -> None:
    lent = [D2HSlot(torch.zeros(4 * SLOT, dtype=torch.uint8)) for _ in range(2)]
    for idx in (0, 1, 0):
        write_back.start_layer(4 * SLOT, lent, 0)
        assert store(write_back, extent) == lent[idx].bytes.data_ptr()
        assert lent[idx].written is not None
    assert backend.held_bytes == 2 * SLOT
    write_back.start_layer(5 * SLOT, lent, None)
    assert write_back.stage_bytes == 10 * SLOT
    assert write_back.room_bytes == 5 * SLOT


def test_blocks_of_another_form_behind_odd_ones_begin_where_any_number_may(
    write_back: WriteBack, extent: Extent
) -> None:
    """Of 404 bytes, as 5 tokens of one head in 8 bits take; K and V in float64 behind them could not be written."""
    write_back.start_layer(3 * 404 + 2 * ALIGNMENT, [], None)
    starts = []
    for _ in range(3):
        write_back.store(extent, [Block("int8", 1, 404)], lambda data: starts.append(data.storage_offset()))
    assert [start % ALIGNMENT for start in starts] == [0, 0, 0]
    assert starts[1] - starts[0] == starts[2] - starts[1] == 416, "all in the stage"
