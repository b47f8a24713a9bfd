"""What to do with a workload on a machine: offload, run it on the device as it is, or in smaller batches there.

Owns the comparison and the recommendation in words. Does not own the numbers of each way (`task`), the split
(`planner`) or any measurement.

    whole batch on the device   if weights, prefill peak and the whole cache fit
    sub-batches on the device   the largest batch that fits, run as often as needed, in equal parts
    offload                     the plan

Whichever is predicted to end first is recommended, with the numbers; a simpler one where it is as fast (`ways`).
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, NamedTuple

from kvoffload.advise.streaming import best_batch, streams_weights
from kvoffload.advise.task import Alternative, Task
from kvoffload.advise.ways import AS_THEY_ARE, best_of
from kvoffload.config import OffloadConfig
from kvoffload.errors import InfeasiblePlanError, UnsupportedModelError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.facts import Facts
from kvoffload.model.model_shape import is_model, model_shape
from kvoffload.model.stored_facts import facts_of
from kvoffload.planning import planner, step_time
from kvoffload.planning.drafts import ExpectedRounds
from kvoffload.planning.forms import FORMS
from kvoffload.planning.placement import Kind
from kvoffload.planning.plan import Plan
from kvoffload.planning.verdicts import beside_plain
from kvoffload.planning.workload import Workload
from kvoffload.units import count, counted, duration, gb

logger = logging.getLogger(__name__)


class Advice(NamedTuple):
    """The plan and what it was compared with, best first."""

    plan: Plan
    alternatives: tuple[Alternative, ...]
    doubt: str = ""  # why the sizes of the model are a guess; "" where they are the model's own

    @property
    def best(self) -> Alternative:
        """What is recommended: the way that is predicted to end first, or a simpler one that is as fast."""
        return self.alternatives[0]

    def to_json(self) -> dict[str, Any]:
        """Plain data: the plan's, with `alternatives`, and whether the model's sizes are its own."""
        model = {"is_exact": not self.doubt, "doubt": self.doubt}
        return self.plan.to_json() | {"alternatives": [one._asdict() for one in self.alternatives]} | model


def advised_plan(model_or_config: Any, workload: Workload, profile: HardwareProfile, config: OffloadConfig) -> Plan:
    """The placement for `workload`, with a recommendation.

    Args:
        model_or_config: a transformers model or configuration, a dict, or a path to a `config.json` or its folder.
        workload: what will be generated.
        profile: the machine.
        config: the caps and choices; "auto" is resolved from the profile.

    Returns:
        The plan for the full length of the cache; `recommendation` says what to do and why, and where the tokens are
        more than the configuration has positions for.

    Raises:
        InfeasiblePlanError: it fits nowhere; says which limit, by how much, and what would.
        ProfileError: the profile's link has no bandwidth.
        ConfigError: the model's configuration lacks a field.
        UnsupportedModelError: no layer has a cache that grows without bound.
    """
    return advise(model_or_config, workload, profile, config).plan


def advise(
    model_or_config: Any,
    workload: Workload,
    profile: HardwareProfile,
    config: OffloadConfig,
    *,
    acceptance: float | None = None,
) -> Advice:
    """As `advised_plan`, with the numbers of every way; `acceptance` is assumed of drafts, None by what these read."""
    task = task_of(model_or_config, workload, profile, config, acceptance=acceptance).settled()
    facts = _facts(model_or_config)
    _warn_of_unknown_weights(facts)
    on_device = task.on_device()
    try:
        chosen = planner.solve(task.inputs(workload.cached_tokens))
        offload = task.offload(chosen)
        chosen = _beside_full_transfer(task, chosen)
    except InfeasiblePlanError as error:
        if on_device is None:
            raise
        raise InfeasiblePlanError(f"{error}. Without offloading: {_describe(on_device)}") from error
    rounds = task.rounds()
    drafts = None if rounds is None else task.drafted(offload, rounds)
    ways = [one for one in (offload, drafts, on_device) if one is not None]
    best = best_of({one.way: one.total_s for one in ways})
    ways.sort(key=lambda one: (one.way != best, one.total_s))
    text = (
        _recommend(task, chosen, offload, on_device, drafts, rounds, is_best=best in ("offload", "drafts"))
        + _beyond_positions(facts, workload)
        + _doubted(facts)
    )
    plain_s = 0.0
    if on_device is not None and on_device.way == "on_device":
        plain_s = step_time.plain_step_s(task.inputs(workload.cached_tokens))
    return Advice(dataclasses.replace(chosen, recommendation=text, plain_step_s=plain_s), tuple(ways), facts.doubt)


def _beside_full_transfer(task: Task, chosen: Plan) -> Plan:
    """The plan with the step of full transfer as it would be set up by itself."""
    plain = task._replace(config=dataclasses.replace(task.config, split="transfer", **AS_THEY_ARE))
    try:
        full_s = planner.solve(plain.inputs(task.workload.cached_tokens)).predicted_step_s
    except InfeasiblePlanError:
        return chosen
    return dataclasses.replace(chosen, full_transfer_step_s=full_s)


def task_of(
    model_or_config: Any,
    workload: Workload,
    profile: HardwareProfile,
    config: OffloadConfig,
    *,
    acceptance: float | None = None,
) -> Task:
    """One workload of one model on one machine; arguments and errors as of `advised_plan`."""
    shape = model_shape(model_or_config)
    if shape.num_offloaded_layers < 1:
        raise UnsupportedModelError(
            "no layer of this model has a cache that grows without bound: there is nothing to offload, use generate()"
        )
    return Task(shape, workload, profile, config, acceptance)


def _facts(model_or_config: Any) -> Facts:
    if is_model(model_or_config):
        from kvoffload.model.live import facts_of_live

        return facts_of_live(model_or_config)
    return facts_of(model_or_config)


def _warn_of_unknown_weights(facts: Facts) -> None:
    """Weights that are quantised in a way we do not know count as if they were not."""
    if facts.quantized is not None and not facts.quantized.is_known:
        logger.warning(
            "the quantization_config names %r, which is not known here: weights are counted as not quantised",
            facts.quantized.method,
        )


def _recommend(
    task: Task,
    chosen: Plan,
    offload: Alternative,
    on_device: Alternative | None,
    drafts: Alternative | None,
    rounds: ExpectedRounds | None,
    *,
    is_best: bool,
) -> str:
    """What to do, and the numbers that say so."""
    cache_bytes = task.resident_bytes(task.workload.batch)
    room = (
        f"weights take {gb(task.shape.weight_bytes)} and the whole cache {gb(cache_bytes)} of the "
        f"device's {gb(task.profile.device_memory_bytes)}"
    )
    ours = _describe_plan(chosen, offload)
    if drafts is not None and rounds is not None:
        seen = "4-bit copies of all tokens" if rounds.reads_all else "the newest tokens"
        ours += (
            f"; with verified drafts from {seen}, {rounds.acceptance:.2f} of which are assumed to be right, a token "
            f"takes {duration(drafts.step_s)} and everything {duration(drafts.total_s)}"
        )
    if streams_weights(task):
        return f"Stream the weights: {_room_for_weights(task)}. Predicted: {ours}.{_other_batches(task)}"
    if on_device is None:
        return f"Offload: {room}, and not even one sequence fits there whole. Predicted: {ours}."
    if is_best:
        return f"Offload: {room}. Predicted: {ours}; {_describe(on_device)}."
    if on_device.way == "on_device":
        ours_s = min(one.total_s for one in (offload, drafts) if one is not None)
        said = beside_plain(ours_s, on_device.total_s).removeprefix("do")
        return f"Do{said}. W{room.removeprefix('w')}, so it fits. Predicted: {_describe(on_device)}; {ours}."
    fitting = "one sequence alone fits" if on_device.batch == 1 else f"batches of {on_device.batch} fit"
    return (
        f"Do not offload, unless the batch must stay together: {room}, but {fitting}. "
        f"Predicted: {_describe(on_device)}; {ours}."
    )


def _room_for_weights(task: Task) -> str:
    """How much of the weights stays on the device."""
    kept = task.kept_layers(task.workload.rows) or 0
    return (
        f"weights take {gb(task.shape.weight_bytes)} of the device's {gb(task.profile.device_memory_bytes)}, so that "
        f"{counted(kept, 'decoder layer')} of {task.shape.num_layers} "
        f"{'stays' if kept == 1 else 'stay'} there and {gb(task.streamed_bytes)} of the others cross the link in every "
        "forward (OffloadConfig(device='cuda') with the model in host memory)"
    )


def _other_batches(task: Task) -> str:
    """Which batch pays for streaming, and what 4-bit weights would do instead."""
    found = best_batch(task)
    if found is None:
        return ""
    said = (
        f" Every forward reads them once, whatever the batch: {counted(found.batch, 'sequence')} of this length "
        f"make {found.found.tokens_per_s:.3g} tokens/s (with {gb(found.host_bytes)} of host memory)."
    )
    if found.quantised is None:
        return said + " Weights in 4 bits do not fit either."
    rate = f"weights in 4 bits fit, and this batch makes {found.quantised.tokens_per_s:.3g} tokens/s with them"
    if found.beats_from is None:
        return said + f" If that loss of accuracy is acceptable: {rate}, more than streaming with any batch."
    return (
        said + f" If that loss of accuracy is acceptable: {rate}; streaming is faster from "
        f"{counted(found.beats_from, 'sequence')} on."
    )


def _beyond_positions(facts: Facts, workload: Workload) -> str:
    """A sentence where a sequence becomes longer than the model's positions; it is planned for all the same."""
    limit, num_tokens = facts.position_limit, workload.prompt_tokens + workload.new_tokens
    if limit is None or num_tokens <= limit:
        return ""
    return (
        f" But prompt and new tokens make {count(num_tokens)}, and the model's configuration has positions for "
        f"{count(limit)}."
    )


