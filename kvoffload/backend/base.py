"""The interface between the transfer engine and the hardware: three ordered queues and the events between them.

A backend has a compute queue (the stream PyTorch launches on), a host-to-device queue (H2D) and a device-to-host
queue (D2H). Work in one queue runs in order; work in different queues is ordered only through events. An event is
always recorded when it is created, so nobody can wait for one that has not been recorded yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch

Event = Any  # a torch.cuda.Event, or the event type of the backend that made it
Queue = Literal["compute", "h2d", "d2h"]


class LinkUse(NamedTuple):
    """What one direction of the link has done since the backend was created."""

    copied_bytes: int
    busy_s: float  # time during which a copy was in progress
    copies: int

    def since(self, earlier: LinkUse) -> LinkUse:
        """The use between two readings."""
        return LinkUse(
            self.copied_bytes - earlier.copied_bytes, self.busy_s - earlier.busy_s, self.copies - earlier.copies
        )


class HostBuffer(NamedTuple):
    """Host memory the link can read and write."""

    tensor: torch.Tensor  # uint8, one-dimensional
    pinned_bytes: int  # 0 where the memory is pageable


class Backend(ABC):
    """Owns the queues and raw memory. Does not know what the bytes mean."""

    device: torch.device
    link_name: str
    emulated: bool

    @abstractmethod
    def allocate_host(self, num_bytes: int) -> HostBuffer:
        """Host memory that stays until `close`, pinned where the backend can."""

    @abstractmethod
    def allocate_device(self, num_bytes: int) -> torch.Tensor:
        """Device memory, uint8, one-dimensional."""

    @abstractmethod
    def copy_to_device(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Event]) -> Event:
        """Queue a contiguous H2D copy that starts when all of `after` have completed; returns its completion."""

    @abstractmethod
    def copy_to_host(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Event]) -> Event:
        """Queue a contiguous D2H copy that starts when all of `after` have completed; returns its completion."""

    @abstractmethod
    def compute_waits(self, event: Event) -> None:
        """Later compute starts when `event` has completed."""

    @abstractmethod
    def release(self, *buffers: torch.Tensor) -> Event:
        """An event that completes when all compute issued so far has; `buffers` may then be overwritten."""

    def compute(  # noqa: B027  (a declaration; only a checker does something with it)
        self, *, reads: Iterable[torch.Tensor | None] = (), writes: Iterable[torch.Tensor | None] = ()
    ) -> None:
        """Declare what the compute issued next reads and writes (checked by `CheckingBackend`, free elsewhere)."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until all queues are empty."""

    @abstractmethod
    def link_use(self, direction: Literal["h2d", "d2h"]) -> LinkUse:
        """Bytes and busy time of copies that have completed; never blocks."""

    @abstractmethod
    def start_span(self, name: str) -> Any:
        """Begin a timed stretch of compute; give the result to `end_span`."""

    @abstractmethod
    def end_span(self, span: Any) -> None:
        """End the stretch begun by `start_span`."""

    @abstractmethod
    def span_seconds(self, name: str) -> float:
        """Total time of the completed stretches of that name; never blocks."""

    def free_device(self, buffer: torch.Tensor) -> None:
        """Declare that the caller drops this buffer: its memory is reused in the order of compute."""
        self.compute(writes=(buffer,))

    def release_host(self, buffer: HostBuffer) -> None:  # noqa: B027  (most backends have nothing to do)
        """Give back host memory before `close`; nothing may use it any more."""

    @abstractmethod
    def close(self) -> None:
        """Finish all queued work and give back what the backend holds."""
