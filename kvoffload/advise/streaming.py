"""Weights that do not fit on the device: the batch that pays for them, and what quantised weights would do instead.

Owns the search for that batch, and the same model in 4-bit weights. Does not own the figures of a way (`task`).

Every forward reads all streamed weights over the link, whatever the batch: tokens per second grow with it until the
cache, or the device, takes longer than the weights (FlexGen, arXiv 2303.06865, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from kvoffload.advise.task import Alternative, Task
from kvoffload.errors import InfeasiblePlanError
from kvoffload.machine.machine import ASSUMED_HOST_BYTES
from kvoffload.planning import planner
from kvoffload.planning.plan import Plan

QUANTISED_BITS = 4.5  # of a weight in 4 bits with its scales, as common formats have them
WIDTHS = ((8, 8.5), (4, QUANTISED_BITS))  # of quantised weights, by their name and with scales
ENOUGH = 0.9  # of the highest rate, with which a smaller batch is preferred
LARGEST_BATCH = 4096


class StreamedBatch(NamedTuple):
    """The batch that is worth streaming for."""

    batch: int
    found: Alternative
    host_bytes: int  # that it was looked for in
    quantised: Alternative | None  # the same batch in 4-bit weights, the best way; None: these do not fit either


def streams_weights(task: Task) -> bool:
    """Whether some of the model's weights have to cross the link in every forward."""
    return task.kept_layers(task.workload.rows) is not None


def best_batch(task: Task, *, beside_quantised: bool = True) -> StreamedBatch | None:
    """The smallest batch that comes close to the most tokens per second, at the workload's lengths; None: none works.

    Batches are powers of two, as many as host memory holds beside the weights.

    Args:
        task: whose weights are streamed.
        beside_quantised: whether weights in 4 bits are looked at as well, which takes as long again.
    """
    installed = task.profile.extra.get("host_memory_bytes")
    host_bytes = installed if isinstance(installed, int) else ASSUMED_HOST_BYTES
    rates: dict[int, Alternative] = {}
    for sized in _sizes(task):
        offload = _offloaded(sized)
        if offload is None or offload.plan.host_bytes + sized.shape.weight_bytes > host_bytes:
            break
        rates[sized.workload.batch] = offload.found
    if not rates:
        return None
    highest = max(one.tokens_per_s for one in rates.values())
    batch = min(size for size, one in rates.items() if one.tokens_per_s >= ENOUGH * highest)
    best = task._replace(workload=replace(task.workload, batch=batch))
    return StreamedBatch(batch, rates[batch], host_bytes, quantised_way(best) if beside_quantised else None)


def quantised_way(task: Task, bits: float = QUANTISED_BITS) -> Alternative | None:
    """The same work with decoder layers in 4 bits, on the device or with its cache offloaded; None: neither works.

    None as well where they have no more bits than that already. Bound by bytes: what it costs to dequantise is not
    counted. Nothing is said of accuracy.

    Args:
        task: with the weights as they are.
        bits: of each weight instead, scales included.
    """
    if task.shape.layer_bits <= bits:
        return None
    smaller = task.in_weight_bits(bits)
    offload = None if streams_weights(smaller) else _offloaded(smaller)
    found = [smaller.on_device()]
    if offload is not None:
        rounds = offload.task.rounds()
        found += [offload.found, None if rounds is None else offload.task.drafted(offload.found, rounds)]
    return min((one for one in found if one is not None), key=lambda one: one.total_s, default=None)


def _sizes(task: Task) -> Iterator[Task]:
    batch = 1
    while batch * task.workload.num_beams <= LARGEST_BATCH:
        yield task._replace(workload=replace(task.workload, batch=batch))
        batch *= 2


class _Offloaded(NamedTuple):
    """A task with its cache offloaded."""

    task: Task  # settled
    plan: Plan
    found: Alternative


def _offloaded(task: Task) -> _Offloaded | None:
    """With its cache offloaded; None where a memory is too small."""
    try:
        task = task.settled()
        plan = planner.solve(task.inputs(task.workload.cached_tokens))
        return _Offloaded(task, plan, task.offload(plan))
    except InfeasiblePlanError:
        return None
