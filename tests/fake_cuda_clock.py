"""Time on a CUDA device that is not there: what launches cost the host, and what the device takes, by given speeds.

Owns the clock of the host and when each stream is through with what was queued. Does not own the order in which a fake
stream makes its copies, nor what is computed: those are real, this is arithmetic, and the same on any machine.

    host      every launch takes `launch_s`; whoever waits goes on when the device is there, `wait_s` later
    stream    work begins when the host has launched it and the work before it is done
    event     completes when its stream comes to it
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Of a device, its link and its host."""

    launch_s: float = 80e-6
    wait_s: float = 0.0
    memory_bytes_per_s: float = 1e9
    flops_per_s: float = 1e10
    link_bytes_per_s: float = 1e8

    def operation_s(self, tensors: Iterable[torch.Tensor]) -> float:
        """Of one that reads or writes each of them once."""
        return sum(one.numel() * one.element_size() for one in tensors) / self.memory_bytes_per_s

    def product_s(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> float:
        """Of [m, k] x [k, n]."""
        flops = 2 * x.shape[0] * x.shape[1] * weight.shape[1]  # multiply and add
        return max(flops / self.flops_per_s, self.operation_s((x, weight, out)))


class Clock:
    """Seconds since the device was made."""

    def __init__(self, speeds: Speeds) -> None:
        self.speeds = speeds
        self.host_s = self.host_busy_s = 0.0
        self.free_s: dict[int, float] = defaultdict(float)  # by stream

    def now(self) -> float:
        """As the host reads it, which takes a moment."""
        self._work(1e-8)
        return self.host_s

    def busy(self) -> float:
        """As a thread's processor time."""
        self._work(1e-8)
        return self.host_busy_s

    def sleep(self, seconds: float) -> None:
        self.host_s += seconds

    def launch(self, stream: int, seconds: float) -> None:
        """The device has that long to do in a stream."""
        self._work(self.speeds.launch_s)
        self.free_s[stream] = max(self.free_s[stream], self.host_s) + seconds

    def event_s(self, stream: int) -> float:
        """When the stream comes to an event recorded now."""
        return max(self.free_s[stream], self.host_s)

    def stream_waits(self, stream: int, until_s: float) -> None:
        self.free_s[stream] = max(self.free_s[stream], until_s)

    def host_waits(self, until_s: float | None = None) -> None:
        """For a moment, or for everything."""
        self.host_s = max(self.host_s, max(self.free_s.values(), default=0.0) if until_s is None else until_s)
        self.host_s += self.speeds.wait_s

    def _work(self, seconds: float) -> None:
        self.host_s += seconds
        self.host_busy_s += seconds

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """It is what `time` tells."""
        patch.setattr(time, "perf_counter", self.now)
        patch.setattr(time, "thread_time", self.busy)
        patch.setattr(time, "sleep", self.sleep)
