"""Decoding with Hugging Face models whose KV cache does not fit on the GPU.

Names are imported when first used: PyTorch and transformers take seconds, and `kvoffload --help` needs neither.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvoffload.api import generate, load, measure_hardware, offload, plan, release
    from kvoffload.config import EmulatedLink, OffloadConfig
    from kvoffload.errors import (
        ConfigError,
        HostMemoryError,
        InfeasiblePlanError,
        KVOffloadError,
        ProfileError,
        UnsupportedModelError,
    )
    from kvoffload.machine.hardware_profile import HardwareProfile
    from kvoffload.model.model_shape import model_shape
    from kvoffload.model.shape import ModelShape
    from kvoffload.planning.plan import Plan
    from kvoffload.planning.workload import Workload
    from kvoffload.session.session import Session
    from kvoffload.session.stats import GenerationStats

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "EmulatedLink",
    "GenerationStats",
    "HardwareProfile",
    "HostMemoryError",
    "InfeasiblePlanError",
    "KVOffloadError",
    "ModelShape",
    "OffloadConfig",
    "Plan",
    "ProfileError",
    "Session",
    "UnsupportedModelError",
    "Workload",
    "generate",
    "load",
    "measure_hardware",
    "model_shape",
    "offload",
    "plan",
    "release",
]
_HOME = {
    "api": ("generate", "load", "measure_hardware", "offload", "plan", "release"),
    "config": ("EmulatedLink", "OffloadConfig"),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "machine.hardware_profile": ("HardwareProfile",),
    "model.model_shape": ("model_shape",),
    "session.session": ("Session",),
    "session.stats": ("GenerationStats",),
    "model.shape": ("ModelShape",),
    "planning.plan": ("Plan",),
    "planning.workload": ("Workload",),
}
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
