"""The answer of a plan: whether it fits, what to run, how fast that is and why; then what else has to be known.

Owns the words. Does not own the figures of the ways (`task`), which of them is best (`advice`), nor the code to paste
(`snippets`).
"""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import indent
from typing import Any, NamedTuple

from kvoffload.advise import snippets
from kvoffload.advise.snippets import CODE
from kvoffload.advise.streaming import QUANTISED_BITS, WIDTHS, StreamedBatch, best_batch, quantised_way
from kvoffload.advise.task import Alternative, Task
from kvoffload.advise.utilization import decode_mbu, decode_mfu
from kvoffload.advise.ways import LEAST_GAIN
from kvoffload.model.facts import Facts
from kvoffload.planning import step_time
from kvoffload.planning.drafts import ExpectedRounds
from kvoffload.planning.forms import FORMS
from kvoffload.planning.placement import Kind
from kvoffload.planning.plan import Plan
from kvoffload.planning.verdicts import times
from kvoffload.units import count, counted, duration, gb, rate

CLOSE_FRACTION = 0.08  # of a device's memory, by which drivers report more than datasheets, in units of 1e9 bytes
_BITS = {name: f"weights in {name} bits ({bits} with scales)" for name, bits in WIDTHS}


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
    full: Alternative | None  # full transfer, which offloading is compared with
    name: str  # what `from_pretrained` takes for the model

    @property
    def ours(self) -> Alternative:
        """Offloading in the faster of its two ways."""
        return self.drafts or self.offload


def answer(task: Task, found: Found, facts: Facts, *, is_best: bool) -> Answer:
    """The answer for `task`; `is_best`: offloading is."""
    if found.on_device is not None and not is_best:
        said = _on_device(task, found.on_device, found.ours)
    elif found.plan.weight_bytes_per_step:
        said = _stream(task, found)
    else:
        said = _offload(task, found)
    notes = (*said.notes, *_beyond_positions(task, facts), *_close(task), *_doubted(facts))
    return said._replace(notes=notes, details=_details(task, found))


def otherwise(task: Task, facts: Facts, problem: str, name: str) -> Answer | None:
    """The answer where offloading does not work, for the reason given: the device alone, else quantised weights.

    None where neither works, or a cap of the user's is the reason. `name` is what `from_pretrained` takes.
    """
    notes = (f"Offloading does not work here: {problem}.", *_beyond_positions(task, facts), *_doubted(facts))
    one = task.on_device()
    if one is not None:
        return _on_device(task, one, None)._replace(notes=notes)
    bits, quantised = _enough_bits(task)
    is_capped = not isinstance(task.config.host_gib, str) or not isinstance(task.config.device_gib, str)
    if quantised is None or is_capped:  # then the cap that was asked for is to be told
        return None
    verdict = f"Quantise the weights: {_BITS[bits]} do{_in_parts(quantised)}; as they are this does not work."
    code = snippets.quantised(task, name, quantised, bits)
    return Answer(verdict, code, f"Predicted in {bits} bits, {_quantised_speed(task, quantised)}.", notes)


def _in_parts(one: Alternative) -> str:
    return "" if one.runs == 1 else f" in {one.runs} parts of {one.batch}"


def _quantised_speed(task: Task, one: Alternative) -> str:
    where = "on the device" if one.way in ("on_device", "sub_batches") else "with the cache offloaded"
    return f"{where}: {_speed(task, one)}, bound by bytes: what it costs to dequantise is not known and not counted"


def _on_device(task: Task, one: Alternative, ours: Alternative | None) -> Answer:
    """Plain generate(), whole or in parts."""
    slower = 1.0 if ours is None else ours.total_s / one.total_s
    beside = f"; offloaded {times(slower)} slower" if slower >= LEAST_GAIN else ""
    speed = f"Predicted: {_speed(task, one)}. {_bounds(task, one, _device_bound(task, one))}{beside}."
    if one.runs == 1:
        return Answer(f"Do not offload: {_room(task)}, so it fits.", snippets.plain(task), speed)
    fitting = "one sequence alone fits" if one.batch == 1 else f"batches of {one.batch} fit"
    verdict = f"Do not offload, unless the batch must stay together: {_room(task)}, but {fitting}."
    return Answer(verdict, snippets.in_parts(task, one.batch), speed)


def _offload(task: Task, found: Found) -> Answer:
    one = found.ours
    also = "not even one sequence fits there whole"
    if found.on_device is not None:
        also = f"{_runs(found.on_device)} take {duration(found.on_device.total_s)}, offloading {duration(one.total_s)}"
    is_greedy = found.drafts is not None
    if found.on_device is None and not found.plan.count(tier="host"):
        kinds = " and ".join(sorted({FORMS[kind.form].label for kind, n in found.plan.placed.items() if n}))
        also = f"as {kinds} all of it stays there"
    return Answer(
        f"Offload: {_room(task)}; {also}.",
        snippets.offloaded(task, is_greedy=is_greedy),
        f"Predicted: {_speed(task, one)}{_over_full(found)}{_drafted(found)}. "
        f"{_bounds(task, one, _plan_bound(found.plan))}.",
        tuple(_grouped(task, found.plan)),
    )


