"""An interrupt at any line of ours, as a KeyboardInterrupt comes. Not a test module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def lines_of(call: Callable[[], object], files: tuple[str, ...]) -> int:
    """How many lines of these files a call runs."""
    return _Interrupter(files, None).run(call)


def interrupted(call: Callable[[], object], files: tuple[str, ...], at: int) -> bool:
    """Make a call that is interrupted before the line of that number in these files; whether there was one."""
    try:
        _Interrupter(files, at).run(call)
    except KeyboardInterrupt:
        return True
    return False


class _Interrupter:
    def __init__(self, files: tuple[str, ...], at: int | None) -> None:
        self._files, self._at, self._lines = files, at, 0

    def run(self, call: Callable[[], object]) -> int:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            call()
        finally:
            sys.settrace(before)
        return self._lines

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._step if frame.f_code.co_filename.endswith(self._files) else None

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self._lines += 1
            if self._lines - 1 == self._at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._step
