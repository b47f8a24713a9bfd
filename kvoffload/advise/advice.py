"""What to do with a workload on a machine: offload, run it on the device as it is, or in smaller batches there.

Owns the comparison. Does not own the numbers of each way (`task`), the split (`planner`), the answer in words
(`answer`) or any measurement.

    whole batch on the device   if weights, prefill peak and the whole cache fit
    sub-batches on the device   the largest batch that fits, run as often as needed, in equal parts
    offload                     the plan

Whichever is predicted to end first is recommended, with the numbers; a simpler one where it is as fast (`ways`).
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, NamedTuple

from kvoffload.advise import snippets
from kvoffload.advise.answer import Answer, Found, answer
from kvoffload.advise.capacity import what_would_fit
from kvoffload.advise.task import Alternative, Task
from kvoffload.advise.ways import AS_THEY_ARE, best_of
from kvoffload.config import OffloadConfig
from kvoffload.errors import InfeasiblePlanError, UnsupportedModelError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.facts import Facts
from kvoffload.model.model_shape import is_model, model_shape
from kvoffload.model.stored_facts import facts_of
from kvoffload.planning import planner, step_time
from kvoffload.planning.plan import Plan
from kvoffload.planning.workload import Workload
from kvoffload.units import counted, duration

logger = logging.getLogger(__name__)


class Advice(NamedTuple):
    """The plan and what it was compared with, best first."""

    plan: Plan
    alternatives: tuple[Alternative, ...]
    doubt: str  # why the sizes of the model are a guess; "" where they are the model's own
    answer: Answer

    @property
    def best(self) -> Alternative:
        """What is recommended: the way that is predicted to end first, or a simpler one that is as fast."""
        return self.alternatives[0]

    def to_json(self) -> dict[str, Any]:
        """Plain data: the plan's, with `alternatives`, and whether the model's sizes are its own."""
        model = {"is_exact": not self.doubt, "doubt": self.doubt}
        said = {"alternatives": [one._asdict() for one in self.alternatives], "answer": self.answer.to_json()}
        return self.plan.to_json() | said | model


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
    w_bits: float | None = None,
) -> Advice:
    """As `advised_plan`, with the numbers of every way; further arguments as of `task_of`."""
    task = task_of(model_or_config, workload, profile, config, acceptance=acceptance, w_bits=w_bits).settled()
    facts = task.facts
    assert facts is not None, "task_of gives them"
    _warn_of_unknown_weights(facts)
    on_device = task.on_device()
    try:
        chosen = planner.solve(task.inputs(workload.cached_tokens))
        offload = task.offload(chosen)
        chosen, full = _beside_full_transfer(task, chosen)
    except InfeasiblePlanError as error:
        if on_device is None:
            raise InfeasiblePlanError(f"{error}{what_would_fit(task)}") from error
        raise InfeasiblePlanError(
            f"{error}. Without offloading: on the device in {counted(on_device.runs, 'run')} of "
            f"{counted(on_device.batch, 'sequence')}, which take {duration(on_device.total_s)}"
        ) from error
    rounds = task.rounds()
    drafts = None if rounds is None else task.drafted(offload, rounds)
    if drafts is not None and drafts.total_s >= offload.total_s:
        drafts = None
    ways = [one for one in (offload, drafts, on_device) if one is not None]
    best = best_of({one.way: one.total_s for one in ways})
    ways.sort(key=lambda one: (one.way != best, one.total_s))
    found = Found(chosen, offload, on_device, drafts, rounds, full, snippets.loaded_by(model_or_config))
    said = answer(task, found, facts, is_best=best in ("offload", "drafts"))
    plain_s = 0.0
    if on_device is not None and on_device.way == "on_device":
        plain_s = step_time.plain_step_s(task.inputs(workload.cached_tokens))
    plan = dataclasses.replace(chosen, recommendation=said.text, plain_step_s=plain_s)
    return Advice(plan, tuple(ways), facts.doubt, said)


def _beside_full_transfer(task: Task, chosen: Plan) -> tuple[Plan, Alternative | None]:
    """The plan with the step of full transfer as it would be set up by itself, and that way; None: it does not work."""
    plain = task._replace(config=dataclasses.replace(task.config, split="transfer", **AS_THEY_ARE))
    try:
        whole = planner.solve(plain.inputs(task.workload.cached_tokens))
        full = plain.offload(whole)
    except InfeasiblePlanError:
        return chosen, None
    return dataclasses.replace(chosen, full_transfer_step_s=whole.predicted_step_s), full


def task_of(
    model_or_config: Any,
    workload: Workload,
    profile: HardwareProfile,
    config: OffloadConfig,
    *,
    acceptance: float | None = None,
    w_bits: float | None = None,
) -> Task:
    """One workload of one model on one machine; arguments and errors as of `advised_plan`.

    Args:
        acceptance: assumed of drafts; None: by what they read.
        w_bits: of a weight of the decoder layers, scales included; None: as the model has them.
    """
    shape = model_shape(model_or_config)
    if shape.num_offloaded_layers < 1:
        raise UnsupportedModelError(
            "no layer of this model has a cache that grows without bound: there is nothing to offload, use generate()"
        )
    task = Task(shape, workload, profile, config, acceptance, _facts(model_or_config))
    return task if w_bits is None else task.in_weight_bits(w_bits)


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
