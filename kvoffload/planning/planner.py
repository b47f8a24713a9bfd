"""The choice: which cached blocks stay on the device, which are transferred and which are recomputed.

Owns the plan made of the answer, and the messages when nothing fits. Does not own the options (`options`), the program
(`program`) nor what a person asked for (`config`). Solutions are memoised.

Source: KVPR (arXiv 2411.17089, section 3) for planning the split by a linear program; the integers, residency, and
the order "step time, then link bytes, then recomputation" are ours.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from kvoffload.errors import ConfigError, InfeasiblePlanError
from kvoffload.planning import step_time
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.options import Table, table_of
from kvoffload.planning.plan import Plan
from kvoffload.planning.program import EQUAL_FRACTION, best_counts, fewest_bytes
from kvoffload.planning.step_time import Counts
from kvoffload.units import gb, gib


@lru_cache(maxsize=1024)
def solve(inputs: PlanInputs) -> Plan:
    """The placement with the least predicted step time, then the least link bytes, then the fewest activations.

    At a given batch the shortest step is also the highest throughput, so `inputs.objective` changes nothing here. With
    `inputs.split` given, the share of activations among the offloaded blocks is rounded to whole blocks, moved no
    further than blocks already stored demand, and as much as fits stays resident.

    Args:
        inputs: one instance; `stored` counts are lower bounds, for planning again while a cache exists.

    Returns:
        The plan. `binding_constraint` is "host_memory" where the host limit is reached and more of it would make the
        step faster, else the longest of "link", "device" and "host". More device memory helps nearly every plan that
        offloads, so it is not named.

    Raises:
        InfeasiblePlanError: device or host memory cannot hold the cache; gives the numbers and the way out.
        ConfigError: more blocks are stored than there are.
    """
    stored = sum(inputs.stored.values())
    if stored > inputs.num_blocks:
        raise ConfigError(f"{stored} blocks are stored, but only {inputs.num_blocks} are to be placed")
    table = table_of(inputs)
    counts = best_counts(table)
    if counts is None:
        raise _infeasible(inputs, table)
    found = step_time.step_of(table, counts)
    binding = "host_memory" if _waits_for_host_memory(table, counts, found.step_s) else found.binding
    blocks = {option.name: int(n) for option, n in zip(table.options, counts, strict=True)}
    return Plan(
        num_layers=inputs.num_layers,
        num_offloaded_layers=inputs.num_offloaded_layers,
        block_tokens=inputs.block_tokens,
        chunk_blocks=inputs.chunk_blocks,
        num_slots=inputs.num_slots,
        is_segmented=inputs.is_segmented,
        blocks=blocks,
        bytes_per_token=inputs.bytes_per_token,
        predicted_step_s=found.step_s,
        full_transfer_step_s=step_time.full_transfer_step_s(inputs),
        binding_constraint=binding,
        schedule=inputs.schedule,
        weight_bytes_per_step=inputs.weight_bytes_per_step,
        weight_device_bytes=inputs.weight_device_bytes,
        num_micro_batches=inputs.num_micro_batches,
        objective=inputs.objective,
        device_bytes=inputs.fixed_device_bytes + inputs.reserved_bytes + found.bytes["device"],
        host_bytes=found.bytes["host"],
    )


def _waits_for_host_memory(table: Table, counts: Counts, step_s: float) -> bool:
    """Whether host memory is full to within one block and the step would be faster with more."""
    needed = [option.bytes.get("host", 0) for option in table.options]
    if table.capacity["host"] - int(counts @ np.array(needed, dtype=object)) >= max(needed):
        return False
    roomy = best_counts(table.with_room("host"))
    return roomy is not None and step_time.step_of(table, roomy).step_s < step_s * (1 - EQUAL_FRACTION)


def _infeasible(inputs: PlanInputs, table: Table) -> InfeasiblePlanError:
    """Says which memory is too small, by how much, and what to do."""
    stored_bytes = table.num_layers * sum(
        n * option.bytes.get("device", 0) for n, option in zip(table.stored, table.options, strict=True)
    )
    copies_bytes = inputs.reserved_bytes + (
        inputs.num_offloaded_layers * inputs.num_blocks * inputs.block_tokens * inputs.shadow_bytes_per_token
    )
    if copies_bytes and inputs.fixed_device_bytes + copies_bytes > inputs.device_bytes:
        return InfeasiblePlanError(
            f"device memory: copies for drafts take {_size(copies_bytes)} beside working buffers of "
            f"{_size(inputs.fixed_device_bytes)}, the limit is {_size(inputs.device_bytes)}: raise device_gib, or "
            "draft_cache='window'"
        )
    needed = inputs.fixed_device_bytes + stored_bytes
    if needed > inputs.device_bytes:
        return InfeasiblePlanError(
            f"device memory: working buffers{' and resident blocks' if stored_bytes else ''} need {_size(needed)}, the "
            f"limit is {_size(inputs.device_bytes)}: raise device_gib, or lower the batch"
        )
    needed = table.num_layers * fewest_bytes(table, "host")
    return InfeasiblePlanError(
        f"host memory: the KV cache needs at least {_size(needed)} beside the "
        f"{_size(inputs.device_bytes - inputs.fixed_device_bytes)} free for it on the device, the limit is "
        f"{_size(inputs.host_bytes)}: raise host_gib or device_gib, or lower max_new_tokens or the batch"
    )


def _size(num_bytes: int) -> str:
    """Bytes for a message, in both units people use."""
    return f"{gb(num_bytes)} ({gib(num_bytes)})"
