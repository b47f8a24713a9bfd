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
from kvoffload.advise.ways import LEAST_GAIN
from kvoffload.errors import InfeasiblePlanError
from kvoffload.planning import planner

QUANTISED_BITS = 4.5  # of a weight in 4 bits with its scales, as common formats have them
ASSUMED_HOST_BYTES = 256 * 10**9  # of a machine whose host memory is not known
ENOUGH = 0.9  # of the highest rate, with which a smaller batch is preferred
LARGEST_BATCH = 4096


class StreamedBatch(NamedTuple):
    """The batch that is worth streaming for."""

    batch: int
    found: Alternative
    host_bytes: int  # that it was looked for in
    quantised: Alternative | None  # the user's own batch in 4-bit weights, the best way; None: these do not fit either
    beats_from: int | None  # the smallest batch with which streaming beats those by a margin; None: none that fits


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
    beats_from = None
    for sized in _sizes(task):
        offload = _offloaded(sized, host_bytes)
        if offload is None:
            break
        rates[sized.workload.batch] = offload
        if beside_quantised and beats_from is None:
            quantised = quantised_way(sized)
            if quantised is None or offload.tokens_per_s >= LEAST_GAIN * quantised.tokens_per_s:
                beats_from = sized.workload.batch
    if not rates:
        return None
    highest = max(one.tokens_per_s for one in rates.values())
    batch = min(size for size, one in rates.items() if one.tokens_per_s >= ENOUGH * highest)
    quantised = quantised_way(task) if beside_quantised else None
    return StreamedBatch(batch, rates[batch], host_bytes, quantised, beats_from)


def quantised_way(task: Task) -> Alternative | None:
    """The same work with decoder layers in 4 bits, on the device or with its cache offloaded; None: neither works.

    None as well where they have no more bits than that already. Bound by bytes: what it costs to dequantise is not
    counted. Nothing is said of accuracy.
    """
    if task.shape.layer_bits <= QUANTISED_BITS:
        return None
    smaller = task.in_weight_bits(QUANTISED_BITS)
    if streams_weights(smaller):
        return None
    found = [smaller.on_device()]
    try:
        settled = smaller.settled()
        found.append(settled.offload(planner.solve(settled.inputs(task.workload.cached_tokens))))
    except InfeasiblePlanError:  # then on the device alone
        found.append(None)
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