def _doubted(facts: Facts) -> str:
    """A sentence where the sizes of the model are guessed."""
    return f" All this is a guess: {facts.doubt}." if facts.doubt else ""


def _describe_plan(chosen: Plan, offload: Alternative) -> str:
    placed = ", ".join(_in_words(kind, n) for kind, n in chosen.placed.items() if n)
    limit = chosen.binding_constraint.replace("_", " ")
    return (
        f"offloaded (of {counted(chosen.num_blocks, 'block')} per layer {placed or 'none leaves the tail'}) a step "
        f"takes {duration(offload.step_s)} on average, {duration(chosen.predicted_step_s)} at full length, limited by "
        f"the {limit} there ({duration(chosen.full_transfer_step_s)} with full transfer), and everything "
        f"{duration(offload.total_s)}"
    )


def _in_words(kind: Kind, num_blocks: int) -> str:
    form = FORMS[kind.form]
    if kind.tier == "device":
        return f"{counted(num_blocks, 'stays', 'stay')} on the device as {form.label}"
    also = " and recomputed" if form.is_recomputed else ""
    return f"{counted(num_blocks, 'is', 'are')} transferred as {form.label}{also}"


def _describe(one: Alternative) -> str:
    how = "on the device" if one.runs == 1 else f"on the device in {one.runs} runs of {counted(one.batch, 'sequence')}"
    return f"{how} a step takes {duration(one.step_s)} on average and everything {duration(one.total_s)}"
