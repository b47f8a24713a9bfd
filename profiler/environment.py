"""The facts of a machine that explain how fast its link can be: CPU, memory, limits, versions, GPU and PCIe.

Owns the reading. Does not judge (docs/troubleshooting.md does) and does not measure. A fact that cannot be had is
None, shown as "not available": never a guess.

Where PCIe facts come from, in this order: nvidia-smi, sysfs of the device, nothing. An idle GPU lowers its link to
save power, so the generation in use is only true when read right after copies, as a profile does.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from kvoffload.machine import system_memory

PACKAGES = ("torch", "transformers", "triton", "numpy", "pulp", "highspy")
GENERATION_BY_GT_PER_S = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
SMI_FIELDS = (
    "name,driver_version,memory.total,pci.bus_id,"
    "pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max"
)
NO_GPU: dict[str, Any] = {
    "gpu_name": None,
    "driver_version": None,
    "gpu_memory_bytes": None,
    "pcie_generation": None,
    "pcie_generation_max": None,
    "pcie_width": None,
    "pcie_width_max": None,
    "gpu_numa_node": None,
}


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """The facts of this machine, JSON-ready; None where a fact is not available.

    Args:
        device: the CUDA device to describe; None takes the first GPU the driver shows.
    """
    soft_limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "system": platform.system(),
        "is_wsl": "microsoft" in platform.release().lower(),
        "cpu_name": cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": system_memory.installed_bytes(),
        "memory_available_bytes": system_memory.available_bytes(),
        "cgroup_memory_limit_bytes": system_memory.limit_bytes(),
        "locked_memory_limit_bytes": None if soft_limit == resource.RLIM_INFINITY else soft_limit,
        "locked_memory_is_unlimited": soft_limit == resource.RLIM_INFINITY,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "cuda_version": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
    } | gpu_facts(device)


def gpu_facts(device: torch.device | None = None) -> dict[str, Any]:
    """Name, driver, memory, PCIe link (in use and maximum) and NUMA node of a GPU; all None without one."""
    facts = dict(NO_GPU)
    bus = pci_bus_id(device)
    row = _nvidia_smi(bus)
    if row is not None:
        facts |= {
            "gpu_name": row[0],
            "driver_version": row[1],
            "gpu_memory_bytes": _scaled(row[2], 2**20),  # MiB
            "pcie_generation": _number(row[4]),
            "pcie_generation_max": _number(row[5]),
            "pcie_width": _number(row[6]),
            "pcie_width_max": _number(row[7]),
        }
        bus = bus or row[3]
    if bus is None:
        return facts
    folder = Path("/sys/bus/pci/devices") / sysfs_bus_id(bus)
    for key, file in (("pcie_generation", "current_link_speed"), ("pcie_generation_max", "max_link_speed")):
        speed = _read(folder / file)
        if facts[key] is None and speed is not None:  # e.g. "16.0 GT/s PCIe"
            facts[key] = GENERATION_BY_GT_PER_S.get(_float(speed.split()[0]))
    for key, file in (("pcie_width", "current_link_width"), ("pcie_width_max", "max_link_width")):
        if facts[key] is None:
            facts[key] = _number(_read(folder / file))
    node = _number(_read(folder / "numa_node"))
    facts["gpu_numa_node"] = node if node is not None and node >= 0 else None  # -1: the system does not know
    return facts


def cpu_name() -> str:
    """The processor's marketing name, or its architecture."""
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_seconds() -> tuple[float, float]:
    """CPU time spent so far by everything on this machine (nan where unknown), and by this process."""
    fields = (_read(Path("/proc/stat")) or "").partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return float("nan"), time.process_time()
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[1:9])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def sysfs_bus_id(bus: str) -> str:
    """The PCI address as sysfs writes it: nvidia-smi's domain has eight digits, sysfs' four."""
    domain, _, rest = bus.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def pci_bus_id(device: torch.device | None) -> str | None:
    """The PCI address of a CUDA device, with a domain of eight digits; None where it cannot be had."""
    if device is None or device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    domain, bus, slot = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    if domain is None or bus is None or slot is None:  # older PyTorch, or a device without PCI
        return None
    return f"{domain:08x}:{bus:02x}:{slot:02x}.0"


def _nvidia_smi(bus: str | None) -> list[str] | None:
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([*command, *([f"--id={bus}"] if bus else [])], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    fitting = [row for row in rows if len(row) == SMI_FIELDS.count(",") + 1]
    return fitting[0] if done.returncode == 0 and fitting else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else None


def _scaled(text: str | None, factor: int) -> int | None:
    number = _number(text)
    return None if number is None else number * factor
