"""Which backend serves a model: by the device it is on and the link that was asked for."""

from __future__ import annotations

import torch

from kvoffload.backend.base import Backend
from kvoffload.backend.cuda import CudaBackend
from kvoffload.backend.emulated import EmulatedBackend
from kvoffload.config import EmulatedLink, OffloadConfig
from kvoffload.errors import ConfigError


def backend_for(device: torch.device, config: OffloadConfig) -> Backend:
    """The backend for a model on `device`.

    Raises:
        ConfigError: an emulated link with a model on a GPU, or a device that is neither CUDA nor the CPU.
    """
    if isinstance(config.link, EmulatedLink):
        if device.type != "cpu":
            raise ConfigError(f"an emulated link needs the model on the CPU, it is on {device}")
        return EmulatedBackend(config.link)
    if device.type == "cuda":
        return CudaBackend(device)
    if device.type == "cpu":
        return EmulatedBackend(EmulatedLink())
    raise ConfigError(f"the model is on {device}; only CUDA devices and the CPU (with an emulated link) are supported")
