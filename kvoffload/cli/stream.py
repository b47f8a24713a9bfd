"""An answer on its way to the terminal, token by token, in whole words; and how it is stopped.

Owns where its lines end: a word that does not fit goes to the next line as soon as that is known. Where standard output
is no terminal the text comes as it is.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.cells import cell_len
from transformers import TextStreamer

from kvoffload.cli.terminal import CLEAR_LINE, width

_PIECES = re.compile(r"\n|[^\S\n]+|\S+")


class Lines:
    """Breaks what is written bit by bit into lines, between words.

    Args:
        columns: that a line may have.
        write: takes text for the terminal.
    """

    def __init__(self, columns: int, write: Callable[[str], Any]) -> None:
        self._last = columns - 1  # a cursor behind the last column stands differently in every terminal
        self._write = write
        self._column = 0
        self._word = ""  # as far as it is written

    def put(self, text: str) -> None:
        """More text, which may begin or end in the middle of a word."""
        for piece in _PIECES.findall(text.replace("\x1b", "")):
            if piece == "\n":
                self._break()
            elif piece.isspace():
                self._word = ""
                self._put(piece) if self._column + len(piece) <= self._last else self._break()
            elif cell_len(piece) > len(piece):  # wide characters, between any two of which a line may end
                for char in piece:
                    self._word = ""
                    self._put_word(char)
            else:
                self._put_word(piece)

    def _put_word(self, piece: str) -> None:
        cells, before = cell_len(piece), cell_len(self._word)
        fits_alone = before + cells <= self._last
        if self._column + cells > self._last and self._column > before and fits_alone:
            word = self._word
            self._write("\b" * before + "\x1b[K" * bool(before))
            self._break()
            self._put(word)
            self._word = word
        self._put(piece)
        self._word += piece

    def _put(self, text: str) -> None:
        self._write(text)
        self._column = (self._column + cell_len(text)) % (self._last + 1)

    def _break(self) -> None:
        self._write("\n")
        self._column, self._word = 0, ""


class Stream(TextStreamer):
    """Prints an answer while it is generated.

    Args:
        tokenizer: of the model.
        is_silent: print nothing; only take note that tokens come.
    """

    def __init__(self, tokenizer: Any, *, is_silent: bool = False) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        columns = width() if sys.stdout.isatty() else None
        self._is_silent = is_silent
        self._lines = None if columns is None else Lines(columns, sys.stdout.write)
        self.has_begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is certain by now; at the end also end the line."""
        if not self.has_begun and (text or stream_end):
            self.has_begun = True
            tell_for_now("")
            text = text.lstrip()
        if self._is_silent:
            return
        text += "\n" * stream_end
        if self._lines is None:
            sys.stdout.write(text)
        else:
            self._lines.put(text)
        sys.stdout.flush()


def tell_for_now(text: str) -> None:
    """A line on standard error, if that is a terminal, over which whatever comes next is written; "" takes it away."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{CLEAR_LINE}\x1b[2m{text}\x1b[0m\r" if text else CLEAR_LINE)
        sys.stderr.flush()


class Stop:
    """A stopping criterion that somebody else decides: at the next token, when the cache is whole."""

    def __init__(self) -> None:
        self.is_asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.is_asked, device=input_ids.device)


@contextlib.contextmanager
def stopped_by_interrupt(on_first: Callable[[], None] = lambda: None) -> Iterator[Stop]:
    """While it is open, Ctrl-C asks for a stop at the next token; the second one raises KeyboardInterrupt at once.

    Args:
        on_first: called when the first comes.
    """
    stop = Stop()

    def interrupt(number: int, frame: Any) -> None:
        if stop.is_asked:
            raise KeyboardInterrupt
        stop.is_asked = True
        on_first()

    if threading.current_thread() is not threading.main_thread():  # only there signals arrive
        yield stop
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
