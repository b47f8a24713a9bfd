"""What a plan weighs: step time over the split, the ways over batch and context, memory, and how predictions fared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvoffload.advise.ways import LABELS, Way
from kvoffload.profiler.drawing.chart import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    PURPLE,
    TEAL,
    Chart,
    figure,
    layout_of,
    log_axis,
    require_plotly,
    ticks,
    time_unit,
)
from kvoffload.profiler.drawing.study import Compared, SizePoint, SplitPoint, Study, best_row
from kvoffload.profiler.drawing.terminal_tables import seconds, si
from kvoffload.units import count, counted

STYLES: dict[Way, tuple[str, str, str]] = {  # colour, symbol and dash of a way to do the work
    "on_device": (GREEN, "circle", "solid"),
    "sub_batches": (PURPLE, "square", "dash"),
    "offload": (BLUE, "diamond", "solid"),
    "drafts": (TEAL, "star", "solid"),
    "full_transfer": (ORANGE, "triangle-up", "dot"),
    "kvpr": (PINK, "x", "dashdot"),
}


def split_chart(found: Study) -> Chart:
    """Step time for every number of blocks kept as activations, and the plan's."""
    assert found.advice is not None
    go, points, plan = require_plotly(), found.splits, found.advice.plan
    chosen = plan.activation_blocks + plan.resident_activation_blocks
    factor, unit = time_unit(max(point.step_s for point in points))
    x = [point.activation_blocks for point in points]

    def line(name: str, values: Sequence[float], colour: str, dash: str, width: float) -> Any:
        return go.Scatter(
            name=name,
            mode="lines+markers" if len(x) < 3 else "lines",
            x=x,
            y=[value * factor for value in values],
            line={"color": colour, "dash": dash, "width": width},
            hovertemplate=f"%{{x}} blocks: %{{y:.4g}} {unit}<extra>{name}</extra>",
        )

    data = [
        line("link", [point.link_s for point in points], BLUE, "dot", 2),
        line("device", [point.device_s for point in points], ORANGE, "dash", 2),
        line("host", [point.host_s for point in points], GREY, "dashdot", 2),
        line(LABELS["kvpr"], [point.paper_step_s for point in points], PINK, "longdashdot", 2),
        line("step", [point.step_s for point in points], GREEN, "solid", 4),
        go.Scatter(
            name="the plan",
            mode="markers",
            x=[chosen],
            y=[plan.predicted_step_s * factor],
            marker={"color": GREEN, "symbol": "star", "size": 18, "line": {"width": 1.5, "color": "#ffffff"}},
            hovertemplate=f"the plan: %{{x}} blocks, %{{y:.4g}} {unit}<extra></extra>",
        ),
    ]
    layout = layout_of(
        {"title": {"text": f"blocks kept as activations, of {plan.num_blocks}"}},
        {"title": {"text": f"step, {unit}"}, "rangemode": "tozero"},
    )
    return Chart(
        "split-chart",
        "Step time at every split",
        figure(go, data, layout),
        f"The plan keeps {chosen} of {counted(plan.num_blocks, 'block')} of each layer as activations: "
        f"{seconds(plan.predicted_step_s)} a step, limited by the {plan.binding_constraint.replace('_', ' ')}. "
        f"With none it would take {_step_at(points, 0)}, with all {_step_at(points, plan.num_blocks)}.",
        ("blocks as activations", "link", "device", "host", "step", LABELS["kvpr"]),
        tuple((str(point[0]), *(seconds(value) for value in point[1:])) for point in points),
    )


def _step_at(points: Sequence[SplitPoint], blocks: int) -> str:
    return next((seconds(one.step_s) for one in points if one.activation_blocks == blocks), "more memory than there is")


