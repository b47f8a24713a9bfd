"""What a report tells, part by part, and which charts stand in it.

Owns the words, the order and what is said where something was not measured or does not exist. Does not own numbers
(`study`), charts (`chart` and its users) or markup (`page`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from kvoffload.advise.precisions import in_words
from kvoffload.advise.snippets import CODE
from kvoffload.machine.quantities import Quantity
from kvoffload.model.shape import shape_of
from kvoffload.profiler.drawing.operation_chart import roofline_chart
from kvoffload.profiler.drawing.page import Page, Section, Table
from kvoffload.profiler.drawing.plan_charts import compared_chart, split_chart
from kvoffload.profiler.drawing.sizes_charts import batch_chart, context_chart, memory_chart
from kvoffload.profiler.drawing.study import Study
from kvoffload.profiler.drawing.terminal_tables import seconds, si
from kvoffload.profiler.drawing.timeline_chart import measured_chart, planned_chart
from kvoffload.profiler.drawing.ways_table import TITLE, beside_roofline, ways_table
from kvoffload.units import counted

NOT_MEASURED = (
    "Not measured. `kvoffload report --measure` runs decode steps on this machine and puts them beside what was "
    "planned for them."
)


def page(found: Study, model: str, made: str) -> Page:
    """The whole report.

    Args:
        found: its numbers.
        model: what the model is called.
        made: with what, and when.
    """
    workload, profile = found.task.workload, found.task.profile
    beams = f" with {workload.num_beams} beams" if workload.num_beams > 1 else ""
    link, link_origin = _link(found)
    lengths = f"{counted(workload.prompt_tokens, 'prompt token')} and {counted(workload.new_tokens, 'new token')} each"
    facts = (
        ("Model", f"{model}: {found.dims.model_type}, {si(found.dims.num_weights)} parameters, {_attention(found)}"),
        ("Workload", f"batch {workload.batch}{beams}, {lengths}"),
        ("Hardware", f"{profile.device_name}, {si(found.machine.memory_bytes, 'B')} ({_origin(found)})"),
        ("Link", f"{link} ({link_origin})"),
        ("Measured here", _measured_fact(found)),
    )
    sections = (
        _ways(found, facts),
        _roofline(found),
        _timeline(found),
        _split(found),
        _sizes(found),
        _memory(found),
        _compared(found),
        _origins(found),
    )
    code = found.advice.answer.code if found.advice else ""
    return Page(f"{model} on {profile.device_name}", tuple(_advice(found)), code, sections, made)


def _advice(found: Study) -> Iterator[str]:
    """The verdict, its reasons, how fast it is, and what else has to be known."""
    said = found.advice.answer if found.advice else None
    verdict, colon, reasons = (said.verdict if said else found.recommendation).partition(": ")
    yield f"{verdict}." if colon else verdict
    if colon:
        yield reasons[0].upper() + reasons[1:]
    if said is not None:
        yield from (said.speed, *(note for note in said.notes if not note.startswith(CODE)), said.details)
    yield f"These are predictions {_basis(found)}, not measurements of this workload."


def _basis(found: Study) -> str:
    return "from datasheet figures" if _is_datasheet(found) else "from the measured profile of this hardware"


def _origin(found: Study) -> str:
    return "datasheet" if _is_datasheet(found) else "measured profile"


def _is_datasheet(found: Study) -> bool:
    """Whether nobody measured this hardware for us: a preset, or a user's file like one."""
    return "datasheet" in found.task.profile.extra


def _attention(found: Study) -> str:
    dims = found.dims
    if dims.latent_width:
        return "latent attention"
    kv_heads = shape_of(dims).num_kv_heads
    kind = "multi-head" if dims.num_heads == kv_heads else "grouped-query"
    return f"{kind} attention with {dims.num_heads} query and {kv_heads} K/V heads"


def _link(found: Study) -> tuple[str, str]:
    """Name and speed, and where the speed comes from."""
    profile, speed = found.task.profile, found.machine.link_bytes_per_s
    rate = f"{si(speed, 'B/s')} to the device" if math.isfinite(speed) else "no speed"
    return f"{profile.link_name}, {rate}", (
        "given: it is emulated" if profile.emulated_link else _provenance(found, "link_bytes_per_s")
    )


def _provenance(found: Study, name: str) -> str:
    """Where a figure of the machine comes from; what a preset calls measured was not measured here."""
    told = found.machine.provenance.get(name, "assumed")
    return "measured by others" if told == "measured" and _is_datasheet(found) else told


