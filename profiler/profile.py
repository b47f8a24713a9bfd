"""One hardware profile: every curve of this machine and its link, measured in one go.

Owns the order of the measurements and the labels on the result. Does not own their budgets (`budget`), how each is done
(`copies`, `compute`, `host_memory`, `host`, `energy`) nor where profiles are kept (`stored`).

Timeline (a GPU, or two CPU cores), every part bounded in wall-clock time:

                          quick     full
    link                  2.5 s     9 s     copies up to 64 MiB, in full up to 1 GiB: H2D, D2H, both at once
    pageable              -         9 s     the same from memory that is not pinned
    emulated link         1 s       3 s     in place of both: what copies over it achieve
    compute               5 s       12 s    device copy, attention over sizes, matrix products over shapes
    forms of fewer bytes  1.2 s     3 s     attention that decodes K and V while it reads them
    host memory           1.2 s     4 s     reading it, attention over K and V in it
    energy                -         6 s     GPUs that count it: matrix products, copies
    host                  0.6 s     1 s     seconds to issue a chunk and a layer
                          < 15 s    < 60 s  with allocations and, on a GPU, the kernels' compilation

PCIe facts are read right after the link, while it is awake. What makes a profile valid: backend and operations are
those of the runtime; every number is the median of trials that follow a warm-up; those whose trials disagree are listed
in `extra["noisy"]` and told, and so is a CPU that other processes kept busy (a loaded machine can be slow without being
noisy). The speed of an emulated link is not measured but given: its curves are built from bandwidth and latency with
provenance "assumed", beside them stands what was achieved, and an unpaced link has neither. The result describes no
model.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import time
from collections.abc import Iterable

import torch

from kvoffload.backend import Backend, CudaBackend, EmulatedBackend
from kvoffload.config import EmulatedLink
from kvoffload.errors import ConfigError, ProfileError
from kvoffload.machine import system_memory
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.quantities import Quantity
from kvoffload.planning.placement import FormName
from kvoffload.profiler import energy, environment
from kvoffload.profiler.budget import BUDGETS, Progress, ProgressParts, Thoroughness, lengths
from kvoffload.profiler.compute import measure_compute
from kvoffload.profiler.copies import given_curves, measure_copies
from kvoffload.profiler.decoding import measure_decoding
from kvoffload.profiler.device import Link, default_dtype, device_memory_bytes, device_name, machine_key, resolve_device
from kvoffload.profiler.host import measure_host_s_per_chunk, measure_host_s_per_layer
from kvoffload.profiler.host_memory import measure_host_memory
from kvoffload.units import counted

logger = logging.getLogger(__name__)

MAX_OTHER_LOAD_FRACTION = 0.25  # of all CPUs, by other processes
# Of measuring; since 2 a chunk's host time is that of all its calls, before only of queueing its copy. Since 3 a GPU's
# rates have no launches in them, and chunks of either form are timed apart. Since 4 decoding of forms of fewer bytes is
# measured.
METHOD = 4
MAX_NAMED = 3  # noisy points in a message


def measure_hardware(
    device: torch.device | str = "auto",
    link: Link = "auto",
    *,
    dtype: torch.dtype | None = None,
    thoroughness: Thoroughness = "quick",
    progress: Progress | None = None,
) -> HardwareProfile:
    """Measure this machine: in under 15 seconds what plans need, in under 60 everything.

    Args:
        device: what computes; "auto" is the GPU if there is one and `link` is "auto", else the CPU.
        link: "auto" measures the link of a GPU, and is an unpaced emulated link on a CPU; the speed of an
            `EmulatedLink` is taken as it is given, and what copies over it achieve is measured beside.
        dtype: of the matrix products and attention; by default bfloat16 on a GPU that has it, float16 on one that
            has not, float32 on a CPU.
        thoroughness: "quick", or "full": also pageable memory, copies up to 1 GiB and energy, and longer trials.
        progress: called with the part that begins and the share done.

    Returns:
        The profile, not stored anywhere.

    Raises:
        ConfigError: an emulated link was asked for on a GPU, or the device cannot be used.
    """
    if thoroughness not in BUDGETS:
        raise ConfigError(f"thoroughness must be 'quick' or 'full', got {thoroughness!r}")
    budget = BUDGETS[thoroughness]
    device = resolve_device(device, link)
    dtype = dtype or default_dtype(device)
    meter = energy.open_meter(device)
    lengths_s = lengths(
        budget,
        has_link=device.type == "cuda",
        is_paced=isinstance(link, EmulatedLink) and link.h2d_gb_per_s is not None,
        has_meter=meter.missing is None,
    )
    steps = ProgressParts(progress or (lambda _what, _share: None), lengths_s)
    began, cpu_before = time.perf_counter(), environment.cpu_seconds()
    backend = _backend(device, link)
    with contextlib.ExitStack() as stack:
        stack.callback(backend.close)
        if device.type == "cuda":
            stack.callback(torch.cuda.empty_cache)
            stack.enter_context(torch.cuda.device(device))
        copies = measure_copies(backend, budget, steps)
        facts = environment.environment(device)  # while the link is awake
        steps.begin("matrix products and attention")
        compute = measure_compute(device, dtype, budget_s=budget.compute_s, progress=steps.within)
        steps.begin("forms of fewer bytes")
        decoding = measure_decoding(device, dtype, budget_s=budget.decoding_s)
        steps.begin("host memory")
        host_memory = measure_host_memory(budget_s=budget.host_memory_s)
        steps.begin("energy")
        powers = energy.measure_energy(backend, dtype, meter, budget.stretch_s) if budget.stretch_s else {}
        steps.begin("host")
        forms: dict[str, tuple[FormName, ...]] = {"host_s_per_chunk": ("activation", "kv")}
        if not backend.emulated:
            forms |= {"host_s_per_activation_chunk": ("activation",), "host_s_per_kv_chunk": ("kv",)}
        host = {
            name: measure_host_s_per_chunk(backend, forms=chosen, budget_s=budget.host_s / len(forms))
            for name, chosen in forms.items()
        } | {
            "host_s_per_layer": measure_host_s_per_layer(device, budget_s=budget.host_s),
        }
    steps.done()
    measured_in_s = time.perf_counter() - began
    everything_s, ours_s = (now - then for now, then in zip(environment.cpu_seconds(), cpu_before, strict=True))
    other_load = (everything_s - ours_s) / measured_in_s / (os.cpu_count() or 1)
    noisy = [*copies.noisy, *compute.noisy, *host_memory.noisy]
    noisy += [f"{name} (spread {trials.spread_fraction:.2f})" for name, trials in host.items() if not trials.is_valid]
    _tell(noisy, other_load if device.type == "cpu" else 0.0)
    memory_bytes = device_memory_bytes(device)
    return HardwareProfile(
        device_name=device_name(device),
        link_name=_link_name(backend, facts),
        emulated_link=backend.emulated,
        key=machine_key(device),
        h2d=copies.h2d,
        d2h=copies.d2h,
        gemm=compute.gemm,
        attention=compute.attention,
        device_copy_bytes_per_s=compute.device_copy.value,
        device_memory_bytes=memory_bytes,
        dtype=str(dtype).removeprefix("torch."),
        host_s_per_layer=host["host_s_per_layer"].seconds,
        host_s_per_chunk=host["host_s_per_chunk"].seconds,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        curves=copies.others | host_memory.attention,
        quantities={
            "device_copy_bytes_per_s": compute.device_copy,
            "device_memory_bytes": Quantity(value=memory_bytes, unit="bytes"),
            "host_read_bytes_per_s": host_memory.read,
        }
        | {
            name: Quantity(value=trials.seconds, unit="s", spread_fraction=trials.spread_fraction)
            for name, trials in host.items()
        }
        | powers
        | decoding,
        extra={
            "thoroughness": thoroughness,
            "pinned": copies.pinned,
            "energy": None if powers else _why_no_energy(meter),
            "noisy": noisy,
            "measured_in_s": round(measured_in_s, 2),
            "other_cpu_load_fraction": None if math.isnan(other_load) else round(max(0.0, other_load), 3),
            "host_memory_bytes": system_memory.usable_bytes(),
            "environment": facts,
        },
        method=METHOD,
    )


def with_link(profile: HardwareProfile, link: EmulatedLink) -> HardwareProfile:
    """The same machine behind an emulated link: its speed is given, so nothing needs measuring.

    Raises:
        ProfileError: the profile is that of a GPU's own link.
    """
    if not profile.emulated_link:
        raise ProfileError(
            f"{profile.device_name} has a link of its own ({profile.link_name}), an emulated one cannot replace it"
        )
    speed = "unpaced" if link.h2d_gb_per_s is None else f"{link.h2d_gb_per_s:g} GB/s"
    return profile.behind(f"emulated {speed}", *given_curves(link))


def some_of(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    listed = list(names)
    more = len(listed) - MAX_NAMED
    return "; ".join(listed[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _why_no_energy(meter: energy.EnergyMeter) -> str:
    if meter.missing is None:
        return "not measured: that is part of a full profile"
    return f"not available: {meter.missing}"


def _tell(noisy: list[str], other_load: float) -> None:
    if noisy or other_load > MAX_OTHER_LOAD_FRACTION:
        logger.warning(
            "the measurement may be off, repeat it without other work: %.2f of the CPUs were busy with that, and the "
            "trials of %s disagree%s",
            max(0.0, other_load),
            counted(len(noisy), "point"),
            f" ({some_of(noisy)})" if noisy else "",
        )


def _backend(device: torch.device, link: Link) -> Backend:
    if device.type == "cuda":
        return CudaBackend(device)
    return EmulatedBackend(link if isinstance(link, EmulatedLink) else EmulatedLink())


def _link_name(backend: Backend, facts: dict[str, object]) -> str:
    generation, width = facts["pcie_generation"], facts["pcie_width"]
    if backend.emulated or generation is None or width is None:
        return backend.link_name
    return f"PCIe {generation}.0 x{width}"
