"""A link in simulated time: what measuring does with it is the same on every machine, and takes none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from kvoffload.backend import Backend, LinkUse
from kvoffload.backend.base import HostBuffer
from kvoffload.timeline import Lane, Span


class ReplayedLink(Backend):
    """Two queues of copies that take `latency_s + bytes / bytes_per_s` on a clock of their own; no byte is held.

    Args:
        bytes_per_s: by direction.
        latency_s: of each copy.
        is_shared: both directions use one queue.
        is_full: the device has no memory left.
        can_pin: whether host memory is pinned; copies to and from pageable memory hold the host.
    """

    device = torch.device("meta")
    link_name = "replayed"
    emulated = False

    def __init__(
        self,
        bytes_per_s: dict[str, float],
        latency_s: float = 0.0,
        *,
        is_shared: bool = False,
        can_pin: bool = True,
        is_full: bool = False,
    ) -> None:
        self.bytes_per_s, self.latency_s = bytes_per_s, latency_s
        self.is_shared, self.can_pin, self.is_full = is_shared, can_pin, is_full
        self.now_s = 0.0
        self.free_at_s = {"h2d": 0.0, "d2h": 0.0}
        self.slowed: list[float] = []  # factors on the copies to come, taken in turn
        self.host_bytes: list[int] = []
        self.num_held = 0
        self.offsets: set[int] = set()
        self.largest_bytes = 0

    def clock(self) -> float:
        """Seconds of this link's time."""
        return self.now_s

    def _copy(self, way: str, on_host: torch.Tensor) -> None:
        queue = "h2d" if self.is_shared else way
        self.offsets.add(on_host.storage_offset())
        self.largest_bytes = max(self.largest_bytes, on_host.numel())
        seconds = self.latency_s + on_host.numel() / self.bytes_per_s[way]
        if self.slowed:
            seconds *= self.slowed.pop(0)
        self.free_at_s[queue] = max(self.free_at_s[queue], self.now_s) + seconds
        if not self.can_pin:
            self.now_s = self.free_at_s[queue]

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        self.host_bytes.append(num_bytes)
        self.num_held += 1
        return HostBuffer(_no_memory(num_bytes), num_bytes if self.can_pin else 0)

    def release_host(self, buffer: HostBuffer) -> None:
        self.num_held -= 1

    def allocate_device(self, num_bytes: int) -> torch.Tensor:
        if self.is_full:
            raise torch.OutOfMemoryError(f"{num_bytes} bytes are too many")
        return _no_memory(num_bytes)

    def copy_to_device(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Any]) -> None:
        self._copy("h2d", src)

    def copy_to_host(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Any]) -> None:
        self._copy("d2h", dst)

    def synchronize(self) -> None:
        self.now_s = max(self.now_s, *self.free_at_s.values())

    def compute_waits(self, event: Any) -> None: ...

    def release(self, *buffers: torch.Tensor) -> None: ...

    def link_use(self, direction: Literal["h2d", "d2h"]) -> LinkUse:
        return LinkUse(0, 0.0, 0)

    def start_span(self, name: str) -> None: ...

    def end_span(self, span: Any) -> None: ...

    def span_seconds(self, name: str) -> float:
        return 0.0

    def start_recording(self) -> None: ...

    def stop_recording(self, *, keep: bool = True) -> None: ...

    def recorded(self) -> list[Span]:
        return []

    def mark(self, lane: Lane) -> None: ...

    def close(self) -> None: ...


def _no_memory(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="meta")