def _measured_fact(found: Study) -> str:
    run = found.measured
    if run is None:
        return "nothing: everything here is a prediction"
    link = "an emulated link" if run.is_emulated else "the link"
    return f"{counted(len(run.step_s), 'decode step')} of {run.shape}, on {run.device_name} over {link}"


# ---- parts -----------------------------------------------------------------------------------------------------------


def _ways(found: Study, facts: tuple[tuple[str, str], ...]) -> Section:
    """The table under the verdict, and what was asked for."""
    return Section("ways", TITLE, (), tables=(ways_table(found),), facts=facts)


def _roofline(found: Study) -> Section:
    shown = found.roofline
    lines = [
        "What each operation of the model computes for every byte it moves, against what the hardware can do. Left of "
        "the ridge a roof of bandwidth is the limit, right of it the peak.",
        f"Prefill takes {seconds(shown.prefill.seconds)}, bound by {shown.prefill.bound}; a decode step at the "
        f"prompt's context {seconds(shown.decode.seconds)}, bound by {shown.decode.bound}; the whole task "
        f"{seconds(shown.task.seconds)}.",
    ]
    if _is_datasheet(found):
        lines.append("The times are those of the roofs, with everything that crosses the link counted as K and V.")
    if found.advice is None:
        lines.append("The model does not fit this device: these are the times of one with more memory, else the same.")
    if not found.dims.is_exact:
        lines.append(f"A guess: {found.dims.doubt}.")
    if shown.setting.kv_on_host:
        lines.append(
            f"In decode, {shown.setting.kv_on_host:.2f} of the cached tokens come over the link, as the plan places "
            "them; the hexagon is attention by the bytes that cross it, all of them taken as K and V."
        )
    lines.append("A star is all operations of a phase together: where the workload stands.")
    table = beside_roofline(found)
    return Section("roofline", "Roofline", tuple(lines), (roofline_chart(shown),), (table,) if table else ())


def _timeline(found: Study) -> Section:
    lines = [
        "What link and device do during a decode step: the simulation of the plan at the full length of the cache"
        + (", and beside it a run of this machine." if found.measured else ".")
        + " Drag to zoom, double-click to go back."
    ]
    charts, notes = [], []
    if found.planned is not None:
        assert found.advice is not None
        charts.append(planned_chart(found))
        lines.append(
            f"Planned for {found.task.profile.device_name}: the cost model says "
            f"{seconds(found.advice.plan.predicted_step_s)} a step when all that may overlap does, "
            f"its simulation chunk by chunk with {counted(found.advice.plan.num_slots, 'slot')} "
            f"{seconds(found.simulated_step_s)}."
        )
        if not (found.planned.lane("h2d") or found.planned.lane("weights")):
            lines.append("The whole cache stays on the device: nothing crosses the link.")
    else:
        notes.append(f"No plan: {found.problem}.")
    run = found.measured
    if run is None:
        notes.append(NOT_MEASURED)
    else:
        notes.append(run.doubt)
        charts.append(measured_chart(run))
        emulated = " The link is emulated: copies are paced by a thread, no GPU took part." if run.is_emulated else ""
        lines.append(
            f"Measured on this machine, with random weights: {run.shape}. The plan beside it is for that run, at rates "
            f"taken around it.{emulated}"
        )
        lines.append(
            "Measured, dense and the rest is what the other lanes of compute leave of a step: host time is in it. "
            "Planned, waiting is for the link or for the host."
        )
    return Section("timeline", "Step timeline", tuple(lines), tuple(charts), note=" ".join(filter(None, notes)))


def _split(found: Study) -> Section:
    shape = found.task.shape
    ratio = shape.activation_row_bytes / shape.kv_row_bytes
    lines: tuple[str, ...] = (
        f"A block kept as activations has {ratio:.2f} times the bytes of its K and V in this model, and is recomputed "
        "on the device. The step takes as long as the slowest of link, device and host; for every number of blocks the "
        "best placement over device and host is taken.",
    )
    if line := in_words(found.precisions):
        lines = (*lines, f"{line} Those that are not exact have to be asked for (kv_dtype).")
    if not found.splits:
        return Section("split", "Split", lines, note=f"No split fits: {found.problem}.")
    return Section("split", "Split", lines, (split_chart(found),))


