"""The sweep over many types: processes, one type at a time in each, within a time limit.

Owns the processes and their end. A type that crashes its process or takes too long becomes a row that says so, and
the next type gets a new process. Does not judge (`sweep`).
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import transformers

from campaign.rows import Row
from campaign.sweep import CellVerdict, Report, verdict_of
from campaign.sweep_cells import CELLS
from campaign.sweep_rows import row_of

LIMIT_S = 180.0  # for one type
START_LIMIT_S = 120.0  # for a process to import everything

Judge = Callable[[str, Iterable[tuple[str, str]], Callable[[str], Any]], Report]


def run(
    types: Iterable[str],
    on_row: Callable[[Row], None],
    *,
    cells: tuple[tuple[str, str], ...] = CELLS,
    jobs: int = 1,
    limit_s: float = LIMIT_S,
    judge: Judge = verdict_of,
) -> None:
    """Judge each type; `on_row` is called with each row as it comes.

    Args:
        types: model types of transformers.
        on_row: called in this process.
        cells: modes and ways to judge.
        jobs: processes at once.
        limit_s: for one type, after which its process is ended.
        judge: what is done with a type, in another process.
    """
    waiting = list(reversed(list(types)))
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker(judge, cells))
                workers[-1].give(waiting.pop(), limit_s)
            ready = wait([worker.connection for worker in workers], timeout=1.0)
            for worker in list(workers):
                row = worker.take() if worker.connection in ready else worker.late()
                if row is None:
                    continue
                on_row(row)
                if worker.is_alive and waiting:
                    worker.give(waiting.pop(), limit_s)
                else:
                    worker.end()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that judges one type at a time."""

    def __init__(self, judge: Judge, cells: tuple[tuple[str, str], ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, judge, cells), daemon=True)
        self._process.start()
        theirs.close()
        self.is_alive = True
        self._type, self._stage, self._began, self._limit_s = "", "", 0.0, 0.0

    def give(self, model_type: str, limit_s: float) -> None:
        self._type, self._stage, self._limit_s, self._began = model_type, "", limit_s, time.monotonic()
        self.connection.send(model_type)

    def take(self) -> Row | None:
        """A row, or None where the process only said where it is."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            return self._lost(f"the process ended with code {self._process.exitcode}")
        if isinstance(message, str):
            if not self._stage:
                self._began = time.monotonic()
            self._stage = message
            return None
        row: Row = message
        return row

    def late(self) -> Row | None:
        """A row once the type has taken too long."""
        limit_s = self._limit_s if self._stage else max(self._limit_s, START_LIMIT_S)
        if time.monotonic() - self._began < limit_s:
            return None
        return self._lost(f"took longer than {limit_s:g} s")

    def end(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()

    def _lost(self, why: str) -> Row:
        """The row of a type that gave none: nothing is said of it where transformers alone was at work."""
        self.is_alive = False
        seconds = time.monotonic() - self._began
        reason = f"{why} at: {self._stage or 'start'}"
        mode, _, way = self._stage.partition("/")
        lost = Report(self._type, seconds=seconds)
        if not way:
            return row_of(lost._replace(plain=reason))
        return row_of(lost._replace(verdicts={(mode, way): CellVerdict("error", reason)}))


def _work(connection: Connection, judge: Judge, cells: tuple[tuple[str, str], ...]) -> Any:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    while True:
        try:
            model_type = connection.recv()
        except EOFError:
            return
        connection.send(row_of(judge(model_type, cells, connection.send)))
