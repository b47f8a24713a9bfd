"""What a workload will take, use and cost, each way it can be done; what still fits; and the same over a grid of sizes.

Owns the comparison in figures. Does not own the time and memory of a way (`ways`), the choice of a placement
(`planner`) or the recommendation (`advice`). Torch-free.

    no offload       the whole batch on the device
    sub-batches      the largest part of it that fits, as often as needed
    offload          the plan: residency, transfer and recomputation in one pipeline
    full transfer    the same without recomputation
    paper's schedule KVPR's barrier between layers (arXiv 2411.17089)

TTFT is the prefill of the first run, TPOT a decode step at the mean context. MFU: operations of the model over the
whole task as a share of what the device's peak would do in that time. MBU: bytes of weights and cache that a decode
step cannot do without, as a share of what the memory's bandwidth would move in that step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from kvoffload.advise.task import Alternative, Task
from kvoffload.errors import ConfigError, InfeasiblePlanError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.planning import planner, step_time
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.plan import Plan
from kvoffload.units import count, gb

Name = Literal["no offload", "sub-batches", "offload", "full transfer", "paper's schedule"]
MAX_SEARCHED = 2**24  # batches and prompts larger than this are not looked for
MILLION = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Economics:
    """What the device's time is worth, all of it a user's number; None leaves out what follows from it.

    Args:
        price_per_hour: money per hour of the device.
        power_w: what the board draws while it works.
        grid_g_per_kwh: grams of CO2 per kilowatt-hour of the electricity used.
    """

    price_per_hour: float | None = None
    power_w: float | None = None
    grid_g_per_kwh: float | None = None

    def __post_init__(self) -> None:
        for name, highest in (("price_per_hour", 1e6), ("power_w", 1e5), ("grid_g_per_kwh", 5000.0)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= highest:
                raise ConfigError(f"{name} must be a number from 0 to {highest:g}, got {value!r}")

    @classmethod
    def of(cls, profile: HardwareProfile, price_per_hour: float | None, grid_g_per_kwh: float | None) -> Economics:
        """With power, and the price where none is given, from the profile's datasheet."""
        sheet = profile.extra.get("datasheet", {})
        price = sheet.get("price_per_hour") if price_per_hour is None else price_per_hour
        return cls(price_per_hour=price, power_w=sheet.get("power_w"), grid_g_per_kwh=grid_g_per_kwh)


class WayFigures(NamedTuple):
    """One way to do the workload; all numbers are 0 where `problem` says why it cannot be done."""

    name: Name
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
    mfu: float = 0.0
    mbu: float = 0.0
    price_per_million_prompt_tokens: float | None = None
    price_per_million_new_tokens: float | None = None
    energy_j: float | None = None  # of everything, at the board's full power
    co2_g: float | None = None
    co2_g_per_million_new_tokens: float | None = None  # of decoding alone


class Limits(NamedTuple):
    """The largest batch with these prompts, and the longest prompt with this batch; 0 where not even 1 works.

    `MAX_SEARCHED` stands for "that much or more".
    """

    largest_batch_on_device: int
    longest_prompt_on_device: int
    largest_batch_offloaded: int
    longest_prompt_offloaded: int


class FastestAtSize(NamedTuple):
    """The fastest way at one size."""

    batch: int
    prompt_tokens: int
    name: Name | None  # None where nothing works
    tpot_s: float
    tokens_per_s: float
    offload_tokens_per_s: float  # 0 where it does not work


class Grid(NamedTuple):
    """Sizes of a sweep."""

    batches: list[int]
    prompts: list[int]


class Comparison(NamedTuple):
    """Everything that is foreseen of one task."""

    rows: tuple[WayFigures, ...]
    limits: Limits
    cells: tuple[FastestAtSize, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "forecast": [row._asdict() for row in self.rows],
            "limits": self.limits._asdict(),
            "sweep": [cell._asdict() for cell in self.cells],
        }


def compare(task: Task, money: Economics, over: Grid) -> Comparison:
    """The ways of `task`, its limits, and a sweep over `over`."""
    return Comparison(compare_ways(task, money), limits(task), sweep(task, over.batches, over.prompts))


def compare_ways(task: Task, economics: Economics | None = None) -> tuple[WayFigures, ...]:
    """Every way to do `task`, in the order of the module's list."""
    money = economics or Economics()
    rows = [*_on_device(task, money)]
    for name, changes in (
        ("offload", {}),
        ("full transfer", {"split": "transfer"}),
        ("paper's schedule", {"split": "auto", "schedule": "kvpr"}),
    ):
        rows.append(_offloaded(name, task._replace(config=replace(task.config, **changes)), money))  # type: ignore[arg-type]
    return tuple(rows)


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


