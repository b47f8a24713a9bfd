"""One hardware profile: every curve of this machine and its link, measured in one go.

Owns the order of the measurements, their shares of the time and the labels on the result. Does not own how each is
done (`link`, `compute`, `host`) nor where profiles are kept (`stored`).

Timeline (a GPU, or two CPU cores; every part is bounded in wall-clock time, all of it under 20 s):

    link      up to 3 s    copies in both directions; PCIe facts are read right after, while the link is awake
    compute   up to 9 s    device copy, attention over sizes, matrix products over shapes
    host      up to 1 s    seconds to issue a chunk and a layer

What makes it valid: the backend is the one the runtime uses; every number is the median of trials that follow a
warm-up; those whose trials disagree are listed in `extra["noisy"]` and told, and so is a CPU that other processes kept
busy (a loaded machine can be slow without being noisy). The speed of an emulated link is not measured but given: its
curves are built from bandwidth and latency with provenance "assumed", and an unpaced link has none. The result
describes no model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Literal

import torch

from kvoffload.backend import Backend, CudaBackend, EmulatedBackend
from kvoffload.config import EmulatedLink
from kvoffload.errors import ConfigError, ProfileError
from kvoffload.profiler import environment
from kvoffload.profiler.compute import measure_compute
from kvoffload.profiler.host import measure_host_s_per_chunk, measure_host_s_per_layer
from kvoffload.profiler.link import LinkCurves, given_curve, measure_link
from kvoffload.types import Curve, HardwareProfile

logger = logging.getLogger(__name__)

LINK_BUDGET_S = 3.0
COMPUTE_BUDGET_S = 9.0
MAX_OTHER_LOAD_FRACTION = 0.25  # of all CPUs, by other processes
ASSUMED_GAP_S = 2e-3  # between the last attention of a step and the first of the next, as seen with transformers
Progress = Callable[[str, float], None]  # what is being measured, share done 0..1
Link = Literal["auto"] | EmulatedLink


def measure_hardware(
    device: torch.device | str = "auto",
    link: Link = "auto",
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> HardwareProfile:
    """Measure this machine, in under 20 seconds.

    Args:
        device: what computes; "auto" is the GPU if there is one and `link` is "auto", else the CPU.
        link: "auto" measures the link of a GPU, and is an unpaced emulated link on a CPU; an `EmulatedLink` is taken
            as it is given.
        dtype: of the matrix products and attention; by default bfloat16 on a GPU that has it, float16 on one that
            has not, float32 on a CPU.
        progress: called with the part that begins and the share done.

    Returns:
        The profile, not stored anywhere.

    Raises:
        ConfigError: an emulated link was asked for on a GPU, or the device cannot be used.
    """
    tell = progress or (lambda _what, _share: None)
    device = resolve_device(device, link)
    dtype = dtype or _default_dtype(device)
    began, cpu_before = time.perf_counter(), environment.cpu_seconds()
    backend = _backend(device, link)
    curves: LinkCurves | None = None
    with contextlib.ExitStack() as stack:
        stack.callback(backend.close)
        if device.type == "cuda":
            stack.callback(torch.cuda.empty_cache)
            stack.enter_context(torch.cuda.device(device))
        tell("link", 0.0)
        if not backend.emulated:
            curves = measure_link(backend, budget_s=LINK_BUDGET_S)
        facts = environment.environment(device)  # while the link is awake
        tell("matrix products and attention", 0.2)
        compute = measure_compute(device, dtype, budget_s=COMPUTE_BUDGET_S)
        tell("host", 0.9)
        per_chunk = measure_host_s_per_chunk(backend)
        per_layer = measure_host_s_per_layer(device)
    tell("done", 1.0)
    measured_in_s = time.perf_counter() - began
    everything_s, ours_s = (now - then for now, then in zip(environment.cpu_seconds(), cpu_before, strict=True))
    other_load = (everything_s - ours_s) / measured_in_s / (os.cpu_count() or 1)
    noisy = [*(curves.noisy if curves else ()), *compute.noisy]
    if noisy or (device.type == "cpu" and other_load > MAX_OTHER_LOAD_FRACTION):
        logger.warning(
            "the measurement may be off, repeat it without other work: %.2f of the CPUs were busy with that, and the "
            "trials of %d points disagree%s",
            max(0.0, other_load),
            len(noisy),
            f" ({'; '.join(noisy)})" if noisy else "",
        )
    profile = HardwareProfile(
        device_name=device_name(device),
        link_name=_link_name(backend, facts),
        emulated_link=backend.emulated,
        key=machine_key(device),
        h2d=curves.h2d if curves else None,
        d2h=curves.d2h if curves else None,
        gemm=compute.gemm,
        attention=compute.attention,
        device_copy_bytes_per_s=compute.device_copy_bytes_per_s,
        device_memory_bytes=device_memory_bytes(device),
        dtype=str(dtype).removeprefix("torch."),
        host_s_per_layer=per_layer.seconds,
        host_s_per_chunk=per_chunk.seconds,
        gap_s=ASSUMED_GAP_S,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        extra={
            "provenance": {
                "device_copy_bytes_per_s": "measured",
                "host_s_per_layer": "measured",
                "host_s_per_chunk": "measured",
                "gap_s": "assumed",
            },
            "spread_fraction": {
                "host_s_per_layer": per_layer.spread_fraction,
                "host_s_per_chunk": per_chunk.spread_fraction,
            },
            "pinned": curves.pinned if curves else False,
            "noisy": noisy,
            "measured_in_s": round(measured_in_s, 2),
            "other_cpu_load_fraction": None if math.isnan(other_load) else round(max(0.0, other_load), 3),
            "host_memory_bytes": environment.memory_bytes(),
            "environment": facts,
        },
    )
    return with_link(profile, link) if isinstance(link, EmulatedLink) else profile


def was_disturbed(profile: HardwareProfile) -> bool:
    """Whether other work slowed the measurement of a CPU, perhaps by far, so that it should not be kept."""
    load = profile.extra.get("other_cpu_load_fraction")
    return profile.emulated_link and load is not None and load > MAX_OTHER_LOAD_FRACTION


def with_link(profile: HardwareProfile, link: EmulatedLink) -> HardwareProfile:
    """The same machine behind an emulated link: its speed is given, so nothing needs measuring.

    Raises:
        ProfileError: the profile is that of a GPU's own link.
    """
    if not profile.emulated_link:
        raise ProfileError(
            f"{profile.device_name} has a link of its own ({profile.link_name}), an emulated one cannot replace it"
        )
    d2h_gb_per_s = link.d2h_gb_per_s if link.d2h_gb_per_s is not None else link.h2d_gb_per_s
    speed = "unpaced" if link.h2d_gb_per_s is None else f"{link.h2d_gb_per_s:g} GB/s"
    return dataclasses.replace(
        profile,
        link_name=f"emulated {speed}",
        h2d=_given(link.h2d_gb_per_s, link.latency_s),
        d2h=_given(d2h_gb_per_s, link.latency_s),
    )


def _given(gb_per_s: float | None, latency_s: float) -> Curve | None:
    return None if gb_per_s is None else given_curve(gb_per_s * 1e9, latency_s)


def resolve_device(device: torch.device | str, link: Link) -> torch.device:
    """The device "auto" stands for; checks that it and the link go together.

    Raises:
        ConfigError: no such device, or an emulated link beside a GPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and link == "auto" else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} is no device; use 'auto', 'cuda', 'cuda:1' or 'cpu'") from error
    if resolved.type not in ("cuda", "cpu"):
        raise ConfigError(f"cannot measure a {resolved.type} device; use 'cuda' or 'cpu'")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is available to PyTorch; use device='cpu', or check the driver")
    if resolved.type == "cuda" and isinstance(link, EmulatedLink):
        raise ConfigError("an emulated link has the CPU as its device; use device='cpu' or link='auto'")
    return resolved


def device_name(device: torch.device) -> str:
    """The name in a profile: the GPU's, or the processor's with the threads PyTorch computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    num_threads = torch.get_num_threads()
    return f"{environment.cpu_name()}, {num_threads} thread{'s' if num_threads > 1 else ''}"


def machine_key(device: torch.device) -> str:
    """What a stored profile is valid for: device, driver and PyTorch version."""
    driver = environment.gpu_facts(device)["driver_version"] if device.type == "cuda" else None
    return f"{device_name(device)} | driver {driver or 'none'} | torch {torch.__version__}"


def device_memory_bytes(device: torch.device) -> int:
    """All memory of a GPU; on a CPU, where the "device" is part of the host, what this process may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return environment.memory_bytes()


def _default_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _backend(device: torch.device, link: Link) -> Backend:
    if device.type == "cuda":
        return CudaBackend(device)
    return EmulatedBackend(link if isinstance(link, EmulatedLink) else EmulatedLink())


def _link_name(backend: Backend, facts: dict[str, object]) -> str:
    generation, width = facts["pcie_generation"], facts["pcie_width"]
    if backend.emulated or generation is None or width is None:
        return backend.link_name
    return f"PCIe {generation}.0 x{width}"
