"""What still fits: the largest batch and the longest prompt, on the device and offloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from kvoffload.advise.task import Task
from kvoffload.errors import InfeasiblePlanError
from kvoffload.planning import planner

MAX_SEARCHED = 2**24  # batches and prompts larger than this are not looked for


class Limits(NamedTuple):
    """The largest batch with these prompts, and the longest prompt with this batch; 0 where not even 1 works.

    `MAX_SEARCHED` stands for "that much or more".
    """

    largest_batch_on_device: int
    longest_prompt_on_device: int
    largest_batch_offloaded: int
    longest_prompt_offloaded: int


def limits(task: Task) -> Limits:
    """What still fits, on the device and offloaded."""

    def sized(batch: int, prompt_tokens: int) -> Task:
        return task._replace(workload=replace(task.workload, batch=batch, prompt_tokens=prompt_tokens))

    batch, prompt = task.workload.batch, task.workload.prompt_tokens
    return Limits(
        _largest(lambda n: _fits_on_device(sized(n, prompt))),
        _largest(lambda n: _fits_on_device(sized(batch, n))),
        _largest(lambda n: _can_be_offloaded(sized(n, prompt))),
        _largest(lambda n: _can_be_offloaded(sized(batch, n))),
    )


def _fits_on_device(task: Task) -> bool:
    return task.resident_bytes(task.workload.batch) <= task.free_bytes(task.workload.rows)


def _can_be_offloaded(task: Task) -> bool:
    try:
        planner.solve(task.inputs(task.workload.cached_tokens))
    except InfeasiblePlanError:
        return False
    return True


def _largest(works: Callable[[int], bool]) -> int:
    """The largest number up to `MAX_SEARCHED` that works, if all smaller ones do."""
    low, high = 0, 1
    while high <= MAX_SEARCHED and works(high):
        low, high = high, 2 * high
    if high > MAX_SEARCHED:
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low
