"""The interface between the transfer engine and the hardware: three ordered queues and the events between them.

A backend has a compute queue (the stream PyTorch launches on), a host-to-device queue (H2D) and a device-to-host
queue (D2H). Work in one queue runs in order; work in different queues is ordered only through events. An event is
always recorded when it is created, so nobody can wait for one that has not been recorded yet.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch

from kvoffload.backend.clock import Stretch
from kvoffload.timeline import Lane, Span

Event = Any  # a torch.cuda.Event, or the event type of the backend that made it
Queue = Literal["compute", "h2d", "d2h"]
MAX_RECORDED = 200_000  # stretches that a recording keeps: the latest
# Span names whose totals every backend keeps, and the lane each is recorded in.
LANE_OF: dict[str, Lane] = {
    "exposed_wait": "wait",
    "recompute": "recompute",
    "attention": "attention",
    "draft": "draft",
    "verification": "verification",
}
OF_A_CHUNK = {"exposed_wait", "recompute", "attention"}  # names of which a step has so many that some are timed
_NOT_RECORDING = contextlib.nullcontext()


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


class Pace(NamedTuple):
    """Spans of compute in which the device did not wait for the host, and what was done in them."""

    amount: int
    seconds: float

    def since(self, earlier: Pace) -> float | None:
        """Seconds of one unit between two readings; None where nothing was done."""
        amount = self.amount - earlier.amount
        return (self.seconds - earlier.seconds) / amount if amount else None


class HostBuffer(NamedTuple):
    """Host memory the link can read and write."""

    tensor: torch.Tensor  # uint8, one-dimensional
    pinned_bytes: int  # 0 where the memory is pageable


class Backend(ABC):
    """Owns the queues and raw memory. Does not know what the bytes mean."""

    device: torch.device
    link_name: str
    emulated: bool
    has_speed = True  # False: an emulated link that copies as fast as it can, of which nothing can be predicted
    has_clock = False  # whether `time_copies` reads that of the device
    starved_s = 0.0  # that the device had nothing to do within forwards, as seen at every chunk; a CPU never has
    is_recording = False  # whether stretches are kept one by one, for `recorded`

    @abstractmethod
    def allocate_host(self, num_bytes: int) -> HostBuffer:
        """Host memory that stays until `close`, pinned where the backend can."""

    @abstractmethod
    def allocate_device(self, num_bytes: int) -> torch.Tensor:
        """Device memory, uint8, one-dimensional."""

    @abstractmethod
    def copy_to_device(
        self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Event], *, lane: Lane = "h2d"
    ) -> Event:
        """Queue a contiguous H2D copy that starts when all of `after` have completed; returns its completion.

        Args:
            dst: on the device.
            src: on the host.
            after: events.
            lane: in which it is recorded.
        """

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
    def end_span(self, span: Any, amount: int = 0) -> None:
        """End the stretch begun by `start_span`, in which so much was done, for `pace`; 0: that is not counted."""

    @abstractmethod
    def span_seconds(self, name: str) -> float:
        """Total time of the completed stretches of that name; never blocks."""

    def spans(self, name: str) -> Pace:
        """How many spans of that name have completed, and their total time; never blocks."""
        return Pace(0, self.span_seconds(name))

    def pace(self, name: str) -> Pace:
        """What was done in the completed spans of that name that give an amount, or copied one way; never blocks.

        Left out is what the device had begun before all of it was queued: that has a launch in it.
        """
        return Pace(0, 0.0)

    def time_copies(
        self,
        queue: Callable[[], object],
        n: int,
        ways: Sequence[Literal["h2d", "d2h"]],
        *,
        is_pageable: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> Stretch:
        """`n` times the copies that `queue` queues, in a row, until all have arrived; waits for all queues.

        Args:
            queue: queues them.
            n: how often.
            ways: of the copies.
            is_pageable: they come from or go to memory that is not pinned, so that each may hold the host.
            clock: seconds, where the device has no clock of its own; None: that of the machine.
        """
        clock = clock or time.perf_counter
        began = clock()
        for _ in range(n):
            queue()
        self.synchronize()
        return Stretch(clock() - began, True)

    @abstractmethod
    def start_recording(self) -> None:
        """Keep every copy, span and mark from now on one by one; what was recorded before is forgotten."""

    @abstractmethod
    def recorded(self) -> list[Span]:
        """The latest `MAX_RECORDED` of them, in seconds since `start_recording`; blocks until all queues are empty."""

    @abstractmethod
    def stop_recording(self, *, keep: bool = True) -> None:
        """Record nothing that is issued from now on; what was recorded stays for `recorded`, or is forgotten."""

    @abstractmethod
    def mark(self, lane: Lane) -> None:
        """Note a moment of compute while recording; nothing else."""

    def recording(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A span that is taken only while recording, for stretches whose totals nobody needs."""
        return self.sampling(name, 0)

    def sampling(self, name: str, amount: int) -> contextlib.AbstractContextManager[None]:
        """A span in which so much is done; of amount 0 it is taken only while recording."""
        return self._span(name, amount) if amount or self.is_recording else _NOT_RECORDING

    @contextlib.contextmanager
    def _span(self, name: str, amount: int) -> Iterator[None]:
        span = self.start_span(name)
        try:
            yield
        finally:
            self.end_span(span, amount)

    @property
    def kept_host_bytes(self) -> int:
        """Host memory that is kept for sessions to come, and that `allocate_host` takes before any other."""
        return 0

    def free_device(self, buffer: torch.Tensor) -> None:
        """Declare that the caller drops this buffer: its memory is reused in the order of compute."""
        self.compute(writes=(buffer,))

    def release_host(self, buffer: HostBuffer) -> None:  # noqa: B027  (most backends have nothing to do)
        """Give back host memory before `close`; nothing may use it any more."""

    @abstractmethod
    def close(self) -> None:
        """Finish all queued work and give back what the backend holds."""
