"""The best way at every size of a grid of batches and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from kvoffload.advise.capacity import MAX_SEARCHED
from kvoffload.advise.comparison import compare_ways
from kvoffload.advise.task import Task
from kvoffload.advise.ways import Way, best_of
from kvoffload.errors import ConfigError
from kvoffload.units import count


class BestAtSize(NamedTuple):
    """The best way at one size."""

    batch: int
    prompt_tokens: int
    name: Way | None  # None where nothing works
    tpot_s: float
    tokens_per_s: float
    offload_tokens_per_s: float  # 0 where it does not work


class Grid(NamedTuple):
    """Sizes of a sweep."""

    batches: list[int]
    prompts: list[int]


def sweep(task: Task, batches: list[int], prompts: list[int]) -> tuple[BestAtSize, ...]:
    """The best way at every size of a grid."""
    return tuple(_cells(task, batches, prompts))


def _cells(task: Task, batches: list[int], prompts: list[int]) -> Iterator[BestAtSize]:
    for batch in batches:
        for prompt in prompts:
            workload = replace(task.workload, batch=batch, prompt_tokens=prompt)
            rows = compare_ways(task._replace(workload=workload))
            possible = [row for row in rows if not row.problem]
            offloaded = max((row.tokens_per_s for row in possible if row.name in ("offload", "drafts")), default=0.0)
            best = best_of({row.name: row.total_s for row in possible})
            if best is None:
                yield BestAtSize(batch, prompt, None, 0.0, 0.0, 0.0)
            else:
                row = next(row for row in possible if row.name == best)
                yield BestAtSize(batch, prompt, best, row.tpot_s, row.tokens_per_s, offloaded)


def grid(text: str | None) -> Grid:
    """The batches and prompts of a sweep, from a text such as "1,8,64:1024,8192"; empty for None.

    Raises:
        ConfigError: no such text.
    """
    if text is None:
        return Grid([], [])
    try:
        batches, prompts = ([int(one) for one in part.split(",")] for part in text.split(":"))
    except ValueError as error:
        raise ConfigError(f"a sweep is batches and prompts such as 1,8,64:1024,8192, got {text!r}") from error
    if min(*batches, *prompts) < 1 or max(*batches, *prompts) > MAX_SEARCHED:
        raise ConfigError(f"batches and prompts of a sweep go from 1 to {count(MAX_SEARCHED)}, got {text!r}")
    return Grid(batches, prompts)
