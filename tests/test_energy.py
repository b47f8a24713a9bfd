"""Energy: watts from a counter of joules, and a reason where there is no counter. No GPU and no NVML is needed."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from replay import ReplayedLink

from kvoffload.backend import EmulatedBackend
from kvoffload.config import EmulatedLink
from kvoffload.machine.quantities import Quantity
from kvoffload.profiler import energy

CUDA = torch.device("cuda", 0)
BUS = "00000000:3b:00.0"


class NVMLError(Exception):
    """As pynvml's."""


class FakeGpu:
    """A clock, and a counter that rises by `watts` while it runs; stands in for the module pynvml as well."""

    NVMLError = NVMLError

    def __init__(self, watts: list[float] | None = None, failing: str = "") -> None:
        self.now_s, self.taken_j = 0.0, 5e6
        self.watts = watts or [250.0]
        self.failing = failing
        self.asked_for: str | None = None

    def burst(self, n: int) -> float:
        """`n` times 10 ms of work; the power changes every second."""
        power_w = self.watts[int(self.now_s) % len(self.watts)]
        self.now_s += 0.01 * n
        self.taken_j += 0.01 * n * power_w
        return 0.01 * n

    def clock(self) -> float:
        return self.now_s

    def nvmlInit(self) -> None:
        if self.failing == "init":
            raise NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> Any:
        self.asked_for = bus
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        assert handle == "handle"
        if self.failing == "counter":
            raise NVMLError("Not Supported")
        return round(self.taken_j * 1e3)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a fake in the place of pynvml, and tell where the GPU is."""
    monkeypatch.setattr(energy, "pci_bus_id", lambda device: BUS)

    def put(fake: FakeGpu | None) -> energy.EnergyMeter:
        monkeypatch.setitem(sys.modules, "pynvml", fake)  # None: importing it fails
        return energy.open_meter(CUDA)

    return put


def test_power_is_joules_over_seconds_while_the_work_runs(install: Any) -> None:
    gpu = FakeGpu()
    meter = install(gpu)
    assert meter.missing is None
    assert gpu.asked_for == BUS
    found = energy.measure_power(meter, "gemm", gpu.burst, clock=gpu.clock)
    assert found["gemm_power_w"] == Quantity(
        value=pytest.approx(250.0), unit="W", spread_fraction=pytest.approx(0.0, abs=1e-5)
    )
    assert found["gemm_energy_j"].value == pytest.approx(3 * 250.0, rel=0.15)  # three stretches of a second
    assert found["gemm_energy_j"].unit == "J"


def test_the_median_stretch_counts_and_their_spread_is_kept(install: Any) -> None:
    gpu = FakeGpu(watts=[100.0, 200.0, 400.0, 400.0])
    found = energy.measure_power(install(gpu), "h2d", gpu.burst, clock=gpu.clock)
    assert found["h2d_power_w"].value == pytest.approx(200.0, rel=0.15)
    assert found["h2d_power_w"].spread_fraction == pytest.approx(1.5, rel=0.15)


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (None, "nvidia-ml-py is not installed (pip install 'kvoffload[nvml]')"),
        (FakeGpu(failing="init"), "NVML cannot be used (NVML Shared Library Not Found)"),
        (FakeGpu(failing="counter"), "this GPU's energy counter cannot be read (Not Supported)"),
    ],
    ids=["no package", "no library", "no counter"],
)
def test_where_there_is_no_counter_the_reason_is_said(fake: FakeGpu | None, reason: str, install: Any) -> None:
    meter = install(fake)
    assert meter.missing == reason
    assert meter.joules() is None

    def never(n: int) -> float:
        raise AssertionError("nothing runs for a meter that has nothing to tell")

    assert energy.measure_power(meter, "gemm", never) == {}


def test_a_cpu_has_no_meter_and_a_gpu_without_an_address_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no GPU" in str(energy.open_meter(torch.device("cpu")).missing)
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace())
    monkeypatch.setattr(energy, "pci_bus_id", lambda device: None)
    assert "PCI device" in str(energy.open_meter(CUDA).missing)


def test_a_counter_that_fails_or_stands_still_on_the_way_gives_no_number(install: Any) -> None:
    gpu = FakeGpu(watts=[0.0])
    meter = install(gpu)
    assert energy.measure_power(meter, "gemm", gpu.burst, clock=gpu.clock) == {}
    assert "stood still" in str(meter.missing)

    gpu = FakeGpu()
    meter = install(gpu)
    gpu.failing = "counter"
    assert energy.measure_power(meter, "gemm", gpu.burst, clock=gpu.clock) == {}
    assert "Not Supported" in str(meter.missing)


class WallClockMeter(energy.EnergyMeter):
    """A device that takes 40 W whatever it does."""

    def joules(self) -> float:
        return 40.0 * time.perf_counter()


def test_products_and_copies_are_metered_while_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "PRODUCT", 64)
    monkeypatch.setattr(energy, "COPY_BYTES", 2**16)
    monkeypatch.setattr(energy, "POOL_BYTES", 2**20)
    backend = EmulatedBackend(EmulatedLink())
    try:
        found = energy.measure_energy(backend, torch.float32, WallClockMeter(), 0.05)
        assert backend.link_use("h2d").copies > 3
        assert energy.measure_energy(backend, torch.float32, energy.NoMeter("none"), 0.05) == {}
    finally:
        backend.close()
    assert set(found) == {"gemm_power_w", "gemm_energy_j", "h2d_power_w", "h2d_energy_j"}
    for name in ("gemm_power_w", "h2d_power_w"):
        assert found[name].value == pytest.approx(40.0, rel=0.05)


def test_host_memory_is_given_back_where_the_device_has_none() -> None:
    backend = ReplayedLink({"h2d": 25e9, "d2h": 25e9}, is_full=True)
    with pytest.raises(torch.OutOfMemoryError):
        energy.measure_energy(backend, torch.float32, WallClockMeter(), 0.05)
    assert backend.host_bytes
    assert backend.num_held == 0
