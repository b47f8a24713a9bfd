#!/usr/bin/env python3
"""Tier 1 of `scripts/gpu_suite.sh`: starts the process that measures, and ends a step that runs over.

    watch    start worker | wait for "begin" and "end" of steps | summary           standard library only
    worker                | imports | step | step | hangs ... killed                scripts/gpu/worker.py
    worker                                          | imports | the step behind     only then a second one

A step may hang, crash or lose the device's context: what it had saved stays, it is noted in `steps.csv`, and a new
process goes on behind it. After `TIER_1_S` since the suite began everything is ended.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpu.steps import STEPS, TIER_1_S, Step, lines

NOT_READY, CONTEXT_LOST = 2, 3  # exit codes of the worker
START_LIMIT_S = 120.0  # of a worker until its first step
GRACE_S = 3.0  # for a step that ends itself
COLUMNS = ("step", "seconds", "limit_s", "outcome")


class Watch:
    """Runs steps in a worker, one after another, whatever becomes of it.

    Args:
        steps: all of them, in order.
        results: the folder of rows; `steps.csv` there is written anew.
        ends_s: when everything is ended, by `time.time`.
        command: starts a worker; gets the names of the steps, the folder and the number of a pipe.
    """

    def __init__(self, steps: Sequence[Step], results: Path, ends_s: float, command: Sequence[str]) -> None:
        self._steps, self._results, self._ends_s, self._command = list(steps), results, ends_s, command
        self.outcomes: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        results.mkdir(parents=True, exist_ok=True)
        with (results / "steps.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)

    def run(self) -> int:
        """Exit code: 0 where every step ended well, 2 where the device cannot be measured, else 1."""
        try:
            while left := [step for step in self._steps if step.name not in self.outcomes]:
                if time.time() >= self._ends_s:
                    for step in left:
                        self._note(step, 0.0, "no time left")
                    break
                if self._run_worker(left) == NOT_READY:
                    return NOT_READY
        finally:
            self._kill()
            for partial in self._results.glob("*.partial"):
                partial.unlink()
        return int(any(outcome != "ended well" for outcome in self.outcomes.values()))

    def _run_worker(self, left: list[Step]) -> int:
        """One worker for as many steps as it lives; its exit code."""
        read_fd, write_fd = os.pipe()
        names = ",".join(step.name for step in left)
        command = [*self._command, "--worker", names, "--results", str(self._results), "--pipe", str(write_fd)]
        self._process = subprocess.Popen(command, pass_fds=[write_fd], start_new_session=True)
        os.close(write_fd)
        step, began_s, ends_s = None, time.time(), time.time() + START_LIMIT_S
        with os.fdopen(read_fd, "rb", buffering=0) as pipe, selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            text = b""
            while True:
                if not selector.select(max(0.0, min(ends_s, self._ends_s) - time.time())):
                    self._kill()
                    outcome = f"ended after {time.time() - began_s:.0f} s"
                    self._note(step or left[0], time.time() - began_s, outcome + ("" if step else ", before it began"))
                    return 1
                new = os.read(read_fd, 2**16)
                text += new
                *messages, text = text.split(b"\n")
                for message in map(json.loads, messages):
                    if "begin" in message:
                        step = next(one for one in left if one.name == message["begin"])
                        began_s, ends_s = time.time(), time.time() + step.limit_s + GRACE_S
                        print(f"\n== {step.name}, up to {step.limit_s:.0f} s", flush=True)
                    elif step is not None:
                        self._note(step, message["seconds"], message["outcome"])
                        step, began_s, ends_s = None, time.time(), time.time() + START_LIMIT_S
                if not new:
                    break
        code = self._process.wait()
        if step is not None:
            self._note(step, time.time() - began_s, f"its process died with {code}")
        elif left[0].name not in self.outcomes and code != NOT_READY:
            self._note(left[0], time.time() - began_s, f"no process can begin it, the last one died with {code}")
            return NOT_READY
        return code

    def _note(self, step: Step, seconds: float, outcome: str) -> None:
        self.outcomes[step.name] = outcome
        with (self._results / "steps.csv").open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([step.name, f"{seconds:.1f}", f"{step.limit_s:g}", outcome])
        print(f"   {step.name}: {outcome}, {seconds:.1f} s", flush=True)

    def _kill(self) -> None:
        """The worker and what it started, also where it is gone itself."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it back: go on without it
                self._process.wait(timeout=10)


def main() -> int:
    """Exit code as of `Watch.run`."""
    parser = argparse.ArgumentParser(description="tier 1 of the suite for a GPU; scripts/gpu_suite.sh calls it")
    parser.add_argument("--results", type=Path, default=Path("scripts/results"), help="rows are added here")
    parser.add_argument("--steps", default="", help="comma-separated names; default: all")
    parser.add_argument("--began", type=float, default=None, help="when the suite began, in seconds of the epoch")
    parser.add_argument("--dry-run", action="store_true", help="list the steps")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.dry_run:
        print("\n".join(lines()))
        return 0
    known = {step.name: step for step in STEPS}
    chosen = [name for name in (given.worker or given.steps).split(",") if name] or list(known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown steps {', '.join(unknown)}; known: {', '.join(known)}")
    steps = [known[name] for name in chosen]
    if given.worker:
        from gpu import worker

        with os.fdopen(given.pipe, "w") as pipe:
            worker.main(steps, given.results, pipe)
        return 0
    watch = Watch(steps, given.results, (given.began or time.time()) + TIER_1_S, [sys.executable, __file__])
    signal.signal(signal.SIGTERM, _stop)  # what was measured is there; the worker must not outlive this process
    code = watch.run()
    if watch.outcomes:
        print(f"\nsummary, rows in {given.results}:")
    for name, outcome in watch.outcomes.items():
        print(f"{name:16} {outcome}")
    return code


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
