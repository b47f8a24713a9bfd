"""Where copies and compute are ordered: CUDA streams, an emulated link, or a checker around either."""

from kvoffload.backend.base import Backend, Event, LinkUse, Pace
from kvoffload.backend.checking import CheckingBackend, RaceError
from kvoffload.backend.choice import backend_for
from kvoffload.backend.clock import DeviceClock, Stretch
from kvoffload.backend.cuda import CudaBackend
from kvoffload.backend.emulated import EmulatedBackend
from kvoffload.backend.pinned import free_pinned

__all__ = [
    "Backend",
    "CheckingBackend",
    "CudaBackend",
    "DeviceClock",
    "EmulatedBackend",
    "Event",
    "LinkUse",
    "Pace",
    "RaceError",
    "Stretch",
    "backend_for",
    "free_pinned",
]
