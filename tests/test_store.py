"""Host memory: pools hand out memory that does not overlap and get all of it back; the row table against a model."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from kvoffload import HostMemoryError
from kvoffload.backend import Backend
from kvoffload.backend.base import HostBuffer
from kvoffload.store.extent import Extent
from kvoffload.store.pool import ALIGNMENT_BYTES, SLAB_BYTES, HostPool, Region
from kvoffload.store.row_table import RowTable

CPU = torch.device("cpu")


class Memory:
    """The part of a backend that a pool uses; counts what it gives out."""

    def __init__(self, pinned: bool = False) -> None:
        self.held: dict[int, int] = {}
        self.num_synchronized = 0
        self._pinned = pinned

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        tensor = torch.empty(num_bytes, dtype=torch.uint8)
        self.held[tensor.data_ptr()] = num_bytes
        return HostBuffer(tensor, num_bytes if self._pinned else 0)

    def release_host(self, buffer: HostBuffer) -> None:
        del self.held[buffer.tensor.data_ptr()]

    def synchronize(self) -> None:
        self.num_synchronized += 1


def make_pool(cap_bytes: int = 2**40, **kwargs: bool) -> tuple[HostPool, Memory]:
    memory = Memory(**kwargs)
    backend: Backend = memory  # type: ignore[assignment]
    return HostPool(backend, cap_bytes), memory


def addresses(region: Region) -> range:
    return range(region.bytes.data_ptr(), region.bytes.data_ptr() + region.num_bytes)


def assert_no_overlap(regions: list[Region]) -> None:
    spans = sorted((addresses(region) for region in regions), key=lambda span: span.start)
    for first, second in itertools.pairwise(spans):
        assert first.stop <= second.start


# ---- HostPool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_regions_never_overlap_and_nothing_leaks(seed: int) -> None:
    pool, memory = make_pool()
    draw, regions, used = random.Random(seed), [], 0
    for step in range(400):
        if regions and draw.random() < 0.48:
            region = regions.pop(draw.randrange(len(regions)))
            used -= region.num_bytes
            pool.free(region, f"event {step}")
        else:
            asked = draw.choice([1, 255, 256, 257, 10_007, 4 * 2**20, SLAB_BYTES // 3])
            region = pool.allocate(asked)
            assert region.num_bytes == -(-asked // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            regions.append(region)
            used += region.num_bytes
        assert_no_overlap(regions)
        assert pool.used_bytes == used
        assert pool.used_bytes + pool.free_bytes == pool.slab_bytes == sum(memory.held.values())
    for region in regions:
        pool.free(region, None)
    assert pool.used_bytes == 0
    # Neighbours were merged: each slab is one piece again, so its whole length can be had.
    num_slabs = len(memory.held)
    whole = [pool.allocate(num_bytes) for num_bytes in memory.held.values()]
    assert len(memory.held) == num_slabs
    assert pool.free_bytes == 0
    assert_no_overlap(whole)


def test_a_region_carries_the_event_of_its_last_reader_also_after_merging() -> None:
    pool, _ = make_pool()
    first, second, third = (pool.allocate(1000) for _ in range(3))
    rest = pool.allocate(pool.free_bytes)
    assert first.guard is None
    pool.free(first, "first read")
    pool.free(third, "third read")
    pool.free(second, "last read")  # joins all three; reads end in the order of the queue, so the last one counts
    joined = pool.allocate(3 * 1024)
    assert joined.guard == "last read"
    assert joined.offset == first.offset
    pool.free(rest, "rest read")
    assert pool.allocate(1000).guard == "rest read"


def test_a_part_of_a_freed_region_still_carries_its_event() -> None:
    pool, _ = make_pool()
    region = pool.allocate(1024)
    pool.allocate(pool.free_bytes)
    pool.free(region, "read")
    assert [pool.allocate(256).guard for _ in range(4)] == ["read"] * 4


def test_the_cap_is_kept_and_named_with_numbers() -> None:
    pool, memory = make_pool(cap_bytes=3 * SLAB_BYTES // 2)
    pool.allocate(SLAB_BYTES)
    half = pool.allocate(SLAB_BYTES // 2)  # a smaller slab: what the cap leaves
    assert sum(memory.held.values()) == 3 * SLAB_BYTES // 2
    with pytest.raises(HostMemoryError, match=r"needs 256 B more .* 0 B of the cap of 96\.00 MiB .* raise host_gib"):
        pool.allocate(1)
    pool.free(half, None)
    assert pool.allocate(SLAB_BYTES // 2).num_bytes == SLAB_BYTES // 2


def test_unused_slabs_make_room_for_one_of_another_size() -> None:
    pool, memory = make_pool(cap_bytes=2 * SLAB_BYTES)
    kept = pool.allocate(1024)
    unused = pool.allocate(SLAB_BYTES)
    pool.free(unused, "last read")
    assert len(memory.held) == 2
    with pytest.raises(HostMemoryError):
        pool.allocate(3 * SLAB_BYTES // 2)
    # The failed attempt gave the unused slab back, after all copies had ended.
    assert memory.num_synchronized == 1
    assert len(memory.held) == 1
    assert pool.allocate(SLAB_BYTES).num_bytes == SLAB_BYTES
    pool.free(kept, None)
    assert pool.used_bytes == SLAB_BYTES


def test_large_requests_get_a_slab_of_their_own_size_and_progress_is_told() -> None:
    memory, seen = Memory(pinned=True), []
    backend: Backend = memory  # type: ignore[assignment]
    pool = HostPool(backend, 2**40, on_progress=seen.append)
    pool.allocate(3 * SLAB_BYTES)
    pool.allocate(1)
    assert seen == [3 * SLAB_BYTES, 4 * SLAB_BYTES]
    assert pool.pinned_bytes == pool.slab_bytes == 4 * SLAB_BYTES


def test_a_closed_pool_takes_regions_back_silently() -> None:
    pool, _ = make_pool()
    region = pool.allocate(1000)
    pool.close()
    pool.free(region, None)
    assert pool.slab_bytes == pool.used_bytes == 0


# ---- Extent ----------------------------------------------------------------------------------------------------------


def address(data: torch.Tensor) -> int:
    return data.data_ptr()


def test_blocks_of_a_reserved_extent_are_contiguous() -> None:
    pool, _ = make_pool()
    extent, other = Extent(pool), Extent(pool)
    extent.reserve(10 * 768)
    blocks = []
    for _ in range(10):
        blocks.append(extent.append(768)[0])
        other.append(768)  # someone else grows meanwhile
    assert [address(b) - address(blocks[0]) for b in blocks] == [768 * i for i in range(10)]
    assert extent.used_bytes == extent.capacity_bytes == 7680


def test_an_extent_reserves_only_what_is_missing() -> None:
    pool, _ = make_pool()
    extent = Extent(pool)
    extent.reserve(5000)
    held = pool.used_bytes
    extent.reserve(4000)
    assert pool.used_bytes == held
    extent.reserve(9000)
    assert pool.used_bytes >= 9000
    assert extent.capacity_bytes >= 9000


def test_an_extent_of_unknown_length_doubles() -> None:
    pool, _ = make_pool()
    extent = Extent(pool, doubles=True)
    sizes = []
    for _ in range(64):
        extent.append(256)
        sizes.append(extent.capacity_bytes)
    assert len(set(sizes)) == 7  # 1, 2, 4, ..., 64 blocks
    assert sizes[-1] == 64 * 256


def test_an_extent_takes_what_it_needs_where_there_is_no_room_for_the_double() -> None:
    pool, _ = make_pool(cap_bytes=5000)
    extent = Extent(pool, doubles=True)
    extent.reserve(4096)
    for _ in range(17):
        extent.append(256)
    assert extent.capacity_bytes == 4096 + 256


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("doubles", [False, True])
def test_appending_and_removing_keep_blocks_apart_and_in_order(seed: int, doubles: bool) -> None:
    pool, _ = make_pool()
    extent, draw = Extent(pool, doubles=doubles), random.Random(seed)
    extent.reserve(2000)
    blocks: list[torch.Tensor] = []
    reads: list[tuple[int, str]] = []  # of what was removed
    for step in range(300):
        if blocks and draw.random() < 0.45:
            gone = blocks.pop()
            extent.pop(gone.numel(), f"read {step}")
            reads.append((address(gone), f"read {step}"))
        else:
            data, guard = extent.append(512)
            removed = [read for start, read in reads if start == address(data)]
            assert not removed or int(guard.split()[1]) >= int(removed[-1].split()[1])
            blocks.append(data)
        assert extent.used_bytes == sum(block.numel() for block in blocks)
        spans = sorted((address(b), address(b) + b.numel()) for b in blocks)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
        assert extent.used_bytes <= extent.capacity_bytes <= pool.used_bytes
    extent.close("last read")
    assert pool.used_bytes == 0
    assert pool.allocate(100).guard == "last read"


def test_bytes_of_a_removed_block_are_written_again_only_behind_its_last_read() -> None:
    pool, _ = make_pool()
    extent = Extent(pool)
    first, guard = extent.append(1024)
    assert guard is None
    extent.pop(1024, "read 1")
    again, guard = extent.append(1024)
    assert address(again) == address(first)
    assert guard == "read 1"


def test_bytes_of_an_earlier_cache_are_written_again_only_behind_its_last_read() -> None:
    pool, _ = make_pool()
    earlier, later = Extent(pool), Extent(pool)
    first, _ = earlier.append(1024)
    earlier.close("read by the earlier cache")
    again, guard = later.append(1024)
    assert address(again) == address(first)
    assert guard == "read by the earlier cache"


# ---- RowTable --------------------------------------------------------------------------------------------------------


class BruteForce:
    """Blocks that hold their rows' names; reordering moves whole rows. What the table must be equivalent to."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.stored: list[list[int]] = []  # per block, per stored row: a name
        self.logical: list[list[int]] = []  # per block, per logical row: the name it must find
        self._names = itertools.count()

    def extend(self, num_blocks: int, copies: int) -> None:
        for _ in range(num_blocks):
            names = [next(self._names) for _ in range(self.rows // copies)]
            self.stored.append(names)
            self.logical.append([name for name in names for _ in range(copies)])

    def select(self, indices: list[int]) -> None:
        self.rows = len(indices)
        self.logical = [[block[i] for i in indices] for block in self.logical]

    def truncate(self, num_blocks: int) -> None:
        del self.stored[num_blocks:], self.logical[num_blocks:]


@pytest.mark.parametrize("seed", range(20))
def test_the_row_table_finds_what_moving_rows_would_have_found(seed: int) -> None:
    draw = random.Random(seed)
    copies = draw.choice([1, 1, 2, 3])
    rows = copies * draw.choice([1, 2, 5])
    table, model = RowTable(CPU), BruteForce(rows)
    for step in range(60):
        operation = draw.random()
        version = table.version
        if operation < 0.45 or step == 0:
            num_blocks = draw.randrange(1, 4)
            here = copies if not model.logical or draw.random() < 0.2 else 1
            here = here if model.rows % here == 0 else 1
            table.extend(num_blocks, model.rows, here)
            model.extend(num_blocks, here)
        elif operation < 0.85:
            length = model.rows if draw.random() < 0.8 else draw.choice([1, 2, model.rows, 2 * model.rows])
            indices = [draw.randrange(model.rows) for _ in range(length)]
            table.select(torch.tensor(indices))
            model.select(indices)
        else:
            kept = draw.randrange(len(model.logical) + 1)
            table.truncate(kept)
            model.truncate(kept)
        assert table.version > version
        assert table.num_blocks == len(model.logical)
        for idx, (stored, logical) in enumerate(zip(model.stored, model.logical, strict=True)):
            physical = list(range(model.rows)) if table.table is None else table.table[idx].tolist()
            assert [stored[row] for row in physical] == logical


def test_a_table_without_reordering_is_not_stored() -> None:
    table = RowTable(CPU)
    table.extend(3, 4)
    table.truncate(2)
    table.extend(5, 4)
    assert table.table is None
    table.select(torch.tensor([1, 0, 2, 3]))
    assert table.table is not None
    table.truncate(0)
    assert table.table is None
