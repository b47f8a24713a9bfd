"""The ways to do the workload as a table of the page, and the plan's times beside those of the roofline.

Owns columns, units and the words of why two figures differ. Does not own the figures (`kvoffload/advise/comparison.py`,
`roofline`) nor the words around them (`sections`).
"""

from __future__ import annotations

from collections.abc import Iterator

from kvoffload.advise.comparison import WayFigures
from kvoffload.advise.ways import LABELS, Way
from kvoffload.planning.forms import FORMS
from kvoffload.planning.placement import PLAIN
from kvoffload.profiler.drawing.page import Table
from kvoffload.profiler.drawing.sizes import best_row
from kvoffload.profiler.drawing.study import Study
from kvoffload.profiler.drawing.terminal_tables import seconds, si
from kvoffload.units import count, counted

TITLE = "The ways to do this workload"
DOES_NOT_FIT, NOT_NEEDED = "does not fit", "not needed"
DO_NOT_FIT: dict[Way, str] = {"sub_batches": "do not fit"}
COLUMNS = (
    *("way", "tokens/s", "everything", "decode step", "prefill", "batch"),
    *("device memory", "host memory", "link busy", "device busy"),
)
CLOSE_FRACTION = 0.02  # times that differ less than that are called the same


def best_name(found: Study) -> str | None:
    """The way that the verdict names."""
    if found.advice is not None:
        return found.advice.best.way
    fastest = best_row(found.own)
    return None if fastest is None else fastest.name


def ways_table(found: Study) -> Table:
    """A row for each way, the recommended one marked; of one that cannot be done only that it cannot."""
    best, rows = best_name(found), found.own.rows
    return Table(
        TITLE,
        COLUMNS,
        tuple(_cells(found, row) for row in rows),
        marked=next((idx for idx, row in enumerate(rows) if row.name == best), None),
        notes=(
            "Predicted for the whole workload: new tokens of all sequences over everything, and the mean of its decode "
            "steps; link and device, their share of one.",
            *_problems(found),
        ),
        style="numbers",
    )


def _problems(found: Study) -> Iterator[str]:
    for row in found.own.rows:
        if reason := found.own.problem(row.name):
            label = LABELS[row.name]
            yield f"{label[0].upper()}{label[1:]} {DO_NOT_FIT.get(row.name, DOES_NOT_FIT)}: {reason}."


def _cells(found: Study, row: WayFigures) -> tuple[str, ...]:
    if row.problem:
        return LABELS[row.name], DOES_NOT_FIT if found.own.problem(row.name) else NOT_NEEDED
    best = ", best" if row.name == best_name(found) else ""
    return (
        f"{LABELS[row.name]}{best}",
        f"{row.tokens_per_s:.4g}",
        *(seconds(value) for value in (row.total_s, row.step_s, row.prefill_s)),
        f"{row.runs} x {row.batch}" if row.runs > 1 else count(row.batch),
        *(si(value, "B") if value else "0 B" for value in (row.device_bytes, row.host_bytes)),
        *(f"{value:.0%}" for value in (row.link_utilization, row.device_utilization)),
    )


def beside_roofline(found: Study) -> Table | None:
    """The plan's prefill, step and total beside the roofline's, and why they differ; None where there is no plan."""
    ours = found.own.row("offload")
    if ours is None:
        return None
    shown = found.roofline
    rows = (
        ("prefill", ours.prefill_s, shown.prefill.seconds, _why_prefill(found, ours)),
        ("decode step", ours.step_s, shown.decode.seconds, _why_step(found)),
        ("everything", ours.total_s, shown.task.seconds, _why_total(found)),
    )
    return Table(
        "Prefill, step and total: the plan's and the roofline's",
        ("", "plan: offload", "roofline", "difference"),
        tuple(
            (name, seconds(plan_s), seconds(roof_s), _difference(plan_s, roof_s)) for name, plan_s, roof_s, _ in rows
        ),
        notes=tuple(f"{name[0].upper()}{name[1:]}: {why}" for name, _, _, why in rows),
        style="numbers",
    )


def _difference(plan_s: float, roof_s: float) -> str:
    change = roof_s / plan_s - 1
    return "none" if abs(change) < CLOSE_FRACTION else f"{change:+.0%}"


def _why_prefill(found: Study, ours: WayFigures) -> str:
    task = found.task
    computed_s = task.prefill_s(task.workload.batch)
    said = "the roofline adds up each operation by itself, those too that memory bounds"
    plan = (
        "the plan takes the same"
        if computed_s == task.least_prefill_s(task.workload.batch)
        else ("the plan divides all operations by the measured rate of matrix products")
    )
    if ours.prefill_s > computed_s * (1 + CLOSE_FRACTION):
        what = "the weights have come over the link" if task.streamed_bytes else "the cache is written to the host"
        plan += f" ({seconds(computed_s)}), and waits until {what}"
    return f"{said}; {plan}."


def _why_step(found: Study) -> str:
    task = found.task
    mean, prompt = task.mean_tokens(), task.workload.prompt_tokens
    context = (
        f"the plan's is of the mean context, {counted(mean, 'token')}; the roofline's of the prompt, {count(prompt)}"
    )
    forms = _forms_on_link(found)
    if forms:
        context += f", with what crosses the link as plain K/V, where the plan has {forms}"
    return f"{context}. The plan's is the longest of link, device and host, the roofline's of link and device."


def _forms_on_link(found: Study) -> str:
    """Forms other than plain K and V that cross the link."""
    if found.advice is None:
        return ""
    placed = found.advice.plan.placed
    kinds = [kind for kind, number in placed.items() if number and kind.tier == "host" and kind.form != PLAIN]
    return " and ".join(FORMS[kind.form].label for kind in kinds)


def _why_total(found: Study) -> str:
    steps = found.task.workload.new_tokens - 1
    return f"both are the prefill and {counted(steps, 'step')}; the roofline's steps grow with the context one by one."