def sweep(task: Task, batches: list[int], prompts: list[int]) -> tuple[FastestAtSize, ...]:
    """The fastest way at every size of a grid."""
    return tuple(_cells(task, batches, prompts))


def _cells(task: Task, batches: list[int], prompts: list[int]) -> Iterator[FastestAtSize]:
    for batch in batches:
        for prompt in prompts:
            workload = replace(task.workload, batch=batch, prompt_tokens=prompt)
            rows = compare_ways(task._replace(workload=workload))
            possible = [row for row in rows if not row.problem]
            offloaded = next((row.tokens_per_s for row in possible if row.name == "offload"), 0.0)
            best = max(possible, key=lambda row: row.tokens_per_s, default=None)
            if best is None:
                yield FastestAtSize(batch, prompt, None, 0.0, 0.0, 0.0)
            else:
                yield FastestAtSize(batch, prompt, best.name, best.tpot_s, best.tokens_per_s, offloaded)


def _on_device(task: Task, money: Economics) -> Iterator[WayFigures]:
    """Both ways without offloading, of which one says why it is none."""
    found = task.on_device()
    needed, free = task.resident_bytes(task.workload.batch), task.free_bytes(task.workload.rows)
    short = f"the cache needs {gb(needed)} where {gb(max(0, free))} are free"
    if found is None:
        yield WayFigures("no offload", short)
        yield WayFigures("sub-batches", "not even one sequence fits")
        return
    inputs = task.inputs(task.mean_tokens(), found.batch)
    row = _figures("no offload", task, found, inputs, None, money)
    if found.runs == 1:
        yield row
        yield WayFigures("sub-batches", "the whole batch fits")
    else:
        yield WayFigures("no offload", short)
        yield row._replace(name="sub-batches")


def _offloaded(name: Name, task: Task, money: Economics) -> WayFigures:
    try:
        task = task.settled()
        chosen = planner.solve(task.inputs(task.workload.cached_tokens))
        inputs = task.inputs(task.mean_tokens())
        mean = planner.solve(inputs)
        found = task.offload(chosen)
    except InfeasiblePlanError as error:
        return WayFigures(name, str(error))
    return _figures(name, task, found, inputs, mean, money)._replace(host_bytes=chosen.host_bytes)


def _figures(
    name: Name, task: Task, found: Alternative, inputs: PlanInputs, mean: Plan | None, money: Economics
) -> WayFigures:
    """All figures of one way; `mean` is its placement at the mean context, None without offloading."""
    workload, profile = task.workload, task.profile
    x, t, r_x = (mean.activation_blocks, mean.kv_blocks, mean.resident_activation_blocks) if mean else (0, 0, 0)
    terms = step_time.terms(inputs)
    link_s = terms.activation_link_s * x + terms.kv_link_s * t
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
        link_utilization=min(1.0, link_s / found.step_s),
        device_utilization=min(1.0, (step_time.device_s(inputs, r_x, x) + task.tail_s(inputs)) / found.step_s),
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


def _price(money: Economics, seconds: float, tokens: int) -> float | None:
    return None if money.price_per_hour is None else money.price_per_hour * seconds / 3600 / tokens * MILLION


def decode_mfu(task: Task, batch: int, step_s: float) -> float:
    """Operations of a decode step of `batch` sequences over what the device's peak would do in `step_s`."""
    return task.step_flops(batch) / (peak_flops_per_s(task.profile) * step_s)


def decode_mbu(task: Task, batch: int, step_s: float) -> float:
    """Bytes that a decode step cannot do without over what the memory's bandwidth would move in `step_s`."""
    return task.step_bytes(batch) / (memory_bytes_per_s(task.profile) * step_s)


def peak_flops_per_s(profile: HardwareProfile) -> float:
    """The datasheet's, else the best measured."""
    known = profile.extra.get("peak_flops_per_s")
    return float(known or max(2 * math.prod(point.x) / point.seconds for point in profile.gemm.points))  # multiply-add


def memory_bytes_per_s(profile: HardwareProfile) -> float:
    """The datasheet's, else the best measured."""
    attended = [point.x[0] / point.seconds for point in profile.attention.points]
    return float(profile.extra.get("peak_bytes_per_s") or max(profile.device_copy_bytes_per_s, *attended))


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
