"""Everything a report shows of one workload on one machine, as plain numbers.

Owns which numbers those are: the roofline, one planned decode step, the step time at every split, the ways to do the
work over batch and context, memory over context, and measured beside predicted. Does not own how any of them is made
(`roofline`, `kvoffload/planning/`, `kvoffload/advise/`), nor charts (`plan_charts`) or the page (`page`).
Measures nothing.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvoffload.advise.advice import Advice, advise, task_of
from kvoffload.advise.precisions import Precision, precisions
from kvoffload.advise.roofline import Roofline, evaluate, setting_of
from kvoffload.advise.task import Task
from kvoffload.config import OffloadConfig
from kvoffload.errors import ConfigError, InfeasiblePlanError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.machine import Machine, machine_of
from kvoffload.model.facts import Facts
from kvoffload.model.stored_facts import facts_of
from kvoffload.planning import step_time
from kvoffload.planning.forms import option_name
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.options import table_of
from kvoffload.planning.placement import PLAIN
from kvoffload.planning.plan import Plan
from kvoffload.planning.simulation import simulate
from kvoffload.planning.workload import Workload
from kvoffload.profiler.drawing.sizes import SizePoint, sized, sizes_around
from kvoffload.timeline import Span, Timeline, assemble

MAX_SPREAD_FRACTION = 0.1  # of measured steps that are worth comparing
SIMULATED_STEPS = 6  # the pipeline fills in the first half; the last has no step behind it to copy for
ROW_METRICS = ("decode_step", "bound_step")  # of a results file: measured, predicted
Tell = Callable[[str, float], None]


class SplitPoint(NamedTuple):
    """The fastest placement that keeps so many blocks of every layer as activations, on device and host together."""

    activation_blocks: int
    link_s: float
    device_s: float
    host_s: float
    step_s: float
    paper_step_s: float  # the fastest with the paper's schedule


class Compared(NamedTuple):
    """One measured decode step beside its prediction."""

    name: str
    where: str  # device and link
    predicted_s: float
    measured_s: float

    @property
    def error_fraction(self) -> float:
        """Above 0: slower than predicted."""
        return self.measured_s / self.predicted_s - 1


class MeasuredRun(NamedTuple):
    """Decode steps that really ran on this machine, and what was planned for them."""

    shape: str  # of the model, in words
    device_name: str
    link_name: str
    is_emulated: bool
    plan: Plan
    predicted_step_s: float  # the cost model, at the mean of the rates taken before and after the run
    predicted_range_s: tuple[float, float]  # at the rates before it, and after it
    simulated_step_s: float
    step_s: tuple[float, ...]  # without the first two, which still wait for the prefill's write-back
    planned: Timeline
    measured: Timeline

    @property
    def median_step_s(self) -> float:
        """The middle one of the measured steps."""
        return statistics.median(self.step_s)

    @property
    def spread_fraction(self) -> float:
        """How far the middle three fifths of the steps lie apart, as a share of the median."""
        low_s, *_, high_s = statistics.quantiles(self.step_s, n=5, method="inclusive")
        return (high_s - low_s) / self.median_step_s

    @property
    def doubt(self) -> str:
        """Why these steps say little about the prediction, and what to do; empty if they do."""
        if self.spread_fraction <= MAX_SPREAD_FRACTION:
            return ""
        return (
            f"The measured steps disagree by {self.spread_fraction:.2f} of their median: other work has "
            "probably disturbed them. Measure again on a quiet machine before comparing them with the prediction."
        )

    @property
    def where(self) -> str:
        """Device and link."""
        return f"{self.device_name}, link: {self.link_name}"


class Study(NamedTuple):
    """One workload of one model on one machine."""

    dims: Facts
    task: Task
    machine: Machine
    roofline: Roofline
    advice: Advice | None
    problem: str  # why there is no advice
    planned: Timeline | None  # one decode step at full length, in the steady state
    simulated_step_s: float
    splits: tuple[SplitPoint, ...]
    over_batch: tuple[SizePoint, ...]
    over_context: tuple[SizePoint, ...]
    compared: tuple[Compared, ...]
    measured: MeasuredRun | None
    precisions: tuple[Precision, ...] = ()  # offloading with K and V in fewer bytes

    @property
    def own(self) -> SizePoint:
        """The ways at the workload's own size."""
        return next(point for point in self.over_batch if point.batch == self.task.workload.batch)

    @property
    def recommendation(self) -> str:
        """What to do, or why nothing works."""
        return self.advice.plan.recommendation if self.advice else f"It does not fit: {self.problem}."


