"""The ways to do a workload over its sizes: new tokens per second over batch and context, memory over context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvoffload.advise.ways import LABELS, Way
from kvoffload.profiler.drawing.chart import (
    BLUE,
    GREEN,
    GREY,
    NO_FIT,
    ORANGE,
    PINK,
    PURPLE,
    TEAL,
    Chart,
    end_of_axis,
    figure,
    layout_of,
    log_axis,
    require_plotly,
    ticks,
)
from kvoffload.profiler.drawing.marks import no_fit, workload_line, workload_star
from kvoffload.profiler.drawing.sizes import SizePoint, best_row
from kvoffload.profiler.drawing.study import Study
from kvoffload.profiler.drawing.terminal_tables import si
from kvoffload.units import count, counted

STYLES: dict[Way, tuple[str, str, str]] = {  # colour, symbol and dash of a way to do the work
    "on_device": (GREEN, "circle", "solid"),
    "sub_batches": (PURPLE, "square", "dash"),
    "offload": (BLUE, "diamond", "solid"),
    "drafts": (TEAL, "star-diamond", "solid"),
    "full_transfer": (ORANGE, "triangle-up", "dot"),
    "kvpr": (PINK, "hexagon", "dashdot"),
}


def batch_chart(found: Study) -> Chart:
    """New tokens per second of every way over the batch."""
    workload = found.task.workload
    title = f"Over batch, prompts of {counted(workload.prompt_tokens, 'token')}"
    return _sizes_chart(
        ("batch-chart", title, "batch"), found.over_batch, lambda point: point.batch, workload.batch, None
    )


def context_chart(found: Study) -> Chart:
    """New tokens per second of every way over the prompt, as far as the model has positions."""
    workload = found.task.workload
    return _sizes_chart(
        ("context-chart", f"Over context, batch {count(workload.batch)}", "prompt tokens"),
        found.over_context,
        lambda point: point.prompt_tokens,
        workload.prompt_tokens,
        found.dims.position_limit,
    )


def _sizes_chart(
    names: tuple[str, str, str],
    points: Sequence[SizePoint],
    size: Callable[[SizePoint], int],
    own: int,
    most: int | None,
) -> Chart:
    """New tokens per second of every way over one size."""
    name, title, label = names
    go, lines = require_plotly(), []
    sizes = [size(point) for point in points]
    rates = [row.tokens_per_s for point in points for row in point.rows if not row.problem]
    upright = log_axis("new tokens per second", rates, beyond=1.5)
    low, high = (10.0**end for end in upright["range"])
    for way, (colour, symbol, dash) in STYLES.items():
        rows = [point.row(way) for point in points]
        if any(row is not None for row in rows):
            lines.append(
                go.Scatter(
                    name=LABELS[way],
                    mode="lines+markers",
                    x=sizes,
                    y=[None if row is None else row.tokens_per_s for row in rows],
                    line={"color": colour, "dash": dash, "width": 2.5},
                    marker={"symbol": symbol, "size": 9},
                    hovertemplate=f"{label} %{{x}}: %{{y:.4s}} tokens/s<extra>{LABELS[way]}</extra>",
                    cliponaxis=False,
                )
            )
    data = [workload_line(own, low, high), *lines, *_crosses(points, size, low * (high / low) ** 0.03)]
    best = next((best_row(point) for point in points if size(point) == own), None)
    if best is not None:
        rate = best.tokens_per_s
        hover = f"your workload, {label} {count(own)}: {LABELS[best.name]}, {rate:.4g} tokens/s"
        data.append(workload_star(own, rate, STYLES[best.name][0], f"best: {LABELS[best.name]}", hover))
    across = log_axis(_positions_in_words(label, most), sizes) | ticks(sizes, own) | end_of_axis(sizes, most)
    table = []
    for point in points:
        cells = [_cell(point, way) for way in STYLES]
        mark = ", yours" if size(point) == own else ""
        table.append((f"{count(size(point))}{mark}", *cells))
    return Chart(
        name,
        title,
        figure(go, data, layout_of(across, upright, own)),
        _best_in_words(label, points, size),
        (label, *(LABELS[way] for way in STYLES)),
        tuple(table),
    )


def _crosses(points: Sequence[SizePoint], size: Callable[[SizePoint], int], foot: float) -> list[Any]:
    """At the foot of the chart, where the whole batch does not fit on the device, or nothing works."""
    nothing = [point for point in points if best_row(point) is None]
    whole = [point for point in points if point.problem("on_device") and point not in nothing]
    found = []
    for name, way, shown, symbol in (
        ("no offload does not fit", "on_device", whole, "x-thin"),
        ("nothing fits", "offload", nothing, "x"),
    ):
        if shown:
            why = [f"{count(size(point))}: {name}: {point.problem(way)}" for point in shown]  # type: ignore[arg-type]
            found.append(no_fit([size(point) for point in shown], [foot] * len(shown), name, why, symbol))
    return found


def _cell(point: SizePoint, way: Way) -> str:
    row = point.row(way)
    if row is not None:
        return f"{row.tokens_per_s:.4g}"
    return "does not fit" if point.problem(way) else ""


def _positions_in_words(label: str, most: int | None) -> str:
    return label if most is None else f"{label} (at most {count(most)})"


def _best_in_words(label: str, points: Sequence[SizePoint], size: Callable[[SizePoint], int]) -> str:
    """Where the best way changes."""
    found: list[str] = []
    before = ""
    for point in points:
        fastest = best_row(point)
        name = LABELS[fastest.name] if fastest else "nothing"
        if name != before:
            found.append(f"{name} from {count(size(point))} on")
        before = name
    return f"Best over {label}: {', '.join(found)}."


def memory_chart(found: Study) -> Chart:
    """Device and host memory over the prompt."""
    go, points, capacity = require_plotly(), found.over_context, found.machine.memory_bytes
    x = [point.prompt_tokens for point in points]
    own, most = found.task.workload.prompt_tokens, found.dims.position_limit
    offloaded = [point.row("offload") for point in points]

    def line(name: str, values: Sequence[float | None], colour: str, symbol: str, dash: str) -> Any:
        return go.Scatter(
            name=name,
            mode="lines+markers",
            x=x,
            y=[None if value is None else value / 1e9 for value in values],
            line={"color": colour, "dash": dash, "width": 2.5},
            marker={"symbol": symbol or "line-ns", "size": 9 if symbol else 1},
            hovertemplate=f"%{{x}} tokens: %{{y:.4g}} GB<extra>{name}</extra>",
            cliponaxis=False,
        )

    weights = [float(found.task.shape.weight_bytes)] * len(x)
    host = [row.host_bytes or None if row else None for row in offloaded]
    usable = [point.usable_bytes or None for point in points]
    lines = [
        line("no offload", [point.whole_bytes for point in points], GREEN, "circle", "solid"),
        line("offload: device", [row.device_bytes if row else None for row in offloaded], BLUE, "diamond", "solid"),
        line("offload: host", host, ORANGE, "square", "dash"),
        line("weights", weights, PURPLE, "triangle-up", "dot"),
        line("device limit", usable, NO_FIT, "", "dashdot"),
        line(f"device: {si(capacity, 'B')}", [float(capacity)] * len(x), GREY, "", "longdash"),
    ]
    shown = [trace for trace in lines if any(trace.y)]
    upright = log_axis("memory, GB", [value for trace in shown for value in trace.y], beyond=1.4)
    low, high = (10.0**end for end in upright["range"])
    data = [workload_line(own, low, high), *shown]
    beyond = [point for point in points if point.problem("on_device")]
    if beyond:
        why = [f"{count(point.prompt_tokens)} tokens: {point.problem('on_device')}" for point in beyond]
        gigabytes = [point.whole_bytes / 1e9 for point in beyond]
        at = [point.prompt_tokens for point in beyond]
        data.append(no_fit(at, gigabytes, "does not fit", why))
    across = log_axis(_positions_in_words("prompt tokens", most), x) | ticks(x, own) | end_of_axis(x, most)
    rows = tuple(
        (
            count(point.prompt_tokens) + (", yours" if point.prompt_tokens == own else ""),
            si(point.whole_bytes, "B") + (", does not fit" if point.problem("on_device") else ""),
            si(row.device_bytes, "B") if row else "does not fit",
            si(row.host_bytes, "B") if row else "",
        )
        for point, row in zip(points, offloaded, strict=True)
    )
    fitting = [point.prompt_tokens for point in points if point.row("on_device")]
    largest = f"up to prompts of {counted(max(fitting), 'token')}" if fitting else "at none"
    return Chart(
        "memory-chart",
        "Memory over context",
        figure(go, data, layout_of(across, upright, own)),
        f"Of the lengths shown, weights and the whole cache fit on the device {largest}.",
        ("prompt tokens", "no offload", "offload: device", "offload: host"),
        rows,
    )
