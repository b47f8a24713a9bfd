"""Streams and events of a CUDA device that is not there: queues of copies, records and waits.

Owns their order, which stream and device are current, and how often who waited. Does not own what is copied.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from fake_cuda_clock import Clock
from fake_cuda_tensors import DEVICE
from torch.utils._python_dispatch import _disable_current_modes

RealStream, RealEvent = torch.cuda.Stream, torch.cuda.Event
Policy = Literal["eager", "lazy"]


class Event(RealEvent):  # type: ignore[misc]
    """As `torch.cuda.Event`: only what that has, and what it refuses."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Event:
        return object.__new__(cls)

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._has_timing = enable_timing
        self._stream: Stream | None = None
        self._at_s: float | None = None  # when it completed
        self._due_s = 0.0  # when the device comes to it, where that has a clock

    def record(self, stream: Any = None) -> None:
        self._stream, self._at_s = stream or torch.cuda.current_stream(), None
        clock = active().clock
        if clock is not None:
            self._due_s = clock.event_s(self._stream.stream_id)
        self._stream._add(("record", self))

    def wait(self, stream: Any = None) -> None:
        (stream or torch.cuda.current_stream()).wait_event(self)

    def query(self) -> bool:
        clock = active().clock
        if clock is None or self._stream is None:
            return self._stream is None or self._at_s is not None
        if self._due_s > clock.host_s:
            return False
        self._complete()
        return True

    def _complete(self) -> None:
        """Run what it is behind; one that was never recorded is no wait."""
        if self._stream is not None and self._at_s is None:
            self._stream._run_until(self)

    def synchronize(self) -> None:
        active().count("Event.synchronize")
        self._complete()
        clock = active().clock
        if clock is not None:
            clock.host_waits(self._due_s)

    def elapsed_time(self, end_event: Any) -> float:
        if not (self._has_timing and end_event._has_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._at_s is None or end_event._at_s is None:
            raise RuntimeError("CUDA error: device not ready: an event has not completed, or was never recorded")
        if active().clock is not None:
            return (end_event._due_s - self._due_s) * 1e3
        return (end_event._at_s - self._at_s) * 1e3


class Stream(RealStream):  # type: ignore[misc]
    """As `torch.cuda.Stream`: a queue of copies, records and waits."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
        streams = active()
        if "stream_id" in kwargs:  # an existing one
            return streams.all[kwargs["stream_id"]] if kwargs["device_index"] == 0 else _stream_of_another_device()
        with torch.cuda.device(device):
            assert streams.current_device == 0, "a stream of another device than the tensors'"
        made = object.__new__(cls)
        made.stream_id, made._queue = len(streams.all), deque()
        made._policy = "eager" if not streams.all else streams.policy_of(made.stream_id)
        streams.all.append(made)
        return made

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        pass

    stream_id: int
    _queue: deque[tuple[str, Any]]
    _policy: Policy
    device = DEVICE
    device_index = 0
    device_type = 1

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __enter__(self) -> Stream:
        self._before = torch.cuda.current_stream()
        torch.cuda.set_stream(self)
        return self

    def __exit__(self, *args: Any) -> None:
        torch.cuda.set_stream(self._before)

    def _add(self, item: tuple[str, Any]) -> None:
        self._queue.append(item)
        if self._policy == "eager" or all(kind == "record" for kind, _ in self._queue):
            self._run()

    def _run(self) -> None:
        """Everything that was queued."""
        while self._queue:
            self._run_next()

    def _run_until(self, event: Event) -> None:
        while event._at_s is None:
            self._run_next()

    def _run_next(self) -> None:
        kind, what = self._queue.popleft()
        if kind == "wait":
            what._complete()
        elif kind == "copy":
            with _disable_current_modes():
                what()
        else:
            what._at_s = time.perf_counter()

    def wait_event(self, event: Any) -> None:
        active().log.append((self.stream_id, "waits"))
        clock = active().clock
        if clock is not None:
            clock.stream_waits(self.stream_id, event._due_s)
        self._add(("wait", event))

    def wait_stream(self, stream: Any) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return not self._queue

    def synchronize(self) -> None:
        active().count("Stream.synchronize")
        self._run()
        clock = active().clock
        if clock is not None:
            clock.host_waits(clock.free_s[self.stream_id])


def _stream_of_another_device() -> Stream:
    """May be left and come back to, but not used."""
    made = object.__new__(Stream)
    made.stream_id, made.device_index, made.device = 0, 1, torch.device("cuda", 1)
    return made


class Streams:
    """The streams of a device, which of them is current, and what happened on them.

    Args:
        policies: of the streams in the order they are made, repeated.
        clock: tells what takes how long; None: the host's, and nothing takes any time.
    """

    def __init__(self, *policies: Policy, clock: Clock | None = None) -> None:
        self.clock = clock
        self.policies = policies or ("lazy",)
        self.all: list[Stream] = []
        self.current = 0
        self.current_device = 0
        self.log: list[tuple[int, str]] = []  # stream and what happened
        self.calls: Counter[str] = Counter()

    def policy_of(self, stream_id: int) -> Policy:
        return self.policies[(stream_id - 1) % len(self.policies)]

    def count(self, name: str) -> None:
        self.calls[name] += 1

    @property
    def is_lazy(self) -> bool:
        """Whether copies on the current one wait."""
        return self.all[self.current]._policy == "lazy"

    @property
    def is_idle(self) -> bool:
        return not any(stream._queue for stream in self.all)

    def copy(self, what: Callable[[], Any], *, is_blocking: bool) -> None:
        """A copy on the current one."""
        self.log.append((self.current, "copies"))
        self.all[self.current]._add(("copy", what))
        if is_blocking:
            self.run()
            self.host_waits_for_current()

    def launch(self, seconds: Callable[[Clock], float]) -> None:
        """Something that takes that long on the current one."""
        if self.clock is not None:
            self.clock.launch(self.current, seconds(self.clock))

    def host_waits_for_current(self) -> None:
        if self.clock is not None:
            self.clock.host_waits(self.clock.free_s[self.current])

    def run(self) -> None:
        """Everything that was queued on the current one."""
        self.all[self.current]._run()

    # ---- what PyTorch's Python calls -----------------------------------------------------------------------------

    def synchronize(self) -> None:
        self.count("synchronize")
        for stream in self.all:
            stream._run()
        if self.clock is not None:
            self.clock.host_waits()

    def delay(self, cycles: int) -> None:
        """What `torch.cuda._sleep` launches, at a clock of 2 GHz."""
        self.count("delay")
        self.run()
        self.launch(lambda clock: cycles / 2e9)

    def exchange_device(self, device: int) -> int:
        if device < 0:  # a `torch.cuda.device` that is to change nothing
            return self.current_device
        before, self.current_device = self.current_device, device
        return before

    def current_stream(self, device: int) -> tuple[int, int, int]:
        return (self.current if device == 0 else 0), device, 1

    def set_stream(self, stream_id: int, device_index: int, device_type: int) -> None:
        self.current_device = device_index
        if device_index == 0:
            self.current = stream_id


_active: list[Streams] = []


def active() -> Streams:
    """Those of the device that is there now."""
    return _active[-1]


@contextlib.contextmanager
def activated(streams: Streams) -> Iterator[None]:
    """`torch.cuda.Stream` and `Event` are made on this device; it has its default stream."""
    _active.append(streams)
    Stream()
    try:
        yield
    finally:
        _active.pop()