def study(
    config: object,
    workload: Workload,
    profile: HardwareProfile,
    options: OffloadConfig,
    *,
    acceptance: float | None = None,
    compared: tuple[Compared, ...] = (),
    measured: MeasuredRun | None = None,
    progress: Tell | None = None,
) -> Study:
    """Work out every number of a report.

    Args:
        config: the model's, as `advice.advise` takes it.
        workload: what will be generated.
        profile: the machine.
        options: caps and choices.
        acceptance: assumed of verified drafts, 0..1; None: by what they read.
        compared: measured steps from elsewhere.
        measured: a run of this machine, if there was one.
        progress: called with what begins and the share done.

    Raises:
        ConfigError, ProfileError, UnsupportedModelError: as `advice.advise`. What fits nowhere is no error here, the
            report says so.
    """
    tell = progress or (lambda _what, _share: None)
    tell("the plan", 0.0)
    dims = facts_of(config)
    task = task_of(config, workload, profile, options, acceptance=acceptance)
    machine = machine_of(profile)
    advice, problem = None, ""
    try:
        advice = advise(config, workload, profile, options, acceptance=acceptance)
    except InfeasiblePlanError as error:
        problem = str(error)
    tell("the roofline", 0.1)
    plan = advice.plan if advice else None
    offloaded = plan.count(tier="host") / max(1, plan.num_blocks) if plan else 0.0
    setting = setting_of(
        dims,
        bits=(None, None, None),
        convention="fused",
        batch=workload.rows,
        seq=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        kv_on_host=offloaded,
        weights_on_host=min(1.0, task.streamed_bytes / task.shape.weight_bytes),
    )
    planned: Timeline | None = None
    simulated_step_s = 0.0
    splits: tuple[SplitPoint, ...] = ()
    if plan is not None:
        inputs = task.inputs(workload.cached_tokens)
        planned, simulated_step_s = simulated(plan, inputs)
        splits = tuple(split_points(inputs))
    tell("batches", 0.3)
    batches = tuple(sized(task, batch, workload.prompt_tokens) for batch in sizes_around(workload.batch))
    tell("contexts", 0.6)
    prompts = sizes_around(workload.prompt_tokens, longest_prompt(dims, workload))
    contexts = tuple(sized(task, workload.batch, prompt) for prompt in prompts)
    if measured is not None:
        ours = Compared("this machine", measured.where, measured.predicted_step_s, measured.median_step_s)
        compared = (*compared, ours)
    tell("done", 1.0)
    return Study(
        dims=dims,
        task=task,
        machine=machine,
        roofline=evaluate(dims, machine, setting),
        advice=advice,
        problem=problem,
        planned=planned,
        simulated_step_s=simulated_step_s,
        splits=splits,
        over_batch=batches,
        over_context=contexts,
        compared=compared,
        measured=measured,
        precisions=precisions(task),
    )


def longest_prompt(dims: Facts, workload: Workload) -> int | None:
    """Tokens of a prompt behind which the new tokens still have positions; None where no limit is known."""
    return None if dims.position_limit is None else max(1, dims.position_limit - workload.new_tokens)


def simulated(plan: Plan, inputs: PlanInputs, num_steps: int = 1) -> tuple[Timeline, float]:
    """Decode steps in the steady state as the simulation plays them, from 0 seconds, and the seconds of one."""
    recorded: list[Span] = []
    found = simulate(plan, inputs.rates, num_steps=SIMULATED_STEPS, record=recorded.append)
    return assemble(recorded).steps(SIMULATED_STEPS - 1 - num_steps, num_steps), found.step_s


