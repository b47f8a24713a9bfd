"""Timelines as a trace that ui.perfetto.dev and chrome://tracing open.

Owns the file format: one process for each timeline, one thread for its steps and one for each lane, complete events in
microseconds. Does not own what ran when (`kvoffload/timeline.py`).

Source: the Trace Event Format of the Chromium project, JSON object form: "X" complete events, "M" metadata.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvoffload.errors import ConfigError
from kvoffload.timeline import LANES, Lane, Span, Timeline

LABELS: dict[Lane, str] = {
    "h2d": "link to the device",
    "weights": "weights to the device",
    "recompute": "recompute",
    "draft": "drafting on what is on the device",
    "verification": "verifying drafts",
    "attention": "attention",
    "dense": "dense and the rest",
    "wait": "waiting",
    "d2h": "link to the host",
}
STEPS_THREAD = 0  # the threads behind it are the lanes


def trace(timelines: Mapping[str, Timeline], facts: Mapping[str, str]) -> dict[str, Any]:
    """The content of a trace file.

    Args:
        timelines: by what they are called, such as "planned".
        facts: what was planned or measured, and where; kept with the file.
    """
    events: list[dict[str, Any]] = []
    for pid, (name, found) in enumerate(timelines.items(), start=1):
        events.append(_metadata("process_name", pid, name=name))
        events += _threads(found, pid)
        for number, (start_s, end_s) in enumerate(itertools.pairwise(found.steps_s)):
            events.append(_complete(f"step {number}", pid, STEPS_THREAD, start_s, end_s))
        for span in found.spans:
            event = _complete(LABELS[span.lane], pid, _thread_of(span.lane), span.start_s, span.end_s)
            events.append(event | {"args": _arguments(span)})
    return {"displayTimeUnit": "ms", "otherData": dict(facts), "traceEvents": events}


def write_trace(path: Path, timelines: Mapping[str, Timeline], facts: Mapping[str, str]) -> None:
    """Write a trace file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_text(json.dumps(trace(timelines, facts)) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the trace {path}: {error}; choose another file with --trace") from error


def _threads(found: Timeline, pid: int) -> Iterator[dict[str, Any]]:
    """Names of the threads, in the order of the lanes."""
    yield _metadata("thread_name", pid, STEPS_THREAD, name="decode steps")
    for lane in LANES:
        if found.lane(lane):
            yield _metadata("thread_name", pid, _thread_of(lane), name=LABELS[lane])
            yield _metadata("thread_sort_index", pid, _thread_of(lane), sort_index=_thread_of(lane))


def _thread_of(lane: Lane) -> int:
    return LANES.index(lane) + 1


def _arguments(span: Span) -> dict[str, float]:
    if not span.num_bytes:
        return {}
    return {"bytes": span.num_bytes, "GB/s": round(span.num_bytes / span.seconds / 1e9, 3) if span.seconds else 0.0}


def _complete(name: str, pid: int, tid: int, start_s: float, end_s: float) -> dict[str, Any]:
    start_us, end_us = round(start_s * 1e6, 3), round(end_s * 1e6, 3)
    duration_us = round(max(0.0, end_us - start_us), 3)
    return {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": start_us, "dur": duration_us}


def _metadata(kind: str, pid: int, tid: int = STEPS_THREAD, **arguments: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": arguments}
