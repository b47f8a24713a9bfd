"""A race detector around another backend: vector clocks per queue, byte ranges per access.

CPU compute is synchronous and PyTorch's stream sanitizer sees neither host memory nor overlapping views, so this is
where a missing wait is found: two accesses to overlapping bytes, at least one a write, in different queues, with no
chain of events between them, raise `RaceError` whatever the timing was. Released buffers are filled with NaN, so a
late read of them shows in the logits too.

Idea: happens-before race detection with vector clocks (Mattern 1989; FastTrack, Flanagan and Freund 2009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from kvoffload.backend.base import Backend, HostBuffer, LinkUse, Pace, Queue
from kvoffload.backend.clock import Stretch
from kvoffload.timeline import Lane, Span

Clock = dict[Queue, int]


class RaceError(AssertionError):
    """Two unordered accesses to the same bytes."""


class _Access(NamedTuple):
    low: int
    high: int
    queue: Queue
    time: int
    is_write: bool
    what: str


class CheckedEvent(NamedTuple):
    """An event of the inner backend and the clock of the queue at its record."""

    inner: Any
    clock: Clock


class CheckingBackend(Backend):
    """Wraps a backend and checks every access declared to it.

    Args:
        inner: the backend that does the work.
        poison: fill released buffers with NaN bytes (0xFF is a NaN in every float format used here).
    """

    def __init__(self, inner: Backend, *, poison: bool = True) -> None:
        self.inner = inner
        self.device = inner.device
        self.link_name = inner.link_name
        self.emulated, self.has_speed = inner.emulated, inner.has_speed
        self.has_clock = inner.has_clock
        self.poison = poison
        self.num_checked = 0
        self._clocks: dict[Queue, Clock] = {q: {"compute": 0, "h2d": 0, "d2h": 0} for q in ("compute", "h2d", "d2h")}
        self._history: dict[int, list[_Access]] = {}  # by address of the storage
        self._storages: list[torch.UntypedStorage] = []  # kept, so that no address is used twice

    def _access(self, queue: Queue, tensor: torch.Tensor, *, is_write: bool, what: str) -> None:
        if tensor.numel() == 0:
            return
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._history:
            self._storages.append(storage)
        history = self._history.setdefault(storage.data_ptr(), [])
        low = tensor.data_ptr()
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        high = low + span * tensor.element_size()
        clock = self._clocks[queue]
        kept = []
        for old in history:
            overlaps = old.low < high and low < old.high
            ordered = old.queue == queue or clock[old.queue] >= old.time
            if overlaps and (is_write or old.is_write) and not ordered:
                raise RaceError(
                    f"{queue} {'writes' if is_write else 'reads'} {what} while {old.queue} may still "
                    f"{'write' if old.is_write else 'read'} {old.what}: bytes {max(low, old.low) - storage.data_ptr()}"
                    f"..{min(high, old.high) - storage.data_ptr()} of a buffer of {storage.nbytes()}"
                )
            covered = low <= old.low and old.high <= high and ordered
            if not (covered and (is_write or (old.queue == queue and not old.is_write))):
                kept.append(old)
        kept.append(_Access(low, high, queue, clock[queue], is_write, what))
        self._history[storage.data_ptr()] = kept
        self.num_checked += 1

    def _advance(self, queue: Queue, after: Sequence[CheckedEvent] = ()) -> None:
        """Begin a new operation in `queue`, ordered behind `after`."""
        clock = self._clocks[queue]
        for event in after:
            for other, moment in event.clock.items():
                clock[other] = max(clock[other], moment)
        clock[queue] += 1

    def _event(self, queue: Queue, inner: Any) -> CheckedEvent:
        return CheckedEvent(inner, dict(self._clocks[queue]))

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        return self.inner.allocate_host(num_bytes)

    def allocate_device(self, num_bytes: int) -> torch.Tensor:
        buffer = self.inner.allocate_device(num_bytes)
        self.compute(writes=(buffer,))  # whatever used this memory before was compute
        if self.poison:
            buffer.fill_(255)
        return buffer

    @property
    def kept_host_bytes(self) -> int:
        return self.inner.kept_host_bytes

    def release_host(self, buffer: HostBuffer) -> None:
        self.inner.release_host(buffer)

    def copy_to_device(
        self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Any], *, lane: Lane = "h2d"
    ) -> CheckedEvent:
        self._advance("h2d", after)
        self._access("h2d", src, is_write=False, what="source of a copy to the device")
        self._access("h2d", dst, is_write=True, what="destination of a copy to the device")
        return self._event("h2d", self.inner.copy_to_device(dst, src, [event.inner for event in after], lane=lane))

    def copy_to_host(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Any]) -> CheckedEvent:
        self._advance("d2h", after)
        self._access("d2h", src, is_write=False, what="source of a copy to the host")
        self._access("d2h", dst, is_write=True, what="destination of a copy to the host")
        return self._event("d2h", self.inner.copy_to_host(dst, src, [event.inner for event in after]))

    def compute_waits(self, event: CheckedEvent) -> None:
        self._advance("compute", (event,))
        self.inner.compute_waits(event.inner)

    def compute(self, *, reads: Iterable[torch.Tensor | None] = (), writes: Iterable[torch.Tensor | None] = ()) -> None:
        self._advance("compute")
        for tensor in reads:
            if tensor is not None:
                self._access("compute", tensor, is_write=False, what="an input of compute")
        for tensor in writes:
            if tensor is not None:
                self._access("compute", tensor, is_write=True, what="an output of compute")

    def release(self, *buffers: torch.Tensor) -> CheckedEvent:
        if self.poison:
            self.compute(writes=buffers)
            for buffer in buffers:
                buffer.view(torch.uint8).fill_(255)
        self._advance("compute")
        return self._event("compute", self.inner.release(*buffers))

    def synchronize(self) -> None:
        self.inner.synchronize()
        latest: Clock = {q: self._clocks[q][q] for q in self._clocks}
        for queue in self._clocks:
            self._clocks[queue] = dict(latest)

    def link_use(self, direction: Literal["h2d", "d2h"]) -> LinkUse:
        return self.inner.link_use(direction)

    def start_span(self, name: str) -> Any:
        return self.inner.start_span(name)

    def end_span(self, span: Any, amount: int = 0) -> None:
        self.inner.end_span(span, amount)

    def span_seconds(self, name: str) -> float:
        return self.inner.span_seconds(name)

    def spans(self, name: str) -> Pace:
        return self.inner.spans(name)

    @property
    def starved_s(self) -> float:  # type: ignore[override]
        return self.inner.starved_s

    def pace(self, name: str) -> Pace:
        return self.inner.pace(name)

    def time_copies(
        self,
        queue: Callable[[], object],
        n: int,
        ways: Sequence[Literal["h2d", "d2h"]],
        *,
        is_pageable: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> Stretch:
        found = self.inner.time_copies(queue, n, ways, is_pageable=is_pageable, clock=clock)
        self.synchronize()
        return found

    def start_recording(self) -> None:
        self.inner.start_recording()
        self.is_recording = True

    def stop_recording(self, *, keep: bool = True) -> None:
        self.inner.stop_recording(keep=keep)
        self.is_recording = False

    def recorded(self) -> list[Span]:
        return self.inner.recorded()

    def mark(self, lane: Lane) -> None:
        self.inner.mark(lane)

    def close(self) -> None:
        self.inner.close()
