"""The answer of a plan in three lines: whether it fits, what to run, and how fast that is and why.

Owns the words. Does not own the figures of the ways (`task`) nor which of them is best (`advice`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from textwrap import indent
from typing import Any, NamedTuple

from kvoffload.advise.streaming import QUANTISED_BITS, StreamedBatch, best_batch
from kvoffload.advise.task import Alternative, Task
from kvoffload.advise.utilization import decode_mbu, decode_mfu
from kvoffload.advise.ways import LEAST_GAIN
from kvoffload.config import OffloadConfig
from kvoffload.model.facts import Facts
from kvoffload.planning.drafts import ExpectedRounds
from kvoffload.planning.forms import FORMS
from kvoffload.planning.placement import Kind
from kvoffload.planning.plan import Plan
from kvoffload.planning.verdicts import times
from kvoffload.units import count, counted, duration, gb, rate

CODE = "    "  # what code stands behind
_RUN = "model.generate(**{inputs}, max_new_tokens={new_tokens}{beams})"


class Answer(NamedTuple):
    """What to do with a workload, for a person."""

    verdict: str  # what to do, and whether it fits or which limit it exceeds by how much
    code: str  # to paste, on some lines
    speed: str  # predicted, and what bounds it
    notes: tuple[str, ...] = ()  # what else has to be known
    details: str = ""  # the placement and the steps of the ways, in a sentence

    @property
    def text(self) -> str:
        """What to do, the code, how fast that is, and the notes."""
        return "\n".join((self.verdict, indent(self.code, CODE), self.speed, *self.notes))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return self._asdict() | {"notes": list(self.notes)}


class Found(NamedTuple):
    """What `advice` found: each way, None where it does not work or gains nothing."""

    plan: Plan
    offload: Alternative
    on_device: Alternative | None  # whole or in parts
    drafts: Alternative | None
    rounds: ExpectedRounds | None
    is_best: bool  # offloading is


def answer(task: Task, found: Found, facts: Facts) -> Answer:
    """The answer for `task`."""
    notes = tuple(note for note in (_beyond_positions(task, facts), _doubted(facts)) if note)
    if found.plan.weight_bytes_per_step:
        said = _stream(task, found)
    elif found.is_best or found.on_device is None:
        said = _offload(task, found)
    else:
        said = _on_device(task, found.on_device, found.drafts or found.offload)
    return said._replace(notes=(*said.notes, *notes), details=_details(task, found))


def _on_device(task: Task, one: Alternative, offload: Alternative) -> Answer:
    """Plain generate(), whole or in parts."""
    slower = offload.total_s / one.total_s
    beside = f"; offloaded {times(slower)} slower" if slower >= LEAST_GAIN else ""
    speed = f"Predicted: {_speed(task, one)}, bound by {_device_bound(task, one)}{beside}."
    if one.runs == 1:
        return Answer(f"Do not offload: {_room(task)}, so it fits.", f"out = {_run(task)}", speed)
    fitting = "one sequence alone fits" if one.batch == 1 else f"batches of {one.batch} fit"
    return Answer(
        f"Do not offload, unless the batch must stay together: {_room(task)}, but {fitting}.",
        f"for i in range(0, {task.workload.batch}, {one.batch}):\n"
        f"    part = {{k: v[i : i + {one.batch}] for k, v in inputs.items()}}\n"
        f"    out = {_run(task, 'part')}",
        speed,
    )


def _offload(task: Task, found: Found) -> Answer:
    one = found.drafts or found.offload
    also = "not even one sequence fits there whole"
    if found.on_device is not None:
        parts = f"{_runs(found.on_device)} take {duration(found.on_device.total_s)}"
        also = f"{parts}, offloading {duration(one.total_s)}"
    return Answer(
        f"Offload: {_room(task)}; {also}.",
        f"{_options(task.config)}:\n    out = {_run(task)}",
        f"Predicted: {_speed(task, one)}{_over_full(found)}{_drafted(found)}, bound by "
        f"{_bound(found.plan)}.{_why_no_recomputation(task, found.plan)}",
    )


def _stream(task: Task, found: Found) -> Answer:
    one = found.drafts or found.offload
    best = best_batch(task)
    kept = task.kept_layers(task.workload.rows) or 0
    bits = _in_bits(task)
    instead = "" if best is None else _quantised(best, one)
    return Answer(
        f"Stream the weights{instead}: {gb(task.shape.weight_bytes)} of weights{bits} do not fit in "
        f"{gb(task.profile.device_memory_bytes)}; {counted(kept, 'decoder layer')} of {task.shape.num_layers} "
        f"{'stays' if kept == 1 else 'stay'} there, {gb(task.streamed_bytes)} cross the link in every forward.",
        f"config = {_config(dataclasses.replace(task.config, device='cuda'))}\n"
        f'with kvoffload.load("OWNER/NAME", config) as session:\n    out = session.{_run(task)}',
        f"Predicted: {_speed(task, one)}{_drafted(found)}, bound by {_bound(found.plan)}.",
        () if best is None else tuple(_with_other_batches(task, best)),
    )


def _room(task: Task) -> str:
    """Weights and cache beside the device's memory."""
    weights, cache = task.shape.weight_bytes, task.resident_bytes(task.workload.batch)
    memory = task.profile.device_memory_bytes
    over = weights + cache - memory
    beyond = f", {gb(over)} too much" if over > 0 else ""
    return (
        f"weights take {gb(weights)}{_in_bits(task)} and the whole cache {gb(cache)} of the device's {gb(memory)}"
        + (beyond)
    )


