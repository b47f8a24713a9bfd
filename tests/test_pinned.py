"""Pinned memory: kept from one session to the next up to a cap, given back when asked, touched by who pins it."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import PAGE_BYTES, FakeCuda
from fake_cuda_kernels import use_twins
from fake_cuda_tensors import DEVICE
from models import make_model

import kvoffload
from campaign import campaign, cells
from campaign.providers import Ours, Provider
from kvoffload.backend import CheckingBackend, CudaBackend, clock, cuda, free_pinned, pinned
from kvoffload.bench import current_rates
from kvoffload.machine import system_memory
from kvoffload.session.memory_limits import HOST_SHARE

MIB = 2**20


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    use_twins(monkeypatch)
    monkeypatch.setattr(system_memory, "usable_bytes", lambda: 64 * MIB)  # of which a quarter is kept
    with fake_cuda.fake_cuda("lazy", keeps_pinned=True) as fake:
        yield fake
    assert fake.registered == {}


@pytest.fixture
def registered(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each registration."""
    sizes: list[int] = []
    register = torch.cuda.cudart().cudaHostRegister

    def note(address: int, num_bytes: int, flags: int) -> int:
        sizes.append(num_bytes)
        return int(register(address, num_bytes, flags))

    monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", note)
    return sizes


def test_a_second_session_pins_nothing_and_free_pinned_gives_all_of_it_back(
    device: FakeCuda, registered: list[int]
) -> None:
    model, ids = make_model("llama").cuda(), torch.randint(3, 90, (2, 45), device="cuda")
    config = kvoffload.OffloadConfig(split="transfer", block_tokens=8, chunk_blocks=2, device_gib="min", host_gib=0.01)
    plain, found = model.generate(ids, max_new_tokens=8, do_sample=False), []
    counts = []
    for _ in range(3):
        with kvoffload.offload(model, config) as session:
            found.append(model.generate(ids, max_new_tokens=8, do_sample=False))
        assert session.stats is not None
        assert session.stats.pinned_bytes > 0
        counts.append(len(registered))
        assert sum(device.registered.values()) == session.stats.pinned_bytes
    assert counts[0] > 0
    assert counts == [counts[0]] * 3
    assert all(torch.equal(one, plain) for one in found)  # whatever the memory held before
    free_pinned()
    assert device.registered == {}


def test_no_more_is_kept_than_the_cap(device: FakeCuda) -> None:
    backend = CudaBackend(DEVICE)
    for num_bytes in (12 * MIB, 8 * MIB, 6 * MIB):
        backend.allocate_host(num_bytes)
    assert backend.kept_host_bytes == 0
    backend.close()
    backend.close()
    assert sum(device.registered.values()) == pinned.pool_of(DEVICE).kept_bytes <= 16 * MIB
    assert device.registered


def test_memory_of_another_size_is_given_back_for_what_is_taken_instead(
    device: FakeCuda, registered: list[int]
) -> None:
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        for num_bytes in (PAGE_BYTES, 4 * PAGE_BYTES, 4 * PAGE_BYTES):
            backend.allocate_host(num_bytes)
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        again = backend.allocate_host(3 * PAGE_BYTES + 5)
        assert again.tensor.numel() == 3 * PAGE_BYTES + 5
        assert again.pinned_bytes == 4 * PAGE_BYTES
        assert len(registered) == 3
        backend.allocate_host(100 * PAGE_BYTES)  # nothing fits: all of what was kept goes
        assert len(registered) == 4
        assert sorted(device.registered.values()) == [4 * PAGE_BYTES, 100 * PAGE_BYTES]


def test_what_is_kept_never_leaves_a_later_session_without_pinned_memory(device: FakeCuda) -> None:
    device.lockable_bytes = 8 * PAGE_BYTES
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        for _ in range(6):
            backend.allocate_host(PAGE_BYTES)
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        assert backend.allocate_host(3 * PAGE_BYTES).pinned_bytes == 3 * PAGE_BYTES
        assert backend.allocate_host(5 * PAGE_BYTES).pinned_bytes == 5 * PAGE_BYTES
        with pytest.warns(UserWarning, match="could not pin"):
            assert backend.allocate_host(PAGE_BYTES).pinned_bytes == 0


def test_memory_much_larger_than_what_is_asked_for_is_not_used_for_it(device: FakeCuda, registered: list[int]) -> None:
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        backend.allocate_host(5 * PAGE_BYTES)
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        assert backend.allocate_host(2 * PAGE_BYTES).pinned_bytes == 2 * PAGE_BYTES
        assert registered == [5 * PAGE_BYTES, 2 * PAGE_BYTES]
        assert list(device.registered.values()) == [2 * PAGE_BYTES]


