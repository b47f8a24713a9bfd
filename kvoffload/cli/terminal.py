"""What commands and scripts write besides their results: errors in one line, progress, JSON and rows of text.

Owns the rule that an error of ours is one line on standard error and exit code 2, for `kvoffload` and for `scripts/`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from kvoffload.errors import KVOffloadError


@contextlib.contextmanager
def errors_in_one_line(program: str) -> Iterator[None]:
    """Ends `program` with one line and exit code 2 where an error of ours comes out; others are mistakes of ours."""
    try:
        yield
    except KVOffloadError as error:
        typer.echo(f"{program}: {error}", err=True)
        raise typer.Exit(2) from error


def script(main: Callable[..., None]) -> typer.Typer:
    """The command line of a script, whose errors go by the name of its file."""
    name = Path(inspect.getfile(main)).stem

    class _Script(TyperCommand):
        def make_context(self, *args: Any, **kwargs: Any) -> Any:  # where options are checked
            with errors_in_one_line(name):
                return super().make_context(*args, **kwargs)

        def invoke(self, ctx: Any) -> Any:
            with errors_in_one_line(name):
                return super().invoke(ctx)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=_Script)(main)
    return app


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
def waiting(text: str) -> Iterator[None]:
    """A line on stderr that says what is being done, while it is being done; only on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def print_json(data: dict[str, Any]) -> None:
    """On standard output, whose only content it is."""
    typer.echo(json.dumps(data, indent=1))


def print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    """A table of names and what they are."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console().print(table)
