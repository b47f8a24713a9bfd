"""How long work takes on a device, and not how long the host takes to ask for it.

Owns one stretch of work between two events, and the delay in front of it. Does not own how often a stretch is repeated,
nor what is made of it.

    host      queues the delay and `start` | queues n calls and `end`     | waits
    device    the delay ...............................| start | n calls, without a gap | end

What makes it valid: the device had not come to `start` when all had been queued, so no launch and no wait of the host
lies between the two events. Where it had, the stretch is repeated behind a longer delay; what launches more than a
device's queue of launches holds, or waits for the device itself, cannot be hidden and says so. Operations of a CPU have
ended when they return: there it is the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

LEAST_CALLS = 8  # in one stretch on a GPU: an event may be off by a microsecond
_FIRST_DELAY_S = 5e-4
_MAX_DELAY_S = 0.25
_MAX_TRIES = 4
_MARGIN = 1.5  # of the delay over what queueing took last
_CYCLES_PER_S = 3e9  # no GPU's clock is faster, so a delay is at least as long as it is asked to be


class Stretch(NamedTuple):
    """Some calls of one piece of work."""

    seconds: float  # of all calls
    hides_launches: bool  # whether nothing but the device's work is in it


class DeviceClock:
    """Times work on one device; not for several threads.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._call_s = 0.0  # that the host took to queue one call, at the last stretch

    @property
    def least_calls(self) -> int:
        """How many calls a stretch should have."""
        return LEAST_CALLS if self._device.type == "cuda" else 1

    def time(self, work: Callable[[], object], n: int, streams: Sequence[torch.cuda.Stream] = ()) -> Stretch:
        """`n` calls of `work` in a row; waits for the device.

        Args:
            work: queues what is to be timed.
            n: calls, at least 1.
            streams: in which it runs, if not in the current one; all of them have to be done.
        """
        if self._device.type != "cuda":
            began = time.perf_counter()
            for _ in range(n):
                work()
            return Stretch(time.perf_counter() - began, True)
        with torch.cuda.device(self._device):
            delay_s = max(_FIRST_DELAY_S, _MARGIN * n * self._call_s)
            for _ in range(_MAX_TRIES):
                found, queueing_s = self._behind(delay_s, work, n, streams or [torch.cuda.current_stream()])
                self._call_s = queueing_s / n
                if found.hides_launches or delay_s >= _MAX_DELAY_S:
                    break
                delay_s = min(_MAX_DELAY_S, 2 * max(delay_s, queueing_s))
        return found

    def _behind(
        self, delay_s: float, work: Callable[[], object], n: int, streams: Sequence[torch.cuda.Stream]
    ) -> tuple[Stretch, float]:
        """One stretch behind a delay, and the seconds the host took to queue it."""
        torch.cuda.synchronize()
        torch.cuda._sleep(int(delay_s * _CYCLES_PER_S))
        began = time.perf_counter()
        delayed = torch.cuda.current_stream().record_event()
        for stream in streams:
            stream.wait_event(delayed)
        starts = [_recorded(stream) for stream in streams]
        for _ in range(n):
            work()
        ends = [_recorded(stream) for stream in streams]
        queueing_s = time.perf_counter() - began
        hides_launches = not any(start.query() for start in starts)
        torch.cuda.synchronize()
        # in milliseconds; with several streams until the last is done
        seconds = max(start.elapsed_time(end) for start in starts for end in ends) / 1e3
        return Stretch(seconds, hides_launches), queueing_s


def _recorded(stream: torch.cuda.Stream) -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event
