"""What commands and scripts write besides their results: errors in one line, text in whole words, JSON, rows of text.

Owns the rule that an error of ours is one line on standard error and exit code 2, for `kvoffload` and for `scripts/`,
and where lines end: at the width of the terminal or of COLUMNS, never in a word; in a file or a pipe without COLUMNS a
line is as long as it is. Does not own what moves on a terminal while something is done (`waits`).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from kvoffload.cli.waits import progress, waiting
from kvoffload.errors import KVOffloadError

__all__ = ["errors_in_one_line", "print_json", "print_rows", "print_text", "progress", "script", "waiting", "width"]

TABLE_WIDTH = 80  # of rich, where neither a terminal nor COLUMNS says how wide one may be
CLEAR_LINE = "\r\x1b[K"


@contextlib.contextmanager
def errors_in_one_line(program: str) -> Iterator[None]:
    """Ends `program` with one line and exit code 2 where an error of ours comes out; others are mistakes of ours."""
    try:
        yield
    except KVOffloadError as error:
        print_text(f"{program}: {error}", err=True)
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


class LogLines(logging.Handler):
    """Log messages as lines on standard error, above whatever moves there."""

    def emit(self, record: logging.LogRecord) -> None:
        """One message, in whole words."""
        clear = CLEAR_LINE if sys.stderr.isatty() else ""
        print_text(self.format(record), err=True, before=clear)


def width(*, err: bool = False) -> int | None:
    """Columns that a line may have; None where it may be of any length."""
    stream = sys.stderr if err else sys.stdout
    given = os.environ.get("COLUMNS", "")
    if not stream.isatty():
        return int(given) if given.isdigit() and int(given) else None
    return shutil.get_terminal_size().columns


def print_text(
    text: str, *, err: bool = False, style: str = "", before: str = "", is_below_table: bool = False
) -> None:
    """Text in whole words.

    Args:
        text: lines; each is wrapped by itself.
        err: to standard error.
        style: "dim", "bold" or a colour, on a terminal.
        before: written first, as it is.
        is_below_table: also where a line may be of any length it is as wide as a table there.
    """
    columns = width(err=err) or (TABLE_WIDTH if is_below_table else None)
    if columns is not None:
        wrap = textwrap.TextWrapper(width=columns, break_long_words=False, break_on_hyphens=False)
        text = "\n".join(part for line in text.split("\n") for part in wrap.wrap(line) or [""])
    if style in ("dim", "bold"):
        text = typer.style(text, dim=style == "dim" or None, bold=style == "bold" or None)
    elif style:
        text = typer.style(text, fg=style)
    typer.echo(before + text, err=err)


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