def _sizes(found: Study) -> Section:
    lines = (
        "New tokens per second of all sequences over the whole task, each way it can be done; a way that does not fit "
        "has no point, and a cross stands where the whole batch does not fit on the device. Sub-batches are the "
        "largest part of the batch that fits on the device, run as often as needed.",
        *_positions(found),
    )
    points = (*found.over_batch, *found.over_context)
    if not any(row for point in points for row in point.rows if not row.problem):
        return Section(
            "sizes", "Batch and context", lines, note=f"Nothing fits at any of these sizes: {found.problem}."
        )
    return Section("sizes", "Batch and context", lines, (batch_chart(found), context_chart(found)))


def _positions(found: Study) -> tuple[str, ...]:
    """Where the axes of the context end."""
    limit = found.dims.position_limit
    if limit is None:
        return ()
    return (f"The model has positions for {counted(limit, 'token')}, prompt and new ones together.",)


def _memory(found: Study) -> Section:
    workload, cap = found.task.workload, found.task.config.device_gib
    holds = "the plan fills the device up to there and gives the rest to the host"
    if cap == "min" or (cap == "auto" and found.task.profile.emulated_link):
        holds = "the plan holds as little on the device as works, the rest is on the host"
    lines = (
        f"Memory at the full length of {counted(workload.new_tokens, 'new token')} behind each prompt, batch "
        f"{workload.batch}. The limit leaves out the peak of the prefill and a tenth of what the weights leave free. "
        f"Offloaded, {holds}; where the size of the host's memory is not known it is taken as large enough.",
    )
    return Section("memory", "Memory", lines, (memory_chart(found),))


def _compared(found: Study) -> Section:
    lines = ["Decode steps that were measured, beside what the cost model predicted for them."]
    if not found.compared:
        note = f"{NOT_MEASURED} `--rows FILE` shows those of a results file."
        return Section("compared", "Measured and predicted", tuple(lines), note=note)
    own_step_s = found.advice.plan.predicted_step_s if found.advice else None
    emulated = sum("emulated" in one.where for one in found.compared)
    if emulated:
        lines.append(f"{emulated} of {counted(len(found.compared), 'step')} ran over an emulated link.")
    return Section("compared", "Measured and predicted", tuple(lines), (compared_chart(found.compared, own_step_s),))


def _seconds_of(one: Quantity) -> tuple[str, str]:
    """Value, and where it comes from with the spread of its trials."""
    spread = "" if one.spread_fraction is None else f", spread {one.spread_fraction:.2f}"
    return seconds(one.value), one.provenance + spread


def _origins(found: Study) -> Section:
    """Where every number comes from."""
    profile, machine = found.task.profile, found.machine
    peaks = ", ".join(f"{si(peak, 'FLOP/s')} at {bits} bits" for bits, peak in sorted(machine.peak_flops_per_s.items()))
    rows = [
        ("peak of matrix products", peaks, _provenance(found, "peak_flops_per_s")),
        ("device memory bandwidth", si(machine.memory_bytes_per_s, "B/s"), _provenance(found, "memory_bytes_per_s")),
        ("link to the device", *_link(found)),
        ("host time per layer", *_seconds_of(profile.quantity("host_s_per_layer"))),
        ("host time per chunk", *_seconds_of(profile.quantity("host_s_per_chunk"))),
        ("gap between steps", *_seconds_of(profile.quantity("gap_s"))),
        ("step times, memory, tokens per second", "all charts but the measured ones", f"predicted {_basis(found)}"),
    ]
    if not found.dims.is_exact:
        rows.append(("sizes of the model", found.dims.doubt, "guessed"))
    if found.measured is not None:
        run = found.measured
        kind = "measured over an emulated link" if run.is_emulated else "measured"
        rows.append(("decode steps of this machine", f"median {seconds(run.median_step_s)}, {run.where}", kind))
    elsewhere = [one for one in found.compared if found.measured is None or one.name != "this machine"]
    if elsewhere:
        number = counted(len(elsewhere), "step")
        rows.append(("rows of the results file", f"{number}, at the places named there", "measured"))
    table = Table("Numbers and their origin", ("number", "value", "origin"), tuple(rows))
    source = str(profile.extra.get("source", ""))
    lines = (
        "Datasheet: as its maker states it, the link as pinned copies are known to achieve it. Assumed: a typical "
        "value that nobody measured here. Predicted: worked out from the others.",
        *((f"Source of the hardware's figures: {source}",) if source else ()),
    )
    return Section("origins", "Where the numbers come from", lines, tables=(table,))
