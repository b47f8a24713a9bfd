"""What is measured replaces the profile's rates, and a chunk is timed once."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda_clock import Speeds
from fake_cuda_kernels import use_twins
from fake_cuda_tensors import DEVICE
from matrix import FAST_LINK, FixedRates, profile
from models import make_model

import kvoffload
from kvoffload import OffloadConfig
from kvoffload.backend import Backend, CheckingBackend, CudaBackend, EmulatedBackend
from kvoffload.model.model_shape import model_shape
from kvoffload.model.shape import ModelShape
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.planning.forms import FORMS
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.rates import Rates
from kvoffload.planning.sizes import Sizes
from kvoffload.planning.sizing import choose_sizes
from kvoffload.session.measured_rates import MeasuredRates

PROFILED = Rates(
    h2d_bytes_per_s={"activation": 1e9, "kv": 2e9},
    restore_s_per_token={"activation": 1e-6},
    attention_s_per_token=2e-6,
    dense_s=3e-6,
)


def test_only_what_was_measured_is_replaced_and_only_by_a_newer_measurement() -> None:
    measured = MeasuredRates()
    assert measured.correct(PROFILED, rows=4) == PROFILED
    measured.take(5e-6, None)
    found = measured.correct(PROFILED, rows=4)
    assert found.restore_s_per_token["activation"] == 2e-5
    assert (found.h2d_bytes_per_s["kv"], found.attention_s_per_token) == (2e9, 2e-6)
    measured.take(None, 7e9)
    found = measured.correct(PROFILED, rows=2)
    assert found.restore_s_per_token["activation"] == 1e-5
    assert found.h2d_bytes_per_s["kv"] == found.h2d_bytes_per_s["activation"] == 7e9
    measured.take(6e-6, None)
    found = measured.correct(PROFILED, rows=1)
    assert (found.restore_s_per_token["activation"], found.h2d_bytes_per_s["kv"]) == (6e-6, 7e9)
    measured.take(None, None, 9e-6)
    assert measured.correct(PROFILED, rows=2).attention_s_per_token == 1.8e-5


def layout(is_segmented: bool, **sizes: Any) -> tuple[ModelShape, Geometry, Sizes]:
    """Of a small model with room for a few chunks."""
    shape = model_shape(make_model("llama").config)
    geometry = Geometry(
        num_offloaded_layers=3,
        rows=2,
        max_tokens=1024,
        kv_row_bytes=shape.kv_row_bytes,
        activation_row_bytes=shape.activation_row_bytes,
        is_segmented=is_segmented,
    )
    config = OffloadConfig(**{"block_tokens": 4, "chunk_blocks": 3} | sizes)
    return shape, geometry, choose_sizes(geometry, config, forms=FORMS, device_bytes=None, rates=None)


@pytest.mark.parametrize("is_segmented", [True, False])
def test_a_chunk_is_timed_once_and_a_link_of_given_speed_never(is_segmented: bool) -> None:
    shape, geometry, sizes = layout(is_segmented)
    prepared: list[int] = []
    asked: list[int] = []
    measured, backend = MeasuredRates(), EmulatedBackend(FAST_LINK)

    def prepare(tokens: int) -> Any:
        prepared.append(tokens)
        return lambda: None

    def ring() -> list[torch.Tensor]:
        asked.append(12)
        return []

    with contextlib.closing(backend):
        for known in (measured, measured, FixedRates(shape.kv_row_bytes, shape.activation_row_bytes)):
            known.time_chunk(backend, shape, geometry, sizes, prepare, ring)
    assert prepared == [12]
    assert asked == [12]  # of slots that may be in use later
    assert measured.recompute_s_per_row_token is not None
    assert measured.attention_s_per_row_token is not None
    assert measured.h2d_bytes_per_s is None


def test_steps_that_are_not_as_predicted_measure_all_three_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MeasuredRates, "time_chunk", lambda *args: None)
    model, ids = make_model("opt"), torch.randint(3, 90, (2, 48))
    config = OffloadConfig(
        link=FAST_LINK, profile=profile(0.001), device_gib="min", block_tokens=4, chunk_blocks=2, split="auto"
    )
    with kvoffload.offload(model, config) as session:
        model.generate(ids, max_new_tokens=24, do_sample=False)
        measured = session.planner.measured
        assert session.stats is not None
    assert session.stats.recomputed_tokens > 0
    for one in (measured.recompute_s_per_row_token, measured.attention_s_per_row_token, measured.h2d_bytes_per_s):
        assert one is not None
        assert one > 0


# ---- a device whose launches take longer than its work -----------------------------------------------------------

SPEEDS = Speeds(launch_s=80e-6, wait_s=30e-6, memory_bytes_per_s=5e9, link_bytes_per_s=3e9)
CHUNK: dict[str, Any] = {"block_tokens": 64, "chunk_blocks": 4, "slots": 3}
WORK_BYTES = 2**16  # of what stands for a recomputation, 13 us


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    use_twins(monkeypatch)
    with fake_cuda.fake_cuda("lazy", speeds=SPEEDS) as fake:
        yield fake


def time_chunk(backend: Backend, is_segmented: bool, *, in_ring: bool = True, work: Any = None) -> MeasuredRates:
    """What is measured of a layout, with `work` for the recomputation."""
    shape, geometry, sizes = layout(is_segmented, **CHUNK)
    engine, measured = TransferEngine(backend), MeasuredRates()
    slots = {"slot_bytes": sizes.slot_bytes, "num_slots": sizes.num_slots, "buffer_bytes": sizes.buffer_bytes}
    engine.configure(**slots, d2h_slot_bytes=sizes.d2h_slot_bytes, scratch_bytes=sizes.scratch_bytes)
    room = torch.empty(WORK_BYTES, dtype=torch.uint8, device=backend.device)
    ring: Any = engine.buffers.idle_slots if in_ring else tuple
    measured.time_chunk(backend, shape, geometry, sizes, lambda tokens: work or (lambda: room.fill_(1)), ring)
    engine.close()
    return measured


@pytest.mark.parametrize("is_segmented", [True, False])
@pytest.mark.parametrize("in_ring", [True, False])
def test_no_rate_has_launches_or_waits_in_it(device: FakeCuda, is_segmented: bool, in_ring: bool) -> None:
    shape, geometry, sizes = layout(is_segmented, **CHUNK)
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        measured = time_chunk(backend, is_segmented, in_ring=in_ring)
    row_tokens = sizes.block_tokens * sizes.chunk_blocks * geometry.rows
    kv_s = row_tokens * shape.kv_row_bytes / SPEEDS.memory_bytes_per_s
    assert kv_s < SPEEDS.launch_s  # a launch takes longer
    assert measured.recompute_s_per_row_token is not None
    assert measured.attention_s_per_row_token is not None
    assert measured.recompute_s_per_row_token * row_tokens == pytest.approx(
        WORK_BYTES / SPEEDS.memory_bytes_per_s, rel=0.05
    )
    assert measured.attention_s_per_row_token * row_tokens == pytest.approx(kv_s, rel=0.05)
    assert measured.h2d_bytes_per_s == pytest.approx(SPEEDS.link_bytes_per_s, rel=0.05)
    assert device.registered == {}


def test_attention_and_copies_take_turns_through_the_ring_in_order_of_events(device: FakeCuda) -> None:
    with contextlib.closing(CheckingBackend(CudaBackend(DEVICE))) as backend:
        before = torch.random.get_rng_state()
        reads: list[int] = []
        copy = backend.copy_to_device
        backend.copy_to_device = lambda dst, *rest: (reads.append(dst.data_ptr()), copy(dst, *rest))[1]  # type: ignore
        time_chunk(backend, is_segmented=True)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert len(set(reads)) == CHUNK["slots"]


def test_trials_that_disagree_leave_the_profile_as_it_is(device: FakeCuda) -> None:
    room, calls = torch.empty(2**22, dtype=torch.uint8, device="cuda"), itertools.count()

    def work() -> None:
        stretch_idx = next(calls) // 8
        room[: 2 ** (20 + stretch_idx % 3)].fill_(1)

    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        measured = time_chunk(backend, is_segmented=True, work=work)
    assert measured.recompute_s_per_row_token is None
    assert (
        measured.correct(PROFILED, rows=4).restore_s_per_token["activation"]
        == PROFILED.restore_s_per_token["activation"]
    )
    assert measured.attention_s_per_row_token is not None


def test_a_cpu_whose_trials_disagree_is_measured_all_the_same() -> None:
    pauses = itertools.cycle([0.0, 4e-3])
    with contextlib.closing(EmulatedBackend(FAST_LINK)) as backend:
        measured = time_chunk(backend, is_segmented=True, work=lambda: time.sleep(next(pauses)))
    assert measured.recompute_s_per_row_token is not None
