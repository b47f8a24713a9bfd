"""Decoding with Hugging Face models whose KV cache does not fit on the GPU."""

import logging

from kvoffload.api import generate, measure_hardware, offload, plan
from kvoffload.config import EmulatedLink, OffloadConfig
from kvoffload.errors import (
    ConfigError,
    HostMemoryError,
    InfeasiblePlanError,
    KVOffloadError,
    ProfileError,
    UnsupportedModelError,
)
from kvoffload.session import Session
from kvoffload.stats import GenerationStats
from kvoffload.types import HardwareProfile, Plan, Workload

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "EmulatedLink",
    "GenerationStats",
    "HardwareProfile",
    "HostMemoryError",
    "InfeasiblePlanError",
    "KVOffloadError",
    "OffloadConfig",
    "Plan",
    "ProfileError",
    "Session",
    "UnsupportedModelError",
    "Workload",
    "generate",
    "measure_hardware",
    "offload",
    "plan",
]
logging.getLogger(__name__).addHandler(logging.NullHandler())