def _stream(task: Task, found: Found) -> Answer:
    """Weights cross the link in every forward; or in fewer bits they do not."""
    one, shape = found.ours, task.shape
    kept = task.kept_layers(task.workload.rows) or 0
    beside = " beside what this batch needs" if shape.weight_bytes < task.profile.device_memory_bytes else ""
    memory = gb(task.profile.device_memory_bytes)
    reason = f"{gb(shape.weight_bytes)} of weights{_in_bits(task)} do not fit in {memory}{beside}"
    streamed = (
        f"{counted(kept, 'decoder layer')} of {shape.num_layers} {'stays' if kept == 1 else 'stay'} there, "
        f"{gb(task.streamed_bytes)} cross the link in every forward"
    )
    speed = f"{_speed(task, one)}{_drafted(found)}. {_bounds(task, one, _plan_bound(found.plan))}"
    code = snippets.streamed(task, found.name, is_greedy=found.drafts is not None)
    best, (bits, quantised) = best_batch(task), _enough_bits(task)
    words = _BITS[bits]
    more = tuple(_larger_batches(task, best))
    if quantised is None or quantised.tokens_per_s < LEAST_GAIN * one.tokens_per_s:
        narrower = () if quantised is not None or shape.layer_bits <= QUANTISED_BITS else _NOT_EVEN
        if quantised is not None:
            narrower = (f"Quantised instead: {words} make {rate(quantised.tokens_per_s)} tokens/s of this batch.",)
        return Answer(f"Stream the weights: {reason}; {streamed}.", code, f"Predicted: {speed}.", (*more, *narrower))
    return Answer(
        f"Stream the weights only where quantised ones will not do: {reason}; {words} do{_in_parts(quantised)}, and "
        f"make {rate(quantised.tokens_per_s)} tokens/s instead of {rate(one.tokens_per_s)}.",
        snippets.quantised(task, found.name, quantised, bits),
        f"Predicted in {bits} bits, {_quantised_speed(task, quantised)}.",
        (f"Streamed instead: {streamed}. Predicted: {speed}.", indent(code, CODE), *more),
    )


def _enough_bits(task: Task) -> tuple[int, Alternative | None]:
    """The most bits of quantised weights with which the work is about as fast as with the fewest."""
    found = {name: quantised_way(task, bits) for name, bits in WIDTHS}
    fastest = max((one.tokens_per_s for one in found.values() if one is not None), default=0.0)
    enough = (name for name, one in found.items() if one is not None and LEAST_GAIN * one.tokens_per_s >= fastest)
    name = next(enough, min(found))
    return name, found[name]


_NOT_EVEN = ("Weights in 4 bits do not fit either.",)


def _room(task: Task) -> str:
    """Weights and cache beside the device's memory."""
    weights, cache = task.shape.weight_bytes, task.resident_bytes(task.workload.batch)
    memory = task.profile.device_memory_bytes
    over = weights + cache - memory
    beyond = f", {gb(over)} too much" if over > 0 else ""
    whole = "the whole cache" if task.config.kv_dtype == "model" else "the whole cache as the model has it"
    return f"weights take {gb(weights)}{_in_bits(task)} and {whole} {gb(cache)} of the device's {gb(memory)}{beyond}"


def _in_bits(task: Task) -> str:
    """Of quantised weights, how wide they are."""
    bits = task.shape.layer_bits
    return f" ({bits:.3g} bits each)" if bits < 8 * task.shape.activation_itemsize_bytes else ""


def _speed(task: Task, one: Alternative) -> str:
    step = "token" if one.way == "drafts" else "step"
    several = "" if task.workload.batch == 1 else f" of {counted(one.batch, 'sequence')}"
    prefill = f"{'prompt' if one.batch * one.runs == 1 else 'prompts'} {duration(one.prefill_s * one.runs)}"
    if one.runs > 1:
        prefill += f" in {one.runs} parts"
    return f"{rate(one.tokens_per_s)} tokens/s in all ({prefill}, then {duration(one.step_s)} a {step}{several})"


def _bounds(task: Task, one: Alternative, step_bound: str) -> str:
    """What a step is bound by, and the prompts where they take most of the time."""
    share = one.prefill_s * one.runs / one.total_s
    steps = f"Steps are bound by {step_bound}" if task.workload.new_tokens > 1 else "There is no step"
    if share < 0.5:
        return steps
    streams = one.way in ("offload", "drafts") and one.prefill_s > LEAST_GAIN * task.prefill_s(one.batch)
    return f"{steps}; the prompts, {share:.0%} of the time, by {'the link' if streams else 'computing'}"


