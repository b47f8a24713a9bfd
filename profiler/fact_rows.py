"""A profile and the facts of a machine as rows of text, for a terminal. Torch-free.

Owns wording and units: GB = 1e9 bytes, sizes in KiB and MiB, a spread as "± so many %". Does not own the numbers
(`hardware_profile`, `environment`).
"""

from __future__ import annotations

from typing import Any

from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.quantities import Curve, Quantity
from kvoffload.units import counted, gib

NOT_AVAILABLE = "not available"
MAX_NOISY_SHOWN = 5
MAX_LINE_ERROR_FRACTION = 0.1  # beyond it the line is not all there is to say
Rows = list[tuple[str, str]]


def profile_rows(measured: HardwareProfile) -> Rows:
    """What `kvoffload profile` shows."""
    facts, noisy = measured.extra, measured.extra.get("noisy", [])
    rows = [
        ("link", measured.link_name),
        *_link_rows(measured),
        *_product_rows(measured),
        ("attention", _attention(measured.attention)),
        ("device memory", f"{_rate(measured.quantity('device_copy_bytes_per_s'))} copying within it, "
         f"{_memory(measured.device_memory_bytes)}"),
    ]  # fmt: skip
    if "host_read_bytes_per_s" in measured.quantities:
        rows.append(("host memory", f"{_rate(measured.quantity('host_read_bytes_per_s'))} reading it, all threads"))
    for name, curve in measured.curves.items():
        if name.startswith("host_attention_") and curve.points:
            rows.append((f"attention on the host, {name.removeprefix('host_attention_')}", _attention(curve)))
    rows.append(
        (
            "host time",
            f"{_duration(measured.quantity('host_s_per_layer'))} per layer, "
            f"{_duration(measured.quantity('host_s_per_chunk'))} per chunk, "
            f"{_duration(measured.quantity('gap_s'))} between steps",
        )
    )
    rows.append(("energy", _energy(measured)))
    more = len(noisy) - MAX_NOISY_SHOWN
    shown = "; ".join(noisy[:MAX_NOISY_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    rows.append(("noisy", shown or "nothing"))
    load, took_s = facts.get("other_cpu_load_fraction"), facts.get("measured_in_s")
    if took_s is not None:
        busy = "" if load is None else f", while other work kept {load:.2f} of the CPUs busy"
        rows.append(("measured in", f"{took_s:g} s, {facts.get('thoroughness', 'quick')}{busy}"))
    return rows + (fact_rows(facts["environment"]) if "environment" in facts else [])


def fact_rows(facts: dict[str, Any]) -> Rows:
    """What `kvoffload env` shows, and `profile` with it."""
    if facts["locked_memory_is_unlimited"]:
        locked = "no limit"
    else:
        locked = f"{_memory(facts['locked_memory_limit_bytes'])} may be locked (ulimit -l)"
    threads = counted(facts["torch_threads"], "thread")
    versions = ", ".join(f"{name} {version or NOT_AVAILABLE}" for name, version in facts["versions"].items())
    return [
        ("GPU", facts["gpu_name"] or NOT_AVAILABLE),
        ("GPU memory", _memory(facts["gpu_memory_bytes"])),
        ("driver, CUDA", f"{facts['driver_version'] or NOT_AVAILABLE}, {facts['cuda_version'] or NOT_AVAILABLE}"),
        ("PCIe generation", _of_maximum(facts["pcie_generation"], facts["pcie_generation_max"])),
        ("PCIe lanes", _of_maximum(facts["pcie_width"], facts["pcie_width_max"])),
        ("NUMA node of the GPU", _shown(facts["gpu_numa_node"])),
        ("CPU", f"{facts['cpu_name']}, {facts['num_cpus']} usable, {threads} in PyTorch"),
        ("memory", f"{_memory(facts['memory_bytes'])}, {_memory(facts['memory_available_bytes'])} free"),
        ("container's memory limit", _memory(facts["cgroup_memory_limit_bytes"])),
        ("pinned memory", locked + (", WSL2 pins less than there is" if facts["is_wsl"] else "")),
        ("versions", versions),
    ]


def _memory(num_bytes: int | None) -> str:
    return NOT_AVAILABLE if num_bytes is None else gib(num_bytes)


def _link_rows(measured: HardwareProfile) -> Rows:
    """Every way over the link that was measured or given."""
    curves = measured.link_curves()
    if "h2d" not in curves:
        return [("H2D, D2H", "no speed: copies are not paced (give the emulated link one with --link-gb-per-s)")]
    memory = "emulated" if measured.emulated_link else "pinned" if measured.extra.get("pinned") else "pageable"
    if "datasheet" in measured.extra:
        memory = "pinned"
    titles = {
        "h2d": f"{memory} H2D",
        "d2h": f"{memory} D2H",
        "both": f"{memory} both at once",
        "h2d_pageable": "pageable H2D",
        "d2h_pageable": "pageable D2H",
        "both_pageable": "pageable both at once",
        "h2d_achieved": "emulated H2D, achieved",
        "d2h_achieved": "emulated D2H, achieved",
        "both_achieved": "emulated both at once, achieved",
    }
    return [(titles[name], _copies(name, curve)) for name, curve in curves.items()]


def _copies(name: str, curve: Curve) -> str:
    """Bandwidth and latency of the line through the copies."""
    found = curve.line_quantities(name)
    latency, error = found[f"{name}_latency_s"], found[f"{name}_line_error_fraction"].value
    each_way = " each way" if name.startswith("both") else ""
    text = f"{_rate(found[f'{name}_bytes_per_s'])}{each_way}, latency {_time(latency.value)}"
    if curve.provenance != "measured":
        return f"{text} ({curve.provenance})"
    sizes = f"{_size(curve.points[0].x[0])} to {_size(curve.points[-1].x[0])}"
    if error <= MAX_LINE_ERROR_FRACTION:
        return f"{text} ({sizes})"
    last = curve.points[-1].x[0]
    return f"{text} ({sizes}, a line within {100 * error:.0f} %; {_gb_per_s(curve.rate(last))} at {_size(last)})"


def _product_rows(measured: HardwareProfile) -> Rows:
    """The fastest product with a square weight, and the fastest with the shape of recomputed K and V or an MLP."""
    points = measured.gemm.points
    if not points:
        return []
    rows = []
    for title, some in (
        ("matrix product", [point for point in points if point.x[1] == point.x[2]]),
        ("at recompute, MLP shapes", [point for point in points if point.x[1] != point.x[2]]),
    ):
        if some:
            best = max(some, key=lambda point: point.x[0] * point.x[1] * point.x[2] / point.seconds)
            m, n, k = (int(size) for size in best.x)
            rate = 2 * m * n * k / best.seconds  # multiply-add
            spread = _spread(best.spread_fraction) if measured.gemm.provenance == "measured" else ""
            rows.append((title, f"{_flops(rate)}{spread} at {m}x{n}x{k}, {measured.dtype}"))
    return rows


def _attention(curve: Curve) -> str:
    if not curve.points:
        return NOT_AVAILABLE
    last = curve.points[-1]
    spread = _spread(last.spread_fraction) if curve.provenance == "measured" else ""
    return f"{_gb_per_s(last.x[0] / last.seconds)}{spread} over {_size(last.x[0])} of K/V"


def _energy(measured: HardwareProfile) -> str:
    parts = []
    for name, what in (("gemm", "matrix products"), ("h2d", "copies to the device")):
        if (power := measured.quantities.get(f"{name}_power_w")) is not None:
            parts.append(f"{power.value:.0f} W{_spread(power.spread_fraction)} for {what}")
    return ", ".join(parts) or measured.extra.get("energy") or "not measured"


def _rate(quantity: Quantity) -> str:
    spread = quantity.spread_fraction if quantity.provenance == "measured" else None
    return f"{_gb_per_s(quantity.value)}{_spread(spread)}"


def _gb_per_s(bytes_per_s: float) -> str:
    """Small rates with the digits they need."""
    value = bytes_per_s / 1e9
    digits = 1 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:.{digits}f} GB/s"


def _flops(value: float) -> str:
    return f"{value / 1e12:.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.0f} GFLOP/s"


def _duration(quantity: Quantity) -> str:
    label = "" if quantity.provenance == "measured" else f" ({quantity.provenance})"
    spread = quantity.spread_fraction if quantity.provenance == "measured" else None
    return f"{_time(quantity.value)}{_spread(spread)}{label}"


def _time(seconds: float) -> str:
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.0f} us" if seconds >= 1e-5 or seconds < 5e-8 else f"{seconds * 1e6:.1f} us"


def _spread(fraction: float | None) -> str:
    """Half the distance from p20 to p80, on either side of the median."""
    if fraction is None:
        return ""
    percent = 50 * fraction
    return f" ± {percent:.0f} %" if percent >= 0.95 else f" ± {max(percent, 0.1):.1f} %"


def _size(num_bytes: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:g} {name}"
    return f"{num_bytes / 2**10:g} KiB"


def _of_maximum(current: int | None, maximum: int | None) -> str:
    if current is None:
        return NOT_AVAILABLE
    return f"{current} in use, {_shown(maximum)} at most"


def _shown(value: object) -> str:
    return NOT_AVAILABLE if value is None else str(value)
