"""Plans made beside the forwards: one at a time, in a thread of its own, so that no token waits for the solver.

Owns when such a plan is ready, and that one made for what does not hold any more is dropped. Does not own how it is
made (`generation_planner`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

PlanT = TypeVar("PlanT")
logger = logging.getLogger(__name__)


class PlanningAhead(Generic[PlanT]):
    """At most one plan in the making."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._pending: tuple[PlanT, Future[PlanT]] | None = None

    def start(self, before: PlanT, make: Callable[[], PlanT]) -> None:
        """Begin to make a plan, unless one is being made.

        Args:
            before: that holds now; the new one is dropped if that has changed by the time it is ready.
            make: runs in another thread.
        """
        if self._pending is None:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="kvoffload-plan")
            self._pending = (before, self._executor.submit(make))

    def take(self, before: PlanT) -> PlanT | None:
        """The plan that was made in the place of `before`, once; None while there is none or where making it failed."""
        if self._pending is None or not self._pending[1].done():
            return None
        (made_from, future), self._pending = self._pending, None
        if (error := future.exception()) is not None:
            logger.warning("the plan stays as it is, making another failed: %r", error, exc_info=error)
            return None
        return future.result() if made_from is before else None

    def close(self) -> None:
        """End the thread; a plan in the making is dropped."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor = self._pending = None