def _over_full(found: Found) -> str:
    """What planning gains over the whole run, where it does."""
    if found.full is None or found.full.total_s < LEAST_GAIN * found.ours.total_s:
        return ""
    return f", {found.full.total_s / found.ours.total_s:.1f}x full transfer"


def _drafted(found: Found) -> str:
    if found.drafts is None or found.rounds is None:
        return ""
    read = "4-bit copies of all tokens" if found.rounds.reads_all else "the newest tokens"
    chance = f"each assumed to be right with a chance of {found.rounds.acceptance:.2f}"
    return f", with verified drafts from {read}, {chance}"


def _plan_bound(plan: Plan) -> str:
    return {
        "link": "the link",
        "device": "the device, which computes and reads its memory",
        "host": "the host's time for each copy",
        "device_memory": "the link, at the limit of device memory",
        "host_memory": "the link, at the limit of host memory",
    }[plan.binding_constraint]


def _device_bound(task: Task, one: Alternative) -> str:
    """Whether a step on the device computes, reads or is issued for longest."""
    inputs = task.inputs(task.mean_tokens(), one.batch)
    step = step_time.predict(inputs, {"resident_kv": inputs.num_blocks})
    if step.issue_s > step.device_s + task.tail_s(inputs):
        return "the host, which issues them"
    computes = decode_mfu(task, one.batch, one.step_s) > decode_mbu(task, one.batch, one.step_s)
    return "computing" if computes else "reading weights and cache from device memory"


def _grouped(task: Task, plan: Plan) -> Iterator[str]:
    """Grouped queries are why recomputing K and V from activations gains nothing."""
    shape = task.shape
    is_grouped = not shape.cached_values and shape.num_kv_heads < shape.num_heads
    if is_grouped and shape.kv_row_bytes <= shape.activation_row_bytes and not plan.split_fraction:
        yield "Its grouped queries make K and V no larger than activations, so recomputing them gains nothing."


def _larger_batches(task: Task, best: StreamedBatch | None) -> Iterator[str]:
    """Which batch pays for streaming, and from which on it is faster than weights in 4 bits."""
    if best is None or best.batch <= task.workload.batch:
        return
    streamed = (
        f"Each forward reads streamed weights once, whatever the batch: {counted(best.batch, 'sequence')} of this "
        f"length make {rate(best.found.tokens_per_s)} tokens/s (with {gb(best.host_bytes)} of host memory)"
    )
    if best.quantised is None:
        yield f"{streamed}."
    else:
        yield f"{streamed}, {rate(best.quantised.tokens_per_s)} with weights in 4 bits."


def _beyond_positions(task: Task, facts: Facts) -> Iterator[str]:
    """Where a sequence becomes longer than the model's positions; it is planned for all the same."""
    limit, num_tokens = facts.position_limit, task.workload.prompt_tokens + task.workload.new_tokens
    if limit is not None and num_tokens > limit:
        yield (
            f"But prompt and new tokens make {count(num_tokens)}, and the model's configuration has positions for "
            f"{count(limit)}."
        )


def _close(task: Task) -> Iterator[str]:
    """Where a little more memory would do, which a device of that name may have."""
    memory = task.profile.device_memory_bytes
    over = task.shape.weight_bytes + task.resident_bytes(task.workload.batch) - memory
    if 0 < over <= CLOSE_FRACTION * memory and "datasheet" in task.profile.extra:
        yield (
            f"This is close: {gb(memory)} is the datasheet's figure, and drivers report up to {CLOSE_FRACTION:.0%} "
            "more; --device-memory plans with what yours has."
        )


def _doubted(facts: Facts) -> Iterator[str]:
    """Where the sizes of the model are guessed."""
    if facts.doubt:
        yield f"All this is a guess: {facts.doubt}."


def _details(task: Task, found: Found) -> str:
    """The placement, and what a step of each way takes."""
    said = f"Offloaded: {placement(found.plan, found.offload)}"
    if found.drafts is not None:
        said += f"{_drafted(found)}, a token takes {duration(found.drafts.step_s)}"
    if found.on_device is not None:
        said += f". {_runs(found.on_device).capitalize()}: a step takes {duration(found.on_device.step_s)} on average"
    return f"{said}. {_memory(task, found)}"


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


def _memory(task: Task, found: Found) -> str:
    """What becomes of the device's memory where the cache is offloaded."""
    memory, weights = task.profile.device_memory_bytes, task.device_weight_bytes
    return (
        f"Of the device's {gb(memory)} then {gb(weights)} are weights, {gb(found.plan.device_bytes)} cache and "
        f"buffers, and {gb(max(0, memory - weights - found.plan.device_bytes))} are left to the prefill and kept free."
    )


def _runs(one: Alternative) -> str:
    return "on the device" if one.runs == 1 else f"{one.runs} runs of {counted(one.batch, 'sequence')} on the device"
