"""Energy a GPU takes while it works, from NVML's counter of all energy since the driver was loaded.

Owns the meter and the measurement of power. Does not own the work. Needs the extra `nvml` (package nvidia-ml-py) and a
GPU that counts (Volta or later); where either is missing a `NoMeter` says so, and everything else is as before.

Timeline of one measurement:

    burst(1) twice                                     warm-up, and an estimate from which n follows
    counter, clock | burst(n) until stretch_s is over | counter, clock     three times

    power = joules between the two readings / seconds between them; the median of the three counts

What makes it valid: every burst ends with the device idle, so all of its energy lies between the readings; a stretch
is long against the counter's period (20 to 100 ms); the spread of the three stretches is kept with the result. What is
measured is the power of the whole board.
"""

from __future__ import annotations

import importlib
import logging
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from kvoffload.backend import Backend
from kvoffload.machine.quantities import Quantity
from kvoffload.profiler.compute import product_work
from kvoffload.profiler.environment import pci_bus_id
from kvoffload.profiler.workbench import Workbench

logger = logging.getLogger(__name__)

NUM_STRETCHES = 3
BURST_S = 0.1  # between two looks at the clock
PRODUCT = 4096  # m = n = k
COPY_BYTES = 2**26
POOL_BYTES = 256 * 2**20


class EnergyMeter(ABC):
    """A counter of joules; `missing` says why it has nothing to tell, and is None while it has."""

    missing: str | None = None

    @abstractmethod
    def joules(self) -> float | None:
        """Energy taken since some moment in the past; None when the counter cannot be read (any more)."""


class NoMeter(EnergyMeter):
    """Stands where energy cannot be had."""

    def __init__(self, missing: str) -> None:
        self.missing = missing

    def joules(self) -> None:
        return None


class NvmlMeter(EnergyMeter):
    """The counter of one GPU.

    Args:
        nvml: the module `pynvml`, initialised.
        handle: NVML's handle of the GPU.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3  # millijoules
        except self._nvml.NVMLError as error:
            self.missing = f"this GPU's energy counter cannot be read ({error})"
            return None


def open_meter(device: torch.device) -> EnergyMeter:
    """The meter of `device`: NVML's counter, else none, with the reason."""
    if device.type != "cuda":
        return NoMeter("there is no GPU whose counter NVML could read")
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return NoMeter("nvidia-ml-py is not installed (pip install 'kvoffload[nvml]')")
    bus = pci_bus_id(device)
    if bus is None:
        return NoMeter("PyTorch does not tell which PCI device this GPU is")
    try:
        nvml.nvmlInit()  # never shut down: others in this process may use it, and it counts its users
        meter = NvmlMeter(nvml, nvml.nvmlDeviceGetHandleByPciBusId(bus))
    except nvml.NVMLError as error:
        return NoMeter(f"NVML cannot be used ({error})")
    return NoMeter(str(meter.missing)) if meter.joules() is None else meter


def measure_power(
    meter: EnergyMeter,
    name: str,
    burst: Callable[[int], float],
    *,
    stretch_s: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Quantity]:
    """Joules and watts while `burst` runs again and again, as `<name>_energy_j` and `<name>_power_w`.

    Args:
        meter: what counts.
        name: of the work.
        burst: does the work the given number of times, waits for its end, returns the seconds it took.
        stretch_s: least length of one of the three stretches.
        clock: seconds.

    Returns:
        The two quantities; nothing where the meter has nothing to tell.
    """
    if meter.missing is not None:
        return {}
    burst(1)
    n = max(1, round(BURST_S / max(burst(1), 1e-9)))
    watts: list[float] = []
    taken_j = 0.0
    for _ in range(NUM_STRETCHES):
        began, before_j = clock(), meter.joules()
        while clock() - began < stretch_s:
            burst(n)
        after_j, took_s = meter.joules(), clock() - began
        if before_j is None or after_j is None:
            return {}
        watts.append((after_j - before_j) / took_s)
        taken_j += after_j - before_j
    median_w = statistics.median(watts)
    if median_w <= 0:
        meter.missing = "the energy counter stood still while the GPU worked"
        return {}
    logger.debug("%s: %.1f W", name, median_w)
    spread = (max(watts) - min(watts)) / median_w
    return {
        f"{name}_power_w": Quantity(value=median_w, unit="W", spread_fraction=spread),
        f"{name}_energy_j": Quantity(value=taken_j, unit="J"),
    }


def measure_energy(backend: Backend, dtype: torch.dtype, meter: EnergyMeter, stretch_s: float) -> dict[str, Quantity]:
    """Power while products run, and while copies to the device run."""
    if meter.missing is not None:
        return {}
    host = backend.allocate_host(COPY_BYTES)
    try:
        slot = backend.allocate_device(COPY_BYTES)
        with torch.inference_mode(False), torch.no_grad():
            bench = Workbench(backend.device, dtype, POOL_BYTES)
            product = product_work(bench, dtype, PRODUCT, PRODUCT, PRODUCT)

            def copy() -> object:
                return backend.copy_to_device(slot, host.tensor, ())

            def burst(work: Callable[[], object], n: int) -> float:
                began = time.perf_counter()
                for _ in range(n):
                    work()
                backend.synchronize()
                return time.perf_counter() - began

            found = measure_power(meter, "gemm", lambda n: burst(product, n), stretch_s=stretch_s)
            return found | measure_power(meter, "h2d", lambda n: burst(copy, n), stretch_s=stretch_s)
    finally:
        backend.synchronize()
        backend.release_host(host)
