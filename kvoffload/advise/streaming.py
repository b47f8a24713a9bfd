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
        offload = _offloaded(sized, host_bytes)
        if offload is None:
            break
        rates[sized.workload.batch] = offload
    if not rates:
        return None
    highest = max(one.tokens_per_s for one in rates.values())
    batch = min(size for size, one in rates.items() if one.tokens_per_s >= ENOUGH * highest)
    best = task._replace(workload=replace(task.workload, batch=batch))
    return StreamedBatch(batch, rates[batch], host_bytes, quantised_way(best) if beside_quantised else None)


def quantised_way(task: Task, bits: float = QUANTISED_BITS) -> Alternative | None:
    """The same work with decoder layers in 4 bits, on the device or with its cache offloaded; None: neither works.

    `bits` of each weight, scales included.

    None as well where they have no more bits than that already. Bound by bytes: what it costs to dequantise is not
    counted. Nothing is said of accuracy.
    """
    if task.shape.layer_bits <= bits:
        return None
    smaller = task.in_weight_bits(bits)
    found = [smaller.on_device()]
    try:
        if not streams_weights(smaller):
            settled = smaller.settled()
            offload = settled.offload(planner.solve(settled.inputs(task.workload.cached_tokens)))
            rounds = settled.rounds()
            found += [offload, None if rounds is None else settled.drafted(offload, rounds)]
    except InfeasiblePlanError:
        pass  # then on the device alone
    return min((one for one in found if one is not None), key=lambda one: one.total_s, default=None)


def _sizes(task: Task) -> Iterator[Task]:
    batch = 1
    while batch * task.workload.num_beams <= LARGEST_BATCH:
        yield task._replace(workload=replace(task.workload, batch=batch))
        batch *= 2


def _offloaded(task: Task, host_bytes: int) -> Alternative | None:
    """With streamed weights and an offloaded cache; None where a memory is too small."""
    try:
        task = task.settled()
        chosen = planner.solve(task.inputs(task.workload.cached_tokens))
        found = task.offload(chosen)
    except InfeasiblePlanError:
        return None
    return found if chosen.host_bytes + task.shape.weight_bytes <= host_bytes else None