def split_points(inputs: PlanInputs) -> Iterator[SplitPoint]:
    """The fastest placement for every number of blocks kept as activations, where there is one that fits.

    Every such placement is tried whose other blocks have one form: which blocks stay on the device is free too.
    """
    table = table_of(inputs)
    is_kept = [option.is_recomputed for option in table.options]
    others = dict.fromkeys(option.form for option in table.options if not option.is_recomputed)
    block_bytes = {option.name: sum(option.bytes.values()) for option in table.options}
    capacity = max(0, table.capacity["device"])
    most = {option.name: limit for option, limit in zip(table.options, table.most, strict=True)}
    for kept in range(inputs.num_blocks + 1):
        r_x = np.arange(min(kept, capacity // max(1, block_bytes["resident_activation"])) + 1)
        left = capacity - block_bytes["resident_activation"] * r_x
        tried = []
        for form in others:
            on_device, on_host = option_name(form, "device"), option_name(form, "host")
            on_device = on_device if most[on_device] else option_name(PLAIN, "device")
            r = np.minimum(inputs.num_blocks - kept, left // max(1, block_bytes[on_device]))
            columns = {on_device: r, on_host: inputs.num_blocks - kept - r}
            columns |= {"resident_activation": r_x, "activation": kept - r_x}
            tried.append(np.stack([columns.get(one.name, np.zeros_like(r)) for one in table.options], axis=1))
        counts = np.concatenate(tried)
        assert np.all(counts[:, is_kept].sum(axis=1) == kept)
        counts = counts[step_time.allowed(table, counts)]
        if len(counts):
            found = step_time.costs(table, counts)
            link_s = step_time.costs(table._replace(schedule="pipelined"), counts).by_resource["h2d"]
            best = np.lexsort((link_s, found.step_s))[0]
            paper_s = step_time.costs(table._replace(schedule="kvpr"), counts).step_s.min()
            shown = (link_s[best], *(found.by_resource[name][best] for name in ("device", "issue")), found.step_s[best])
            yield SplitPoint(kept, *map(float, (*shown, paper_s)))


def compared_rows(path: Path) -> tuple[Compared, ...]:
    """Measured decode steps beside the bound of the cost model, from a results file of the benchmark.

    Raises:
        ConfigError: no such file, or it holds no pair of these numbers.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read the rows in {path}: {error}") from error
    found: dict[tuple[str, ...], dict[str, float]] = {}
    try:
        for row in rows:
            if row["metric"] in ROW_METRICS and row["p50"] != "":  # empty: no samples
                key = tuple(row[name] for name in ("provider", "x", "device", "link", "config_json"))
                found.setdefault(key, {})[row["metric"]] = float(row["p50"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is no results file ({type(error).__name__}: {error}): it needs the columns provider, metric, x, "
            "p50, device, link and config_json, as scripts/results/decode.csv has them"
        ) from error
    measured, predicted = ROW_METRICS
    pairs = {key: values for key, values in found.items() if all(values.get(name, 0.0) > 0 for name in ROW_METRICS)}
    if not pairs:
        raise ConfigError(f"{path} holds no row with both {measured} and {predicted}: give one as scripts/results has")
    return tuple(
        Compared(f"{provider}, {shape}", f"{device}, link: {link}", values[predicted], values[measured])
        for (provider, shape, device, link, _), values in pairs.items()
    )


def typical_steps(found: Timeline, step_s: float, count: int, after: int) -> Timeline:
    """So many consecutive decode steps, not before the step `after`, whose duration is nearest to `step_s` each.

    Fewer where there are fewer.

    Raises:
        IndexError: there are none.
    """
    marks, count = found.steps_s, min(count, found.num_steps)
    starts = range(min(after, max(0, found.num_steps - count)), max(1, found.num_steps - count + 1))
    lengths = {first: marks[min(first + count, len(marks) - 1)] - marks[first] for first in starts}
    first = min(lengths, key=lambda first: abs(lengths[first] - count * step_s))
    return found.steps(first, count)
