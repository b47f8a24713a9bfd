"""What moves on a terminal while something takes its time: a bar, a spinner, steps with their seconds.

All of it on standard error, and only where that is a terminal. Does not own lines that stay (`terminal`).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import typer

from kvoffload.units import duration

LEAST_S = 2.0  # of a step, before its time is said


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[str, float], None] | None]:
    """A progress bar on stderr, only on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda what, share: bar.update(task, completed=share, description=f"{title} {what}")


@contextlib.contextmanager
def waiting(text: str, *, otherwise: bool = False) -> Iterator[None]:
    """A line on stderr that says what is being done and for how long, while it is being done; only on a terminal.

    Args:
        text: what is being done.
        otherwise: say it also where there is no terminal, in a line that stays.
    """
    if not sys.stderr.isatty():
        if otherwise:
            typer.echo(text, err=True)
        yield
        return
    with steps() as tell:
        tell(text)
        yield


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Tells what is done now; on a terminal the step in hand moves and shows its seconds, and what is said stays.

    Only the steps before the last stay; of a `waiting` none does. A text that is indented is what came of the step in
    hand so far, which goes on.
    """
    if not sys.stderr.isatty():
        yield lambda text: typer.echo(text, err=True)
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column
    from rich.text import Text

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("", total=None, visible=False)
        said, began = "", 0.0  # the step in hand, until it is printed

        def tell(text: str) -> None:
            nonlocal said, began
            took_s = time.perf_counter() - began
            is_result = text.startswith(" ")
            if said:
                is_long = took_s >= LEAST_S and not is_result
                console.print(Text(said + f" ({duration(took_s)})" * is_long, style="dim"))
            if is_result:
                console.print(Text(text, style="dim"))
                said = ""
            else:
                said, began = text, time.perf_counter()
                bar.reset(task, description=text, visible=True)

        yield tell
