"""What a workload will take, use and cost, each way it can be done.

Owns the comparison in figures. Does not own the time and memory of a way (`task`), the choice of a placement
(`kvoffload/planning/`) or the recommendation (`advice`). Torch-free.

TTFT is the prefill of the first run, TPOT a decode step at the mean context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from kvoffload.advise.economics import MILLION, Economics
from kvoffload.advise.task import Alternative, Task
from kvoffload.advise.utilization import decode_mbu, peak_flops_per_s
from kvoffload.advise.ways import AS_THEY_ARE, Way
from kvoffload.errors import InfeasiblePlanError
from kvoffload.planning import planner, step_time
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.plan import Plan
from kvoffload.units import gb


class WayFigures(NamedTuple):
    """One way to do the workload; all numbers are 0 where `problem` says why it cannot be done."""

    name: Way
    problem: str
    batch: int = 0  # sequences at once
    runs: int = 0
    prefill_s: float = 0.0  # of one run
    ttft_s: float = 0.0
    step_s: float = 0.0  # at the mean context
    tpot_s: float = 0.0
    total_s: float = 0.0
    tokens_per_s: float = 0.0  # new tokens of all sequences, over everything
    link_utilization: float = 0.0  # of a step
    device_utilization: float = 0.0  # of a step
    device_bytes: int = 0
    host_bytes: int = 0
    tokens_per_pass: float = 1.0  # over the link
    mfu: float = 0.0
    mbu: float = 0.0
    price_per_million_prompt_tokens: float | None = None
    price_per_million_new_tokens: float | None = None
    energy_j: float | None = None  # of everything, at the board's full power
    co2_g: float | None = None
    co2_g_per_million_new_tokens: float | None = None  # of decoding alone


def compare_ways(task: Task, economics: Economics | None = None) -> tuple[WayFigures, ...]:
    """Every way to do `task`, in the order of `ways`."""
    money = economics or Economics()
    rows = [*_on_device(task, money)]
    for name, changes in (
        ("offload", {}),
        ("full_transfer", {"split": "transfer"} | AS_THEY_ARE),
        ("kvpr", {"split": "auto", "schedule": "kvpr"} | AS_THEY_ARE),
    ):
        rows.append(_offloaded(name, task._replace(config=replace(task.config, **changes)), money))  # type: ignore[arg-type]
        if name == "offload" and not rows[-1].problem and (drafted := _drafted(rows[-1], task, money)) is not None:
            rows.append(drafted)
    return tuple(rows)


def _drafted(offloaded: WayFigures, task: Task, money: Economics) -> WayFigures | None:
    """Offloading with verified drafts at the assumed acceptance; None where they gain nothing."""
    task = task.settled()
    rounds = task.rounds()
    if rounds is None:
        return None
    mean_inputs, inputs = (
        replace(task.inputs(tokens, has_shadow=rounds.reads_all), is_plain_on_device=not rounds.reads_all)
        for tokens in (task.mean_tokens(), task.workload.cached_tokens)
    )
    mean, chosen = planner.solve(mean_inputs), planner.solve(inputs)
    found = task.drafted(task.offload(planner.solve(task.inputs(task.workload.cached_tokens))), rounds)
    found = found._replace(device_bytes=task.device_weight_bytes + chosen.device_bytes)
    row = _figures("drafts", task, found, mean_inputs, mean, money)
    # of a round, in which everything that a step moves is moved once
    share = offloaded.step_s / rounds.round_s
    crossing, idle = (
        step_time.predict(mean_inputs, blocks) for blocks in (mean.blocks, {"resident_kv": mean_inputs.num_blocks})
    )
    return row._replace(
        host_bytes=chosen.host_bytes * chosen.num_blocks // max(1, chosen.count(tier="host")),  # of all blocks
        link_utilization=min(1.0, (crossing.link_s - idle.link_s + _weights_s(mean_inputs)) / rounds.round_s),
        device_utilization=min(1.0, 1 - max(0.0, 1 - offloaded.device_utilization) * share),
        mbu=offloaded.mbu * share,
        tokens_per_pass=rounds.tokens,
    )


def _on_device(task: Task, money: Economics) -> Iterator[WayFigures]:
    """Both ways without offloading, of which one says why it is none."""
    found = task.on_device()
    needed, free = task.resident_bytes(task.workload.batch), task.free_bytes(task.workload.rows)
    memory, weights = task.profile.device_memory_bytes, task.shape.weight_bytes
    short = f"the cache needs {gb(needed)} where {gb(max(0, free))} are free"
    if weights >= memory:
        short = f"weights take {gb(weights)} of {gb(memory)}"
    if found is None:
        yield WayFigures("on_device", short)
        yield WayFigures("sub_batches", "not even one sequence fits")
        return
    inputs = task.inputs(task.mean_tokens(), found.batch)
    row = _figures("on_device", task, found, inputs, None, money)
    if found.runs == 1:
        yield row
        yield WayFigures("sub_batches", "the whole batch fits")
    else:
        yield WayFigures("on_device", short)
        yield row._replace(name="sub_batches")


def _offloaded(name: Way, task: Task, money: Economics) -> WayFigures:
    try:
        task = task.settled()
        chosen = planner.solve(task.inputs(task.workload.cached_tokens))
        inputs = task.inputs(task.mean_tokens())
        mean = planner.solve(inputs)
        found = task.offload(chosen)
    except InfeasiblePlanError as error:
        return WayFigures(name, str(error))
    host_bytes = chosen.host_bytes + task.host_weight_bytes
    return _figures(name, task, found, inputs, mean, money)._replace(host_bytes=host_bytes)


def _figures(
    name: Way, task: Task, found: Alternative, inputs: PlanInputs, mean: Plan | None, money: Economics
) -> WayFigures:
    """All figures of one way; `mean` is its placement at the mean context, None without offloading."""
    workload, profile = task.workload, task.profile
    step = step_time.predict(inputs, mean.blocks if mean else {"resident_kv": inputs.num_blocks})
    idle = step_time.predict(inputs, {"resident_kv": inputs.num_blocks})  # nothing of the cache crosses the link
    flops = task.prefill_flops(found.batch) + (workload.new_tokens - 1) * task.step_flops(found.batch)
    new_tokens = workload.batch * workload.new_tokens
    decode_s = found.total_s - found.runs * found.prefill_s
    energy_j = co2_g = decode_co2_g = None
    if money.power_w is not None:
        energy_j = money.power_w * found.total_s
        if money.grid_g_per_kwh is not None:
            co2_g = energy_j / 3.6e6 * money.grid_g_per_kwh  # joules of a kilowatt-hour
            decode_co2_g = co2_g * decode_s / found.total_s / new_tokens * MILLION
    return WayFigures(
        name=name,
        problem="",
        batch=found.batch,
        runs=found.runs,
        prefill_s=found.prefill_s,
        ttft_s=found.prefill_s,
        step_s=found.step_s,
        tpot_s=found.step_s,
        total_s=found.total_s,
        tokens_per_s=found.tokens_per_s,
        link_utilization=min(1.0, (step.link_s - idle.link_s + _weights_s(inputs)) / found.step_s),
        device_utilization=min(1.0, (step.device_s + task.tail_s(inputs)) / found.step_s),
        device_bytes=found.device_bytes,
        mfu=found.runs * flops / (peak_flops_per_s(profile) * found.total_s),
        mbu=decode_mbu(task, found.batch, found.step_s),
        price_per_million_prompt_tokens=_price(
            money, found.runs * found.prefill_s, workload.batch * workload.prompt_tokens
        ),
        price_per_million_new_tokens=_price(money, decode_s, new_tokens),
        energy_j=energy_j,
        co2_g=co2_g,
        co2_g_per_million_new_tokens=decode_co2_g,
    )


def _weights_s(inputs: PlanInputs) -> float:
    """Of a step, in which streamed weights cross the link."""
    return inputs.rates.weights_s(inputs.weight_bytes_per_step)


def _price(money: Economics, seconds: float, tokens: int) -> float | None:
    return None if money.price_per_hour is None else money.price_per_hour * seconds / 3600 / tokens * MILLION
