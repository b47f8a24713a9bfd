"""What was attached to a model or moved, and how each of it is undone.

Owns that nothing is forgotten before it is undone, whatever interrupts that, so that it can be tried again. Does not
own what is done in a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Attached:
    """Steps that undo what was done, the last first. Each may be run twice: an interrupt may come at its very end."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def callback(self, step: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """Have a step run by `close`, before those that are there."""
        self._steps.append(functools.partial(step, *args, **kwargs))

    def close(self) -> None:
        """Run the steps that are left; whatever fails in one, the others are run, and that one is left.

        Raises:
            BaseException: the first that a step raised. One that was interrupted is run again before the others.
        """
        first: BaseException | None = None
        for step in reversed(tuple(self._steps)):
            try:
                try:
                    step()
                except Exception:
                    raise
                except BaseException as interrupt:
                    first = first or interrupt
                    step()
                self._steps.remove(step)
            except BaseException as error:
                first = first or error
        if first is not None:
            raise first
