"""Which device is measured, what it is called, and what a stored profile of it is valid for.

Owns names and choices. Does not measure.
"""

from __future__ import annotations

from typing import Literal

import torch

from kvoffload.config import EmulatedLink
from kvoffload.errors import ConfigError
from kvoffload.machine import system_memory
from kvoffload.profiler import environment, readiness

Link = Literal["auto"] | EmulatedLink


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
        raise ConfigError(f"{readiness.why_no_cuda()}; or use device='cpu' (--device cpu)")
    if resolved.type == "cuda" and isinstance(link, EmulatedLink):
        raise ConfigError(
            "an emulated link has the CPU as its device; use device='cpu' (--device cpu) or link='auto' (no "
            "--link-gb-per-s)"
        )
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
    return system_memory.usable_bytes()


def default_dtype(device: torch.device) -> torch.dtype:
    """What is measured unless something else is asked for."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
