"""A progress bar while gigabytes of host memory are being made ready; on a terminal only."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

LEAST_BYTES = 2**30  # below this it is over before anybody could read


class AllocationProgress:
    """Follows memory that grows to an expected size.

    Args:
        console: where to draw; standard error where None.
        task: what is done, in words.
    """

    def __init__(self, console: Console | None = None, *, task: str = "allocating host memory for the cache") -> None:
        self._task = task
        self._console = console or Console(stderr=True)
        self._expected_bytes = 0
        self._progress: Progress | None = None

    def expect(self, total_bytes: int) -> None:
        """What the pool will hold in the end."""
        self._expected_bytes = total_bytes

    def update(self, held_bytes: int) -> None:
        """What the pool holds now."""
        if self._progress is None:
            missing = self._expected_bytes - held_bytes
            if not self._console.is_terminal or self._expected_bytes < LEAST_BYTES or missing <= 0:
                return
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.start()
            self._progress.add_task(self._task, total=self._expected_bytes)
        self._progress.update(self._progress.task_ids[0], completed=held_bytes)
        if held_bytes >= self._expected_bytes:
            self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
