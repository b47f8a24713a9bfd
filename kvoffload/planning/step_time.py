"""The cost model: seconds of one decode step and bytes of memory, for blocks of each option of a table.

Owns every sum between the rows of a table (`options`) and a predicted step: the resources, which all overlap, the
paper's barrier, and memory. Does not own what a block of an option costs, a step played chunk by chunk (`simulation`),
the choice (`program`, `planner`) nor any measurement (`profiler/`). Numbers of many choices at once; no torch.

Source: KVPR (arXiv 2411.17089) for splitting the cache between transfer and recomputation; the terms are ours, and
differ from the paper's formula by having no barrier between layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvoffload.planning.forms import option_name
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.options import RESOURCES, Resource, Table, table_of
from kvoffload.planning.placement import PLAIN, TIERS, Tier
from kvoffload.planning.plan import Constraint

Counts = npt.NDArray[np.int64]  # [choices, options], or [options]
Seconds = npt.NDArray[np.float64]  # [choices]
# what a plan calls the resource that its step waits for; of equal ones the first
CONSTRAINTS: dict[Resource, Constraint] = {
    "h2d": "link",
    "device": "device",
    "issue": "host",
    "d2h": "link",
    "host": "host",
    "dram": "host",
}


class Costs(NamedTuple):
    """What choices cost."""

    step_s: Seconds
    by_resource: dict[Resource, Seconds]  # chunks count in "issue", what a schedule adds in "h2d"


def costs(table: Table, counts: Counts) -> Costs:
    """Seconds of a step for each of many choices."""
    layers = table.num_layers
    found: dict[Resource, Seconds] = {}
    for resource in RESOURCES:
        per_block = np.array([layers * option.seconds.get(resource, 0.0) for option in table.options])
        found[resource] = table.fixed_s.get(resource, 0.0) + counts @ per_block
    per_chunk = np.array([layers * option.chunk_s for option in table.options])
    found["issue"] = found["issue"] + -(-counts // table.chunk_blocks) @ per_chunk
    if table.schedule == "kvpr":
        found["h2d"] = found["h2d"] + _barrier_s(table, counts)
    return Costs(np.max(np.stack(list(found.values())), axis=0), found)


def _barrier_s(table: Table, counts: Counts) -> Seconds:
    """KVPR's barrier: recomputation that outlasts a layer's K/V, and attention before the next layer's activations."""
    layers, waits = table.num_layers, np.zeros(len(counts))
    any_x = np.zeros(len(counts), dtype=bool)
    for option, n in zip(table.options, counts.T, strict=True):
        if not option.link_bytes:
            continue
        if option.restore_s is not None:
            waits = waits + layers * n * option.restore_s
            any_x |= n > 0
        else:
            waits = waits - layers * n * option.seconds["h2d"]
    extra: Seconds = np.where(any_x, np.maximum(0.0, waits) + table.attention_s, 0.0)
    return extra


def allowed(table: Table, counts: Counts) -> npt.NDArray[np.bool_]:
    """Which choices keep what is stored and fit every tier, in whole bytes."""
    found: npt.NDArray[np.bool_] = np.all(counts >= np.array(table.stored), axis=1)
    found &= np.all(counts <= np.array(table.most), axis=1)
    for tier in TIERS:
        per_block = np.array([option.bytes.get(tier, 0) for option in table.options], dtype=np.int64)
        found &= counts @ per_block <= table.capacity[tier]  # bytes of one layer stay far below 64 bits
    return found


class StepTime(NamedTuple):
    """One decode step, and what its blocks take."""

    step_s: float  # the longest of the following, and of what a schedule adds
    binding: Constraint  # which it is
    link_s: float
    device_s: float
    issue_s: float
    bytes: dict[Tier, int]  # of all offloaded layers


def predict(inputs: PlanInputs, blocks: Mapping[str, int]) -> StepTime:
    """The step with these blocks of every layer, by the name of the option; everything overlaps that may.

    With `schedule="kvpr"` and activations to transfer the link takes the paper's formula plus attention, for which the
    next layer's activations wait. It assumes slots for a whole activation.
    """
    table = table_of(inputs)
    unknown = blocks.keys() - {option.name for option in table.options}
    assert not unknown, f"no option is called {', '.join(unknown)}"
    return step_of(table, np.array([blocks.get(option.name, 0) for option in table.options], dtype=np.int64))


def step_of(table: Table, counts: Counts) -> StepTime:
    """The same for one choice, [options]."""
    assert counts.sum() == table.num_blocks, "every cached block has one place"
    row = counts[None, :]
    found, plain = costs(table, row), costs(table._replace(schedule="pipelined"), row)
    step_s = float(found.step_s[0])
    held: dict[Tier, int] = {
        tier: table.num_layers
        * sum(int(n) * option.bytes.get(tier, 0) for n, option in zip(counts, table.options, strict=True))
        for tier in TIERS
    }
    link_s, device_s, issue_s = (float(plain.by_resource[resource][0]) for resource in ("h2d", "device", "issue"))
    binding = next(name for resource, name in CONSTRAINTS.items() if float(found.by_resource[resource][0]) == step_s)
    return StepTime(step_s, binding, link_s, device_s, issue_s, held)


def sequential_step_s(inputs: PlanInputs, blocks: Mapping[str, int]) -> float:
    """Seconds of one step with `overlap=False`: copies, the gap between steps and compute, one after another."""
    found = predict(inputs, blocks)
    covered_s = table_of(inputs).fixed_s["h2d"] - inputs.rates.weights_s(inputs.weight_bytes_per_step)
    return max(found.link_s - covered_s + inputs.rates.gap_s + found.device_s, found.issue_s)


def full_transfer_step_s(inputs: PlanInputs) -> float:
    """Predicted seconds of plain full transfer with as many kv blocks resident as fit.

    The reference every plan is compared with, so stored blocks, the host limit and copies are left out of account.
    """
    room_bytes = (inputs.device_bytes - inputs.fixed_device_bytes) // max(1, inputs.num_offloaded_layers)
    block_bytes = inputs.block_tokens * inputs.bytes_per_token[PLAIN]
    resident = min(inputs.num_blocks, max(0, room_bytes) // max(1, block_bytes))
    blocks = {option_name(PLAIN, "device"): resident, option_name(PLAIN, "host"): inputs.num_blocks - resident}
    return predict(inputs, blocks).step_s


def plain_step_s(inputs: PlanInputs) -> float:
    """Predicted seconds of a step of plain generation, with weights and the whole cache on the device.

    Whether they fit there is left out of account.
    """
    whole = replace(inputs, schedule="pipelined", weight_bytes_per_step=0)
    found = predict(whole, {option_name(PLAIN, "device"): inputs.num_blocks})
    return max(found.device_s, found.issue_s)
