"""Chunks and rings: of a real link those of a free split whatever the split is, of an emulated one small as before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fake_cuda
import pytest
from fake_cuda import FakeCuda
from fake_cuda_tensors import DEVICE
from matrix import FAST_LINK
from matrix import profile as emulated_profile

from kvoffload import HardwareProfile, InfeasiblePlanError, OffloadConfig
from kvoffload.backend import CudaBackend, EmulatedBackend
from kvoffload.model.shape import ModelShape
from kvoffload.planning.forms import FORMS
from kvoffload.planning.geometry import TARGET_CHUNK_BYTES, Geometry
from kvoffload.planning.placement import PLAIN
from kvoffload.planning.rates import Rates
from kvoffload.planning.sizing import LEAST_GAP_S, MAX_SLOTS, UNKNOWN_H2D_BYTES_PER_S, choose_sizes
from kvoffload.session.generation_plan import GenerationPlan
from kvoffload.session.generation_planner import GenerationPlanner

MIB = 2**20
SHAPE = ModelShape(  # of OPT-6.7B
    num_layers=32,
    num_offloaded_layers=32,
    hidden_size=4096,
    intermediate_size=16384,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=50272,
    kv_itemsize_bytes=2,
    activation_itemsize_bytes=2,
    weight_bytes=13 * 10**9,
)
GEOMETRY = Geometry(
    num_offloaded_layers=32,
    rows=16,
    max_tokens=2048,
    kv_row_bytes=SHAPE.kv_row_bytes,
    activation_row_bytes=SHAPE.activation_row_bytes,
    is_segmented=True,
)
SPLITS: list[Any] = ["transfer", "recompute", 0.3]


@pytest.fixture
def device() -> Iterator[FakeCuda]:
    with fake_cuda.fake_cuda("lazy", total_bytes=80 * 2**30) as fake:
        yield fake


def decided(split: Any, stored: HardwareProfile | None = None) -> GenerationPlan:
    """For a real link."""

    def measured() -> HardwareProfile:
        assert stored is not None, "a given split asks for no measurement"
        return stored

    config = OffloadConfig(split=split, device_gib="min", host_gib=60)
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        decider = GenerationPlanner(config, SHAPE, backend, measured, lambda: stored)
        return decider.plan_for(GEOMETRY, prompt_tokens=1024, knows_length=True, host_held_bytes=0)


def chunk_bytes(decision: GenerationPlan) -> int:
    return decision.sizes.block_tokens * decision.sizes.chunk_blocks * GEOMETRY.kv_bytes_per_token


@pytest.mark.parametrize("split", SPLITS)
def test_a_real_link_that_nobody_measured_gets_large_chunks_and_a_ring_for_the_gap(
    device: FakeCuda, split: Any
) -> None:
    found = decided(split)
    assert chunk_bytes(found) == TARGET_CHUNK_BYTES == 32 * MIB
    assert found.sizes.num_slots * found.sizes.slot_bytes >= LEAST_GAP_S * UNKNOWN_H2D_BYTES_PER_S
    assert found.inputs is None  # nothing is predicted


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("preset", ["a100-40gb-pcie4", "h100-80gb-pcie5"])
def test_a_given_split_gets_the_chunks_of_a_free_one_from_a_stored_profile(
    device: FakeCuda, split: Any, preset: str
) -> None:
    profile = HardwareProfile.preset(preset)
    free, given = decided("auto", profile), decided(split, profile)
    assert chunk_bytes(given) == chunk_bytes(free) >= 8 * MIB
    assert given.sizes.chunk_blocks == free.sizes.chunk_blocks
    assert given.plan.predicted_step_s > 0  # since it is known
    assert given.sizes.num_slots == free.sizes.num_slots
    assert profile.h2d is not None
    assert given.sizes.num_slots * given.sizes.slot_bytes >= LEAST_GAP_S * profile.h2d.rate(32 * MIB)


def rates(h2d_bytes_per_s: float) -> Rates:
    return Rates(
        h2d_bytes_per_s={"activation": h2d_bytes_per_s, "kv": h2d_bytes_per_s},
        restore_s_per_token={"activation": 0.0},
        attention_s_per_token=0.0,
        dense_s=0.0,
        gap_s=1e-3,
    )


def test_a_ring_makes_room_for_a_cache_that_fits_whole() -> None:
    segmented = replace(GEOMETRY, is_segmented=True, least_chunk_bytes=MIB)
    cache_bytes = segmented.num_offloaded_layers * segmented.max_tokens * segmented.kv_bytes_per_token
    options: Any = {"forms": FORMS, "rates": rates(50e9)}
    comfortable = choose_sizes(segmented, OffloadConfig(), **options, device_bytes=2**60)
    tight = choose_sizes(segmented, OffloadConfig(), **options, device_bytes=comfortable.fixed_device_bytes)
    assert tight == comfortable  # the cache fits in no case
    room = comfortable.fixed_device_bytes + cache_bytes
    assert choose_sizes(segmented, OffloadConfig(), **options, device_bytes=room) == comfortable
    smaller = choose_sizes(segmented, OffloadConfig(), **options, device_bytes=room - 1)
    assert smaller.fixed_device_bytes < comfortable.fixed_device_bytes
    assert smaller.block_tokens == comfortable.block_tokens
    fixed = choose_sizes(segmented, OffloadConfig(slots=comfortable.num_slots), **options, device_bytes=room - 1)
    assert fixed.num_slots == comfortable.num_slots


@pytest.mark.parametrize("h2d_bytes_per_s", [12e9, 50e9, 400e9])
@pytest.mark.parametrize("least_chunk_bytes", [2 * MIB, 32 * MIB])
def test_the_ring_covers_the_gap_however_small_its_chunks_are(h2d_bytes_per_s: float, least_chunk_bytes: int) -> None:
    real = replace(GEOMETRY, least_gap_s=LEAST_GAP_S, least_chunk_bytes=least_chunk_bytes)
    options: Any = {"forms": FORMS, "device_bytes": None, "rates": rates(h2d_bytes_per_s)}
    sizes = choose_sizes(real, OffloadConfig(), **options)
    assert (sizes.num_slots - 3) * sizes.slot_bytes >= LEAST_GAP_S * h2d_bytes_per_s
    emulated = choose_sizes(replace(real, least_gap_s=0.0), OffloadConfig(), **options)
    assert emulated.num_slots <= MAX_SLOTS
    assert emulated.slot_bytes == sizes.slot_bytes


def test_a_ring_is_not_longer_than_the_whole_cache() -> None:
    short = replace(GEOMETRY, least_gap_s=LEAST_GAP_S, num_offloaded_layers=2, rows=1, max_tokens=100)
    sizes = choose_sizes(short, OffloadConfig(), forms=FORMS, device_bytes=None, rates=rates(50e9))
    chunks_per_layer = -(-100 // (sizes.block_tokens * sizes.chunk_blocks))
    assert sizes.num_slots == 3 + 2 * chunks_per_layer


def test_under_a_cap_a_real_link_gives_up_slots_before_the_size_of_its_chunks() -> None:
    real = replace(GEOMETRY, least_gap_s=LEAST_GAP_S)
    options: Any = {"forms": {PLAIN}, "rates": rates(50e9)}
    best = choose_sizes(real, OffloadConfig(), device_bytes=None, **options)
    chunks, slots = [], []
    for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.1):
        cap = best.tail_bytes + int(share * (best.fixed_device_bytes - best.tail_bytes))
        try:
            sizes = choose_sizes(real, OffloadConfig(), device_bytes=cap, **options)
        except InfeasiblePlanError:
            break
        assert sizes.fixed_device_bytes <= cap
        chunks.append(sizes.chunk_blocks * sizes.block_tokens)
        slots.append(sizes.num_slots)
    assert len(chunks) >= 4
    assert chunks[0] == chunks[1] == chunks[2]
    assert slots[0] > slots[1] > slots[2] >= 4
    assert chunks[-1] < chunks[0]
    fixed = choose_sizes(real, OffloadConfig(slots=6), device_bytes=best.tail_bytes + 5 * best.slot_bytes, **options)
    assert fixed.num_slots == 6  # what the user asked for stays
    assert fixed.chunk_blocks < best.chunk_blocks


@pytest.mark.parametrize(("split", "wanted"), [("transfer", (512, 4)), (0.5, (512, 4)), ("auto", (64, 5))])
def test_sizes_on_an_emulated_link_are_what_they_were(split: Any, wanted: tuple[int, int]) -> None:
    config = OffloadConfig(split=split, link=FAST_LINK, device_gib="min")
    geometry = replace(GEOMETRY, rows=2, kv_row_bytes=4096, activation_row_bytes=2048)
    with contextlib.closing(EmulatedBackend(FAST_LINK)) as backend:
        decider = GenerationPlanner(
            config, SHAPE, backend, emulated_profile, lambda: HardwareProfile.preset("a100-40gb-pcie4")
        )
        found = decider.plan_for(geometry, prompt_tokens=1024, knows_length=True, host_held_bytes=0)
    assert (found.sizes.block_tokens * found.sizes.chunk_blocks, found.sizes.num_slots) == wanted
