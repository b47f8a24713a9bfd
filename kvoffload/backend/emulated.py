"""A link emulated on a CPU-only machine: one copy thread per direction, paced to a bandwidth and a latency.

Owns the threads. Copies really overlap with compute and are really ordered by events, so overlap, order and
speedups are wall-clock facts here too. A copy completes at

    due = max(previous due, time it was queued, completion of what it waited for) + latency + bytes / bandwidth

Dating from the queueing (not from when the thread woke up) keeps sleeping overshoot out of the achieved rate.
Copies use one plain `memmove`, so the link never takes part in PyTorch's intra-op thread pool.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import torch

from kvoffload.backend.base import LANE_OF, MAX_RECORDED, Backend, HostBuffer, LinkUse, Pace
from kvoffload.config import EmulatedLink
from kvoffload.timeline import Lane, Span

logger = logging.getLogger(__name__)
ALIGNMENT_BYTES = 64


class EmulatedEvent:
    """Completes once; remembers when."""

    __slots__ = ("_done", "completed_at")

    def __init__(self) -> None:
        self._done: threading.Event | None = threading.Event()
        self.completed_at = 0.0

    @classmethod
    def now(cls) -> EmulatedEvent:
        """An event that has completed."""
        event = cls.__new__(cls)
        event._done = None
        event.completed_at = time.perf_counter()
        return event

    def complete(self, at: float) -> None:
        """Mark as completed at that time and wake whoever waits."""
        self.completed_at = at
        done, self._done = self._done, None
        if done is not None:
            done.set()

    def wait(self) -> None:
        """Block until completed."""
        done = self._done
        if done is not None:
            done.wait()

    @property
    def is_complete(self) -> bool:
        """Whether the work before this event is done."""
        return self._done is None


class _Copy(NamedTuple):
    dst: torch.Tensor  # kept alive until copied
    src: torch.Tensor
    after: Sequence[EmulatedEvent]
    done: EmulatedEvent
    queued_at: float
    lane: Lane


class _Direction:
    """One direction of the link: a queue, its thread, and what it has done."""

    def __init__(self, name: Literal["h2d", "d2h"], bytes_per_s: float | None, latency_s: float) -> None:
        self.name: Literal["h2d", "d2h"] = name
        self.recording: deque[Span] | None = None  # by the clock of the machine
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.use = LinkUse(0, 0.0, 0)
        self.due = 0.0  # when the last copy was or will be done
        self.error: Exception | None = None
        self.queue: SimpleQueue[_Copy | None] = SimpleQueue()
        self.last: EmulatedEvent = EmulatedEvent.now()
        self.thread = threading.Thread(target=self._run, name=f"kvoffload-{name}", daemon=True)
        self.thread.start()

    def put(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[EmulatedEvent], lane: Lane) -> EmulatedEvent:
        num_bytes = src.numel() * src.element_size()
        if num_bytes != dst.numel() * dst.element_size() or not (src.is_contiguous() and dst.is_contiguous()):
            raise ValueError(f"a copy moves equal contiguous bytes, got {tuple(src.shape)} to {tuple(dst.shape)}")
        self.last = EmulatedEvent()
        self.queue.put(_Copy(dst, src, after, self.last, time.perf_counter(), lane))
        return self.last

    def _run(self) -> None:
        while self._copy_next():
            pass

    def _copy_next(self) -> bool:
        """Make one copy; False when there will be no more."""
        copy = self.queue.get()
        if copy is None:
            return False
        dst, src, after, done, start, lane = copy
        del copy
        try:
            for event in after:
                event.wait()
                start = max(start, event.completed_at)
            num_bytes = src.numel() * src.element_size()
            began = time.perf_counter()
            ctypes.memmove(dst.data_ptr(), src.data_ptr(), num_bytes)
            del dst, src  # whoever sees the copy done may count on nobody holding its memory
        except Exception as error:  # whoever waits for the copy has to hear of it
            self.error = error
            done.complete(time.perf_counter())
            return True
        now = time.perf_counter()
        if self.bytes_per_s is None:
            seconds, self.due = now - began, now
        else:
            seconds = self.latency_s + num_bytes / self.bytes_per_s
            self.due = max(self.due, start) + seconds
            while (left := self.due - time.perf_counter()) > 0:
                time.sleep(left)
        self.use = LinkUse(self.use.copied_bytes + num_bytes, self.use.busy_s + seconds, self.use.copies + 1)
        if self.recording is not None:
            self.recording.append(Span(lane, self.due - seconds, self.due, num_bytes))
        done.complete(self.due)
        return True

    def check(self) -> None:
        """Whether all copies so far could be made.

        Raises:
            RuntimeError: one could not.
        """
        if self.error is not None:
            raise RuntimeError(f"the {self.name} thread of the emulated link failed: {self.error}") from self.error

    def stop(self) -> None:
        self.queue.put(None)
        self.thread.join()


class EmulatedBackend(Backend):
    """The "device" is CPU memory; compute is synchronous; the two directions of the link are threads.

    Args:
        link: bandwidths and latency; a bandwidth of None copies unpaced.
    """

    emulated = True

    def __init__(self, link: EmulatedLink, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.link = link
        d2h = link.d2h_gb_per_s if link.d2h_gb_per_s is not None else link.h2d_gb_per_s
        speed = "unpaced" if link.h2d_gb_per_s is None else f"{link.h2d_gb_per_s:g} GB/s"
        self.link_name = f"emulated {speed}"
        self.has_speed = link.h2d_gb_per_s is not None
        self._directions = {
            "h2d": _Direction("h2d", _per_s(link.h2d_gb_per_s), link.latency_s),
            "d2h": _Direction("d2h", _per_s(d2h), link.latency_s),
        }
        self._spans: dict[str, float] = defaultdict(float)
        self._paces: dict[str, Pace] = defaultdict(lambda: Pace(0, 0.0))
        self._recording: deque[Span] = deque(maxlen=MAX_RECORDED)
        self._recording_since = 0.0
        self._closed = False

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        return HostBuffer(_aligned(num_bytes, torch.device("cpu")), 0)

    def allocate_device(self, num_bytes: int) -> torch.Tensor:
        return _aligned(num_bytes, self.device)

    def copy_to_device(
        self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Any], *, lane: Lane = "h2d"
    ) -> EmulatedEvent:
        return self._directions["h2d"].put(dst, src, after, lane)

    def copy_to_host(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Any]) -> EmulatedEvent:
        return self._directions["d2h"].put(dst, src, after, "d2h")

    def compute_waits(self, event: EmulatedEvent) -> None:
        if not event.is_complete:
            span = self.start_span("exposed_wait")
            event.wait()
            self.end_span(span)
        for direction in self._directions.values():
            direction.check()

    def release(self, *buffers: torch.Tensor) -> EmulatedEvent:
        return EmulatedEvent.now()  # CPU compute is synchronous

    def synchronize(self) -> None:
        if self._closed:
            return
        for direction in self._directions.values():
            direction.last.wait()
            direction.check()

    def link_use(self, direction: Literal["h2d", "d2h"]) -> LinkUse:
        return self._directions[direction].use

    def start_span(self, name: str) -> tuple[str, float]:
        return name, time.perf_counter()

    def end_span(self, span: tuple[str, float], amount: int = 0) -> None:
        name, began = span
        now = time.perf_counter()
        self._spans[name] += now - began
        if amount:
            before = self._paces[name]
            self._paces[name] = Pace(before.amount + amount, before.seconds + now - began)
        if self.is_recording and name in LANE_OF:
            self._recording.append(Span(LANE_OF[name], began, now))

    def span_seconds(self, name: str) -> float:
        return self._spans[name]

    def pace(self, name: str) -> Pace:
        if name in self._directions:
            use = self._directions[name].use
            return Pace(use.copied_bytes, use.busy_s)
        return self._paces[name]

    def start_recording(self) -> None:
        self.synchronize()
        self._recording.clear()
        for direction in self._directions.values():
            direction.recording = self._recording  # appending is atomic
        self._recording_since, self.is_recording = time.perf_counter(), True

    def stop_recording(self, *, keep: bool = True) -> None:
        self.synchronize()  # copies are noted when they have arrived
        self.is_recording = False
        for direction in self._directions.values():
            direction.recording = None
        if not keep:
            self._recording.clear()

    def recorded(self) -> list[Span]:
        self.synchronize()
        since = self._recording_since
        return [span._replace(start_s=span.start_s - since, end_s=span.end_s - since) for span in list(self._recording)]

    def mark(self, lane: Lane) -> None:
        if self.is_recording:
            now = time.perf_counter()
            self._recording.append(Span(lane, now, now))

    def close(self) -> None:
        if not self._closed:
            for direction in self._directions.values():
                direction.last.wait()
                direction.stop()
            self._closed = True


def _per_s(gb_per_s: float | None) -> float | None:
    return None if gb_per_s is None else gb_per_s * 1e9


def _aligned(num_bytes: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