def test_all_that_is_kept_goes_where_less_can_be_locked_than_before(device: FakeCuda) -> None:
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        for _ in range(6):
            backend.allocate_host(PAGE_BYTES)
    device.lockable_bytes = 5 * PAGE_BYTES  # another process locked memory meanwhile
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        assert backend.allocate_host(3 * PAGE_BYTES).pinned_bytes == 3 * PAGE_BYTES
        assert backend.kept_host_bytes == 0


def test_memory_given_back_in_the_middle_of_a_session_is_the_systems(device: FakeCuda) -> None:
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        backend.release_host(backend.allocate_host(MIB))
        assert device.registered == {}
        assert backend.kept_host_bytes == 0


def test_what_is_kept_counts_as_free_for_the_next_session(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_memory, "available_bytes", lambda: 100 * MIB)
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        backend.allocate_host(10 * MIB)
    model = make_model("llama").cuda()
    with kvoffload.offload(model, kvoffload.OffloadConfig(split="transfer")) as session:
        assert CheckingBackend(session.backend).kept_host_bytes == 10 * MIB
        assert session.planner.limits.host_cap_bytes() == int(HOST_SHARE * 110 * MIB)


def test_every_page_is_touched_by_the_thread_that_pins_it_while_that_is_near_the_device(
    device: FakeCuda, registered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    memset = ctypes.memset
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: events.append(sorted(cpus)))
    monkeypatch.setattr(cuda, "Path", _OneCpu)

    def touch(address: int, value: int, num_bytes: int) -> int:
        events.append((threading.get_ident(), num_bytes, len(registered)))
        return memset(address, value, num_bytes)

    monkeypatch.setattr(ctypes, "memset", touch)
    for name in ("zero_", "fill_"):  # which use PyTorch's threads
        monkeypatch.setattr(torch.Tensor, name, lambda *args: pytest.fail("touched by any thread"))
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        backend.allocate_host(3 * PAGE_BYTES)
    assert events == [[0], (threading.get_ident(), 3 * PAGE_BYTES, 0), [0, 1]]
    assert registered == [3 * PAGE_BYTES]


@dataclasses.dataclass
class _Stand(Provider):
    """Stands for another's way, which leaves pinned memory behind in PyTorch's cache."""

    name: str
    ran: list[Any]
    device: FakeCuda

    def run(self, bed: Any, new_tokens: int, *, keeps_logits: bool) -> Any:
        calls = self.device.streams.calls
        self.ran.append((self.name, calls["empty host cache"], pinned.pool_of(DEVICE).kept_bytes))
        raise RuntimeError("only noted")


class _Ours(Ours):
    def __init__(self, mode: str, ran: list[Any]) -> None:
        super().__init__(mode)
        self.ran = ran

    def run(self, bed: Any, new_tokens: int, *, keeps_logits: bool) -> Any:
        self.ran.append((self.name, None, pinned.pool_of(DEVICE).kept_bytes))
        return super().run(bed, new_tokens, keeps_logits=keeps_logits)


def test_in_a_cell_ours_come_first_and_what_a_provider_leaves_pinned_is_gone_before_the_next(
    device: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_memory, "usable_bytes", lambda: 2**30)
    monkeypatch.setattr(clock, "LEAST_CALLS", 1)
    cell = cells.CELLS["opt-6.7b 64x512+32"]
    tiny = {"hidden": 64, "heads": 4, "kv_heads": 4, "ffn": 64, "layers": 2, "batch": 2, "vocab": 96}
    preset = dataclasses.replace(cell.preset, **tiny, cached_tokens=48, dtype=torch.float32)
    cell = dataclasses.replace(cell, preset=preset, new_tokens=4, device_memory_gb=None)
    median_s = current_rates._median_s
    monkeypatch.setattr(
        current_rates, "_median_s", lambda work, device, budget_s, idle_s=0.0: median_s(work, device, 0.0)
    )
    ran: list[Any] = []
    others = [_Stand(name, ran, device) for name in ("one", "two")]
    chosen = [others[0], _Ours("full_transfer", ran), others[1], _Ours("sequential", ran)]
    settings = campaign.Settings(resumes=False)
    profile = kvoffload.HardwareProfile.preset("a100-40gb-pcie4")
    campaign._run_cell(cell, chosen, profile, tmp_path / "rows.csv", settings, lambda line: None)
    names = [name for name, _, _ in ran]
    assert names == ["full_transfer"] * 2 + ["sequential"] * 2 + ["one", "two"]
    kept = {name: found for name, _, found in ran}
    assert kept["sequential"] > 0  # ours find what ours kept
    assert kept["one"] == kept["two"] == 0
    emptied = {name: times for name, times, _ in ran}
    assert emptied["two"] == emptied["one"] + 1
    assert campaign.in_order(chosen, torch.device("cpu")) == chosen


class _OneCpu:
    """Stands for `Path`: the first CPU is near."""

    def __init__(self, path: str) -> None:
        pass

    def read_text(self) -> str:
        return "0\n"