def _in_bits(task: Task) -> str:
    """Of quantised weights, how wide they are."""
    bits = task.shape.layer_bits
    return f" ({bits:.3g} bits each)" if bits < 8 * task.shape.activation_itemsize_bytes else ""


def _speed(task: Task, one: Alternative) -> str:
    step = "token" if one.way == "drafts" else "step"
    several = "" if task.workload.batch == 1 else f" of {counted(one.batch, 'sequence')}"
    prefill = f"{'prompt' if one.batch * one.runs == 1 else 'prompts'} {duration(one.prefill_s * one.runs)}"
    return f"{rate(one.tokens_per_s)} tokens/s in all ({prefill}, then {duration(one.step_s)} a {step}{several})"


def _over_full(found: Found) -> str:
    """What planning gains, where it does."""
    plan, one = found.plan, found.drafts or found.offload
    gain = plan.full_transfer_step_s / plan.predicted_step_s * found.offload.step_s / one.step_s
    return f", {gain:.1f}x full transfer," if gain >= LEAST_GAIN else ""


def _drafted(found: Found) -> str:
    if found.drafts is None or found.rounds is None:
        return ""
    return (
        f" with verified drafts from {_read_by_drafts(found.rounds)}, {found.rounds.acceptance:.2f} of which are "
        "assumed to be right"
    )


def _read_by_drafts(rounds: ExpectedRounds) -> str:
    return "4-bit copies of all tokens" if rounds.reads_all else "the newest tokens"


def _bound(plan: Plan) -> str:
    return {
        "link": "the link",
        "device": "the device's computing",
        "host": "the host's time for each copy",
        "device_memory": "the link, at the limit of device memory",
        "host_memory": "the link, at the limit of host memory",
    }[plan.binding_constraint]


def _device_bound(task: Task, one: Alternative) -> str:
    """Whether a step on the device computes or reads for longer."""
    computes = decode_mfu(task, one.batch, one.step_s) > decode_mbu(task, one.batch, one.step_s)
    return "computing" if computes else "reading weights and cache from device memory"


def _why_no_recomputation(task: Task, plan: Plan) -> str:
    """Grouped queries are why recomputing K and V from activations gains nothing."""
    shape = task.shape
    if shape.cached_values or shape.kv_row_bytes > shape.activation_row_bytes or plan.binding_constraint == "device":
        return ""
    if plan.split_fraction or shape.num_kv_heads >= shape.num_heads:
        return ""
    return " Its grouped queries make K and V no larger than activations, so recomputing them gains nothing."


def _quantised(best: StreamedBatch, one: Alternative) -> str:
    """Where weights in 4 bits are faster for this batch."""
    if best.quantised is None or best.quantised.tokens_per_s < LEAST_GAIN * one.tokens_per_s:
        return ""
    return ", or take quantised ones"