def sizes_chart(
    name: str, title: str, label: str, points: Sequence[SizePoint], size: Callable[[SizePoint], int]
) -> Chart:
    """New tokens per second of every way over one size."""
    go, data = require_plotly(), []
    for way, (colour, symbol, dash) in STYLES.items():
        found = [(size(point), point.row(way)) for point in points]
        if any(row is not None for _, row in found):
            data.append(
                go.Scatter(
                    name=LABELS[way],
                    mode="lines+markers",
                    x=[at for at, _ in found],
                    y=[None if row is None else row.tokens_per_s for _, row in found],
                    line={"color": colour, "dash": dash, "width": 2.5},
                    marker={"symbol": symbol, "size": 9},
                    hovertemplate=f"{label} %{{x}}: %{{y:.4s}} tokens/s<extra>{LABELS[way]}</extra>",
                )
            )
    sizes = [size(point) for point in points]
    rates = [row.tokens_per_s for point in points for row in point.rows if not row.problem]
    layout = layout_of(log_axis(label, sizes) | ticks(sizes), log_axis("new tokens per second", rates))
    rows = []
    for point in points:
        cells = [point.row(way) for way in STYLES]
        rows.append((str(size(point)), *("" if row is None else f"{row.tokens_per_s:.4g}" for row in cells)))
    return Chart(
        name,
        title,
        figure(go, data, layout),
        _best_in_words(label, points, size),
        (label, *(LABELS[way] for way in STYLES)),
        tuple(rows),
    )


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
    offloaded = [point.row("offload") for point in points]

    def line(name: str, values: Sequence[float | None], colour: str, symbol: str, dash: str) -> Any:
        return go.Scatter(
            name=name,
            mode="lines+markers",
            x=x,
            y=[None if value is None else value / 1e9 for value in values],
            line={"color": colour, "dash": dash, "width": 2.5},
            marker={"symbol": symbol, "size": 9 if symbol else 1},
            hovertemplate=f"%{{x}} tokens: %{{y:.4g}} GB<extra>{name}</extra>",
        )

    weights = [float(found.task.shape.weight_bytes)] * len(x)
    host = [row.host_bytes or None if row else None for row in offloaded]
    usable = [point.usable_bytes or None for point in points]
    lines = [
        line("all on the device", [point.whole_bytes for point in points], GREEN, "circle", "solid"),
        line("offload: device", [row.device_bytes if row else None for row in offloaded], BLUE, "diamond", "solid"),
        line("offload: host", host, ORANGE, "square", "dash"),
        line("weights alone", weights, PURPLE, "triangle-up", "dot"),
        line("limit for weights and cache", usable, PINK, "line-ns", "dashdot"),
        line(f"device has {si(capacity, 'B')}", [float(capacity)] * len(x), GREY, "line-ns", "longdash"),
    ]
    data = [trace for trace in lines if any(trace.y)]
    shown = [value for trace in data for value in trace.y]
    layout = layout_of(log_axis("tokens of each prompt", x) | ticks(x), log_axis("memory, GB", shown))
    rows = tuple(
        (
            str(point.prompt_tokens),
            si(point.whole_bytes, "B"),
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
        figure(go, data, layout),
        f"Of the lengths shown, weights and the whole cache fit on the device {largest}.",
        ("prompt tokens", "all on the device", "offload: device", "offload: host"),
        rows,
    )


def compared_chart(compared: Sequence[Compared]) -> Chart:
    """Measured over predicted step times, one point for each row."""
    go = require_plotly()
    everything = [value for one in compared for value in (one.predicted_s, one.measured_s)]
    low, high = min(everything) * 1e3 / 1.25, max(everything) * 1e3 * 1.25
    data = [
        go.Scatter(
            name="as predicted",
            mode="lines",
            x=[low, high],
            y=[low, high],
            line={"color": GREY, "dash": "dash", "width": 2},
            hoverinfo="skip",
        )
    ]
    places = list(dict.fromkeys(one.where for one in compared))
    looks = [(BLUE, "circle"), (ORANGE, "diamond"), (GREEN, "square"), (PINK, "x"), (PURPLE, "triangle-up")]
    for idx, where in enumerate(places):
        ours = [one for one in compared if one.where == where]
        colour, symbol = looks[idx % len(looks)]
        data.append(
            go.Scatter(
                name=where,
                mode="markers",
                x=[one.predicted_s * 1e3 for one in ours],
                y=[one.measured_s * 1e3 for one in ours],
                text=[one.name for one in ours],
                hovertemplate="%{text}<br>predicted %{x:.4g} ms<br>measured %{y:.4g} ms<extra></extra>",
                marker={"color": colour, "symbol": symbol, "size": 9, "opacity": 0.85},
            )
        )
    limits = (low, high)
    layout = layout_of(
        log_axis("predicted step, ms", limits, beyond=1.0), log_axis("measured step, ms", limits, beyond=1.0)
    )
    errors = sorted(abs(one.error_fraction) for one in compared)
    return Chart(
        "compared-chart",
        "Measured against predicted",
        figure(go, data, layout),
        f"{counted(len(compared), 'measured step')}: the median differs from its prediction by "
        f"{errors[len(errors) // 2]:.3f} of it, the worst by {errors[-1]:.3f}.",
        ("step", "where", "predicted", "measured", "error, as a share"),
        tuple(
            (one.name, one.where, seconds(one.predicted_s), seconds(one.measured_s), f"{one.error_fraction:+.3f}")
            for one in compared
        ),
        height_px=480,
    )
