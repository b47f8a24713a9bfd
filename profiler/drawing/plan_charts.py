"""What a plan weighs: step time over the split, and how predictions fared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvoffload.advise.ways import LABELS
from kvoffload.profiler.drawing.chart import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    PURPLE,
    Chart,
    figure,
    layout_of,
    log_axis,
    require_plotly,
    time_unit,
)
from kvoffload.profiler.drawing.marks import no_fit_line, workload_line, workload_star
from kvoffload.profiler.drawing.study import Compared, SplitPoint, Study
from kvoffload.profiler.drawing.terminal_tables import seconds
from kvoffload.units import counted


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
            cliponaxis=len(x) >= 3,
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
        workload_star(
            chosen,
            plan.predicted_step_s * factor,
            GREEN,
            "your workload: the plan",
            f"the plan: %{{x}} blocks, %{{y:.4g}} {unit}",
        ),
    ]
    room = 0.03 * max(1, plan.num_blocks)  # for a star at an end
    if len(points) <= plan.num_blocks:
        data.append(no_fit_line(sorted(set(range(plan.num_blocks + 1)) - set(x)), 0.0))
    layout = layout_of(
        {"title": {"text": f"blocks as activations, of {plan.num_blocks}"}, "range": [-room, plan.num_blocks + room]},
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


def compared_chart(compared: Sequence[Compared], own_step_s: float | None = None) -> Chart:
    """Measured over predicted step times, one point for each row.

    Args:
        compared: the rows.
        own_step_s: predicted for the user's workload, of which nothing was measured; None: it does not fit.
    """
    go = require_plotly()
    everything = [value for one in compared for value in (one.predicted_s, one.measured_s)]
    if own_step_s is not None:
        everything.append(own_step_s)
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
    looks = [(BLUE, "circle"), (ORANGE, "diamond"), (GREEN, "square"), (PINK, "hexagon"), (PURPLE, "triangle-up")]
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
    if own_step_s is not None:
        data.insert(0, workload_line(own_step_s * 1e3, low, high, "your workload, predicted"))
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
