"""A stretch on a device has the device's time in it and no launch, on a device whose launches take long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda_clock import Speeds
from fake_cuda_tensors import DEVICE

from kvoffload.backend import CheckingBackend, CudaBackend, DeviceClock
from kvoffload.backend.clock import LEAST_CALLS
from kvoffload.backend.sampling import ALL_AT_FIRST

SPEEDS = Speeds(launch_s=80e-6, wait_s=50e-6)
NUM_BYTES = 2**14
FILL_S = NUM_BYTES / SPEEDS.memory_bytes_per_s  # 16 us, a fifth of its launch


@pytest.fixture
def device() -> Iterator[FakeCuda]:
    with fake_cuda.fake_cuda("lazy", speeds=SPEEDS) as fake:
        yield fake


def test_a_stretch_is_what_the_device_did_however_long_launches_take(device: FakeCuda) -> None:
    room = torch.empty(NUM_BYTES, dtype=torch.uint8, device="cuda")
    clock = DeviceClock(DEVICE)
    for n in (1, LEAST_CALLS, 200):  # 200 launches take 16 ms, much more than the first delay
        found = clock.time(lambda: room.fill_(1), n)
        assert found.seconds == pytest.approx(n * FILL_S)
        assert found.hides_launches
    delays = device.streams.calls["delay"]
    clock.time(lambda: room.fill_(1), 200)
    assert device.streams.calls["delay"] == delays + 1  # it knows by now how long queueing takes


def test_work_that_waits_for_the_device_cannot_be_queued_ahead_and_is_said_to_have_launches_in_it(
    device: FakeCuda,
) -> None:
    room = torch.empty(NUM_BYTES, dtype=torch.uint8, device="cuda")
    found = DeviceClock(DEVICE).time(lambda: room.fill_(1)[0].item(), 4)
    assert not found.hides_launches
    assert found.seconds > 4 * SPEEDS.launch_s
    assert device.streams.calls["delay"] <= 4


def test_work_on_a_stream_of_the_users_own_and_beside_another_current_device(device: FakeCuda) -> None:
    room = torch.empty(NUM_BYTES, dtype=torch.uint8, device="cuda")
    device.streams.current_device = 1
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
        found = DeviceClock(DEVICE).time(lambda: room.fill_(1), LEAST_CALLS)
    assert found.seconds == pytest.approx(LEAST_CALLS * FILL_S)
    assert found.hides_launches
    assert device.streams.current_device == 1


@pytest.mark.parametrize("is_checked", [False, True])
@pytest.mark.parametrize("ways", [("h2d",), ("d2h",), ("h2d", "d2h")])
def test_copies_are_timed_in_their_own_streams(device: FakeCuda, ways: Any, is_checked: bool) -> None:
    inner = CudaBackend(DEVICE)
    backend = CheckingBackend(inner, poison=False) if is_checked else inner
    source, target = (backend.allocate_host(NUM_BYTES).tensor for _ in range(2))
    landing, leaving = (backend.allocate_device(NUM_BYTES) for _ in range(2))
    backend.synchronize()

    def queue() -> None:
        if "h2d" in ways:
            backend.copy_to_device(landing, source, [])
        if "d2h" in ways:
            backend.copy_to_host(target, leaving, [])

    with contextlib.closing(backend):
        found = backend.time_copies(queue, LEAST_CALLS, ways)
        assert found.seconds == pytest.approx(LEAST_CALLS * NUM_BYTES / SPEEDS.link_bytes_per_s, rel=0.01)
        assert found.hides_launches
        backend.compute(writes=(landing, leaving))  # nothing of it is under way any more


def test_copies_of_pageable_memory_are_timed_by_the_host(device: FakeCuda) -> None:
    backend = CudaBackend(DEVICE)
    host, target = backend.allocate_host(NUM_BYTES).tensor, backend.allocate_device(NUM_BYTES)
    with contextlib.closing(backend):
        found = backend.time_copies(lambda: backend.copy_to_device(target, host, []), 4, ("h2d",), is_pageable=True)
    assert device.streams.calls["delay"] == 0
    assert found.seconds > 4 * NUM_BYTES / SPEEDS.link_bytes_per_s


def test_a_pace_is_made_of_spans_that_were_queued_ahead(device: FakeCuda) -> None:
    backend = CudaBackend(DEVICE)
    room = backend.allocate_device(NUM_BYTES)
    for delay_s in (0.0, 1e-2, 0.0):  # while the device waits for its host, for something else, for its host
        torch.cuda._sleep(int(delay_s * 2e9))
        span = backend.start_span("recompute")
        room.fill_(1)
        backend.end_span(span, amount=7)
        backend.synchronize()
    assert backend.pace("recompute").amount == 7
    assert backend.pace("recompute").seconds == pytest.approx(FILL_S)
    assert backend.span_seconds("recompute") > 2 * SPEEDS.launch_s  # all of them
    before = backend.pace("recompute")
    assert before.since(before) is None
    backend.close()


def test_the_pace_of_copies_leaves_out_what_the_stream_waited_for_its_host(device: FakeCuda) -> None:
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        source, landing = backend.allocate_host(NUM_BYTES).tensor, backend.allocate_device(NUM_BYTES)
        for _ in range(3):
            backend.copy_to_device(landing, source, [])  # nothing before it
            backend.synchronize()
        assert backend.pace("h2d").amount == 0
        assert backend.link_use("h2d").busy_s > 3 * SPEEDS.launch_s
        for _ in range(3):  # behind one that the host does not wait for
            backend.copy_to_device(landing, source, [])
        backend.synchronize()
        pace = backend.pace("h2d")
    assert pace.amount == 2 * NUM_BYTES
    assert pace.amount / pace.seconds == pytest.approx(SPEEDS.link_bytes_per_s)


def test_a_cpu_is_timed_by_the_wall_clock_one_call_at_a_time() -> None:
    clock = DeviceClock(torch.device("cpu"))
    assert clock.least_calls == 1
    assert clock.time(lambda: time.sleep(2e-3), 3).seconds >= 6e-3


def test_what_happens_once_a_step_is_counted_one_by_one(device: FakeCuda) -> None:
    """Of stretches that a step has many of, some are timed; their total is right all the same."""
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        x = torch.zeros(2**16, device=DEVICE)
        for _ in range(ALL_AT_FIRST + 100):
            for name in ("gap", "recompute"):
                span = backend.start_span(name)
                x.mul_(1.0)
                backend.end_span(span)
        backend.synchronize()
        gaps, recompute_s = backend.spans("gap"), backend.span_seconds("recompute")
        timed = backend.spans("recompute").amount
    assert gaps.amount == ALL_AT_FIRST + 100
    assert timed < ALL_AT_FIRST + 50
    assert recompute_s == pytest.approx(gaps.seconds, rel=0.15)
