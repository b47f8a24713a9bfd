"""What still fits: the largest batch and the longest prompt, on the device and offloaded, and with narrower weights.

A prompt ends where the model's positions do, and what is offloaded where host memory ends: as it is known, or as much
as `ASSUMED_HOST_BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from kvoffload.advise.streaming import WIDTHS, quantised_way
from kvoffload.advise.task import Task
from kvoffload.config import GIB
from kvoffload.errors import InfeasiblePlanError
from kvoffload.machine.machine import ASSUMED_HOST_BYTES
from kvoffload.planning import planner
from kvoffload.units import counted, rate

MAX_SEARCHED = 2**24  # batches and prompts larger than this are not looked for
WORTH_TELLING = 8  # a prompt this many times shorter than the one that was asked for


class FittingPrompt(NamedTuple):
    """The longest prompt that fits on the device whole, with weights in so many bits; 0: not even one token."""

    weight_bits: int
    longest_prompt: int


class Limits(NamedTuple):
    """The largest batch with these prompts, and the longest prompt with this batch; 0 where not even 1 works.

    `MAX_SEARCHED` stands for "that much or more".
    """

    largest_batch_on_device: int
    longest_prompt_on_device: int
    largest_batch_offloaded: int
    longest_prompt_offloaded: int
    host_bytes: int = ASSUMED_HOST_BYTES  # that were looked in
    host_is_known: bool = False
    most_positions: int | None = None  # of a prompt beside the new tokens, by the model's configuration
    on_device_by_bits: tuple[FittingPrompt, ...] = ()  # with quantised weights; widths that the model has not already


def limits(task: Task) -> Limits:
    """What still fits, on the device and offloaded."""
    installed, asked = task.profile.extra.get("host_memory_bytes"), task.config.host_gib
    host_bytes = installed if isinstance(installed, int) else ASSUMED_HOST_BYTES
    is_assumed = bool(task.profile.extra.get("host_memory_is_assumed"))
    on_host = task._replace(profile=replace(task.profile, extra=task.profile.extra | {"host_memory_bytes": host_bytes}))
    batch, prompt = task.workload.batch, task.workload.prompt_tokens
    most_positions = _most_positions(task)
    most_tokens = MAX_SEARCHED if most_positions is None else most_positions

    def prompts(of: Task, works: Callable[[Task], bool]) -> int:
        return _largest(lambda n: works(_sized(of, batch, n)), most_tokens)

    def batches(of: Task, works: Callable[[Task], bool]) -> int:
        return _largest(lambda n: works(_sized(of, n, prompt)), MAX_SEARCHED)

    narrower = [(name, bits) for name, bits in WIDTHS if bits < task.shape.layer_bits]
    return Limits(
        batches(task, _fits_on_device),
        prompts(task, _fits_on_device),
        batches(on_host, _can_be_offloaded),
        prompts(on_host, _can_be_offloaded),
        host_bytes if isinstance(asked, str) else int(asked * GIB),
        not isinstance(asked, str) or (isinstance(installed, int) and not is_assumed),
        most_positions,
        tuple(FittingPrompt(name, prompts(task.in_weight_bits(bits), _fits_on_device)) for name, bits in narrower),
    )


def what_would_fit(task: Task) -> str:
    """For the message where nothing does: shorter prompts, and quantised weights with how long a prompt they leave."""
    positions = _most_positions(task)
    most = MAX_SEARCHED if positions is None else max(positions, task.workload.prompt_tokens)

    def longest(of: Task) -> int:
        return _largest(lambda n: _can_be_offloaded(_sized(of, of.workload.batch, n)), most)

    found = []
    for name, bits in WIDTHS:
        one = quantised_way(task, bits)
        if one is not None:
            parts = f" in {one.runs} parts of {one.batch}" if one.runs > 1 else ""
            found.append(
                f"this with weights in {name} bits{parts} (--w-bits {bits}, {rate(one.tokens_per_s)} tokens/s)"
            )
        elif bits < task.shape.layer_bits:
            number = longest(task.in_weight_bits(bits))
            if WORTH_TELLING * number >= task.workload.prompt_tokens:
                found.append(f"weights in {name} bits with {_long(number)}")
    batch = _largest(lambda n: _can_be_offloaded(_sized(task, n, task.workload.prompt_tokens)), task.workload.batch)
    if batch:
        found.append(f"batches of up to {batch}")
    if WORTH_TELLING * (number := longest(task)) >= task.workload.prompt_tokens:
        found.append(_long(number))
    return f". What would fit: {', '.join(found)}" if found else ""


def _most_positions(task: Task) -> int | None:
    """Tokens of a prompt beside the new ones, by the model's positions; None: it names none."""
    limit = None if task.facts is None else task.facts.position_limit
    return None if limit is None else max(0, limit - task.workload.new_tokens)


def _long(tokens: int) -> str:
    return "prompts of any length" if tokens >= MAX_SEARCHED else f"prompts of up to {counted(tokens, 'token')}"


def _sized(task: Task, batch: int, prompt_tokens: int) -> Task:
    return task._replace(workload=replace(task.workload, batch=batch, prompt_tokens=prompt_tokens))


def _fits_on_device(task: Task) -> bool:
    return task.resident_bytes(task.workload.batch) <= task.free_bytes(task.workload.rows)


def _can_be_offloaded(task: Task) -> bool:
    try:
        planner.solve(task.inputs(task.workload.cached_tokens))
    except InfeasiblePlanError:
        return False
    return True


def _largest(works: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that works, if all smaller ones do."""
    low, high = 0, 1
    while high <= most and works(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low