def _with_other_batches(task: Task, best: StreamedBatch) -> Iterator[str]:
    """Which batch pays for streaming, and what weights in 4 bits would do instead."""
    if best.batch > task.workload.batch:
        yield (
            f"Each forward reads them once, whatever the batch: {counted(best.batch, 'sequence')} of this length make "
            f"{rate(best.found.tokens_per_s)} tokens/s (with {gb(best.host_bytes)} of host memory)."
        )
    if best.quantised is None:
        if task.shape.layer_bits > QUANTISED_BITS:
            yield "Weights in 4 bits do not fit either."
        return
    said = (
        f"Quantised instead, where that loss of accuracy is acceptable: weights in 4 bits fit, and this batch makes "
        f"{rate(best.quantised.tokens_per_s)} tokens/s with them"
    )
    if best.beats_from is None:
        yield f"{said}, more than streaming with any batch."
    else:
        yield f"{said}; streaming is faster from {counted(best.beats_from, 'sequence')} on."
    yield indent(
        "config = BitsAndBytesConfig(load_in_4bit=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(\n"
        '    "OWNER/NAME", quantization_config=config, device_map="cuda"\n)',
        CODE,
    )


def _beyond_positions(task: Task, facts: Facts) -> str:
    """A sentence where a sequence becomes longer than the model's positions; it is planned for all the same."""
    limit, num_tokens = facts.position_limit, task.workload.prompt_tokens + task.workload.new_tokens
    if limit is None or num_tokens <= limit:
        return ""
    return (
        f"But prompt and new tokens make {count(num_tokens)}, and the model's configuration has positions for "
        f"{count(limit)}."
    )


def _doubted(facts: Facts) -> str:
    """A sentence where the sizes of the model are guessed."""
    return f"All this is a guess: {facts.doubt}." if facts.doubt else ""


def _run(task: Task, inputs: str = "inputs") -> str:
    return _RUN.format(inputs=inputs, new_tokens=task.workload.new_tokens, beams=_beams(task))


def _beams(task: Task) -> str:
    return "" if task.workload.num_beams == 1 else f", num_beams={task.workload.num_beams}"


def _options(config: OffloadConfig) -> str:
    """How a model is offloaded with these options."""
    written = _config(config)
    if written == "kvoffload.OffloadConfig()":
        return "with kvoffload.offload(model)"
    return f"config = {written}\nwith kvoffload.offload(model, config)"


def _config(config: OffloadConfig) -> str:
    changed: dict[str, Any] = {
        one.name: getattr(config, one.name)
        for one in dataclasses.fields(config)
        if getattr(config, one.name) != one.default
    }
    written = ", ".join(f"{name}={value!r}" for name, value in changed.items()).replace("'", '"')
    return f"kvoffload.OffloadConfig({written})"


def _details(task: Task, found: Found) -> str:
    """The placement, and what a step of each way takes."""
    said = f"Offloaded: {placement(found.plan, found.offload)}"
    if found.drafts is not None and found.rounds is not None:
        said += f"; {_drafted(found).strip()}, a token takes {duration(found.drafts.step_s)}"
    if found.on_device is not None:
        said += f". {_runs(found.on_device).capitalize()}: a step takes {duration(found.on_device.step_s)} on average"
    return f"{said}."


def placement(chosen: Plan, offload: Alternative) -> str:
    """Where the blocks of a layer are, and the steps that follow."""
    placed = ", ".join(_in_words(kind, n) for kind, n in chosen.placed.items() if n)
    limit = chosen.binding_constraint.replace("_", " ")
    return (
        f"of {counted(chosen.num_blocks, 'block')} of {counted(chosen.block_tokens, 'token')} per layer "
        f"{placed or 'none leaves the tail'}; a step takes {duration(offload.step_s)} on average, "
        f"{duration(chosen.predicted_step_s)} at full length, limited by the {limit} there "
        f"({duration(chosen.full_transfer_step_s)} with full transfer)"
    )


def _in_words(kind: Kind, num_blocks: int) -> str:
    form = FORMS[kind.form]
    if kind.tier == "device":
        return f"{counted(num_blocks, 'stays', 'stay')} on the device as {form.label}"
    also = " and recomputed" if form.is_recomputed else ""
    return f"{counted(num_blocks, 'is', 'are')} transferred as {form.label}{also}"


def _runs(one: Alternative) -> str:
    return "on the device" if one.runs == 1 else f"{one.runs} runs of {counted(one.batch, 'sequence')} on the device"
