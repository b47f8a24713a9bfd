"""A CUDA device: an H2D and a D2H stream beside the current stream, events between them, pinned host memory.

Owns the two streams and the registrations of host memory. The compute queue is whatever stream PyTorch launches on
at the time of the call. Nothing here synchronises except `synchronize` and `close`: timings come from CUDA events
that are read only once they have completed. Events cost the host microseconds, so of many stretches only some are timed
(sampling.py); all of them while recording.

Pinned memory comes from `pinned`, and goes back there when a backend is closed.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import time
import warnings
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from kvoffload.backend.base import LANE_OF, MAX_RECORDED, OF_A_CHUNK, Backend, HostBuffer, LinkUse, Pace
from kvoffload.backend.clock import DeviceClock, Stretch
from kvoffload.backend.pinned import make_pages, pin, pool_of, unpin
from kvoffload.backend.sampling import Sampler
from kvoffload.timeline import Lane, Span
from kvoffload.units import gb

logger = logging.getLogger(__name__)

MAX_OPEN_MEASUREMENTS = 4096  # events kept before the completed ones are added up


class CudaBackend(Backend):
    """Copies on two side streams of one CUDA device.

    Args:
        device: the device that holds the model.
    """

    emulated = False
    has_clock = True

    def __init__(self, device: torch.device) -> None:
        # with an index: some functions of `torch.cuda` ask for one
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self.link_name = torch.cuda.get_device_name(self.device)
        self._streams = {"h2d": torch.cuda.Stream(self.device), "d2h": torch.cuda.Stream(self.device)}
        self._clock = DeviceClock(self.device)
        # (start, end, bytes or amount, weight); start is None where the stretch is not timed
        self._pending: dict[str, deque[tuple[Any, Any, int, float]]] = defaultdict(deque)
        self._samplers: dict[str, Sampler] = defaultdict(Sampler)
        self._totals: dict[str, LinkUse] = defaultdict(lambda: LinkUse(0, 0.0, 0))
        self._recording: deque[tuple[Lane, Any, Any, int]] = deque(maxlen=MAX_RECORDED)  # (lane, start, end, bytes)
        self.starved_s = 0.0
        self._looked_at_s: float | None = None
        self._last_event: Any = None  # in the compute queue
        self._recording_since: Any = None  # the event that recorded times count from
        # By address. Memory must not be freed while it is pinned, also where nobody calls `close`.
        self._pool = pool_of(self.device)
        self._pinned: dict[int, torch.Tensor] = {}
        self._unpin_all = weakref.finalize(self, _unpin_all, self._pinned, self.device)
        self._unpin_all.atexit = False  # the driver may be gone by then
        self._warned_pageable = False

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        whole_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = self._pool.take(whole_bytes)
        code = 0
        if pages is None:
            with _near(self.device):
                pages = make_pages(whole_bytes)
                code = pin(pages, self.device)
                if code and self._pool.kept_bytes:  # it may be what is kept that leaves no room
                    self._pool.free()
                    code = pin(pages, self.device)
        if code == 0:
            self._pinned[pages.data_ptr()] = pages
            return HostBuffer(pages[:num_bytes], pages.numel())
        if not self._warned_pageable:
            self._warned_pageable = True
            warnings.warn(
                f"could not pin {gb(num_bytes)} of host memory (CUDA error {code}); using pageable memory, "
                "which is slower. Raise the limit on locked memory (ulimit -l) or lower host_gib.",
                stacklevel=2,
            )
        return HostBuffer(pages[:num_bytes], 0)

    def release_host(self, buffer: HostBuffer) -> None:
        pages = self._pinned.pop(buffer.tensor.data_ptr(), None)
        if pages is not None:
            unpin(pages)

    @property
    def kept_host_bytes(self) -> int:
        return self._pool.kept_bytes

    def allocate_device(self, num_bytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def copy_to_device(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Any], *, lane: Lane = "h2d") -> Any:
        return self._copy("h2d", dst, src, after, lane)

    def copy_to_host(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Any]) -> Any:
        return self._copy("d2h", dst, src, after, "d2h")

    def _copy(self, direction: str, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Any], lane: Lane) -> Any:
        stream = self._streams[direction]
        for event in after:
            stream.wait_event(event)
        num_bytes = src.numel() * src.element_size()
        weight = self._samplers[direction].weight(num_bytes or 1, at_once=self.is_recording)
        start = None
        if weight:
            start = torch.cuda.Event(enable_timing=True)
            start.record(stream)
        with torch.cuda.stream(stream):
            dst.copy_(src, non_blocking=True)
        end = torch.cuda.Event(enable_timing=start is not None)
        end.record(stream)
        if self.is_recording:
            self._recording.append((lane, start, end, num_bytes))
        self._keep(direction, start, end, num_bytes, weight)
        if start is not None and not start.query():  # it was queued before the stream came to it
            self._keep(_paced(direction), start, end, num_bytes, 1.0)
        return end

    def _look(self) -> None:
        """Count the time since the last look in this forward as idle if the device has nothing to do.

        It waits for its host. Half of it, where it is only through with all that was issued before the last look: it
        works as fast as its host can ask, and how much of the time that took nobody knows. A device that waits for the
        link has that to do.
        """
        now_s = time.perf_counter()
        if self._looked_at_s is not None:  # between forwards the host waits for the device as well
            if torch.cuda.current_stream(self.device).query():
                self.starved_s += now_s - self._looked_at_s
            elif self._last_event is not None and self._last_event.query():
                self.starved_s += (now_s - self._looked_at_s) / 2
        self._looked_at_s = now_s

    def compute_waits(self, event: Any) -> None:
        self._look()
        stream = torch.cuda.current_stream(self.device)
        weight = self._samplers["exposed_wait"].weight(at_once=self.is_recording)
        if not weight:
            stream.wait_event(event)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        stream.wait_event(event)  # what lies between the two records is what the compute stream lost by waiting
        end.record(stream)
        self._note("exposed_wait", start, end, 0, weight)

    def release(self, *buffers: torch.Tensor) -> Any:
        event = self._last_event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def link_use(self, direction: Literal["h2d", "d2h"]) -> LinkUse:
        self._harvest(direction)
        return self._totals[direction]

    def start_span(self, name: str) -> tuple[str, Any, float] | None:
        is_rare = name not in OF_A_CHUNK  # once a step: counted one by one
        weight = self._samplers[name].weight(at_once=self.is_recording or is_rare)
        return (name, self._timed_event(), weight) if weight else None

    def end_span(self, span: tuple[str, Any, float] | None, amount: int = 0) -> None:
        if span is None:
            return
        name, start, weight = span
        end = self._timed_event()
        self._note(name, start, end, 0, weight)
        if amount and not start.query():  # all of it was queued before the device came to it
            self._keep(_paced(name), start, end, amount, 1.0)

    def _note(self, name: str, start: Any, end: Any, num_bytes: int, weight: float) -> None:
        if self.is_recording and name in LANE_OF:
            self._recording.append((LANE_OF[name], start, end, num_bytes))
        self._keep(name, start, end, num_bytes, weight)

    def _keep(self, name: str, start: Any, end: Any, num_bytes: int, weight: float) -> None:
        self._pending[name].append((start, end, num_bytes, weight))
        if len(self._pending[name]) > MAX_OPEN_MEASUREMENTS:
            self._harvest(name)

    def span_seconds(self, name: str) -> float:
        self._harvest(name)
        return self._totals[name].busy_s

    def spans(self, name: str) -> Pace:
        self._harvest(name)
        return Pace(self._totals[name].copies, self._totals[name].busy_s)

    def pace(self, name: str) -> Pace:
        self._harvest(_paced(name))
        total = self._totals[_paced(name)]
        return Pace(total.copied_bytes, total.busy_s)

    def time_copies(
        self,
        queue: Callable[[], object],
        n: int,
        ways: Sequence[Literal["h2d", "d2h"]],
        *,
        is_pageable: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> Stretch:
        if is_pageable:  # such a copy returns when it has been staged, so none can be queued ahead
            return super().time_copies(queue, n, ways, clock=clock)
        return self._clock.time(queue, n, [self._streams[way] for way in ways])

    def _harvest(self, name: str) -> None:
        """Add up the measurements whose end has completed."""
        pending, total = self._pending[name], self._totals[name]
        while pending and pending[0][1].query():
            start, end, num_bytes, weight = pending.popleft()
            seconds = 0.0 if start is None else weight * start.elapsed_time(end) / 1e3  # milliseconds
            total = LinkUse(total.copied_bytes + num_bytes, total.busy_s + seconds, total.copies + 1)
        self._totals[name] = total

    def start_recording(self) -> None:
        self.synchronize()  # so that nothing is timed from before the event that times count from
        self._recording.clear()
        self._recording_since = self._timed_event()
        self.is_recording = True

    def stop_recording(self, *, keep: bool = True) -> None:
        self.is_recording = False  # copies are noted as they are issued: those under way are in already
        if not keep:
            self._recording.clear()

    def recorded(self) -> list[Span]:
        self.synchronize()
        since, found = self._recording_since, []
        for lane, start, end, num_bytes in self._recording:
            start_s, end_s = (since.elapsed_time(event) / 1e3 for event in (start, end))  # milliseconds
            found.append(Span(lane, start_s, end_s, num_bytes))
        return found

    def mark(self, lane: Lane) -> None:
        self._looked_at_s = None
        if self.is_recording:
            event = self._timed_event()
            self._recording.append((lane, event, event, 0))

    def _timed_event(self) -> Any:
        """An event in the compute queue that has been recorded."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def close(self) -> None:
        if self._unpin_all.detach() is not None:
            torch.cuda.synchronize(self.device)
            while self._pinned:
                self._pool.give(self._pinned.popitem()[1])


def _paced(name: str) -> str:
    """Under which name the spans are kept that a pace is made of."""
    return f"{name}, queued ahead"


def _unpin_all(pinned: dict[int, torch.Tensor], device: torch.device) -> None:
    """Give memory back to the system once nothing uses it any more."""
    torch.cuda.synchronize(device)
    while pinned:
        unpin(pinned.popitem()[1])


@contextlib.contextmanager
def _near(device: torch.device) -> Iterator[None]:
    """Run this thread on the CPUs of the device's NUMA node, where the system tells which these are."""
    try:
        properties: Any = torch.cuda.get_device_properties(device)
        bus = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        text = Path(f"/sys/bus/pci/devices/{bus}/local_cpulist").read_text().strip()
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {cpu for part in text.split(",") for cpu in _cpu_range(part)} & before)
    except (AttributeError, OSError, ValueError):
        yield  # no NUMA information, or no right to use it (containers, other systems): first touch decides
        return
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cpu_range(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)
