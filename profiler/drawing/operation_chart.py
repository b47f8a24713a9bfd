"""The roofline of a machine with a model's operations on it."""

from __future__ import annotations

import math
from typing import Any

from kvoffload.advise.roofline import OperationTime, Phase, Roofline
from kvoffload.profiler.drawing.chart import (
    BLUE,
    GREY,
    ORANGE,
    PINK,
    Chart,
    figure,
    layout_of,
    log_axis,
    require_plotly,
)
from kvoffload.profiler.drawing.terminal_tables import seconds, si
from kvoffload.units import counted

POINTS_OF_A_ROOF = 60


def roofline_chart(found: Roofline) -> Chart:
    """Operations of prefill and decode under the roofs of device memory and link."""
    go, machine = require_plotly(), found.machine
    precision = found.setting.precision
    weight_bits = found.dims.linear_bits if precision.weight_bits is None else precision.weight_bits
    peak = machine.flops_per_s(math.ceil(max(weight_bits, precision.activation_bits)))  # of the wider operand
    phases = (found.prefill, found.decode)
    intensities = [row.intensity for phase in phases for row in phase.rows if row.intensity]
    crossing = [row for row in found.decode.rows if row.link_bytes and row.kv_bytes]
    intensities += [row.flops / row.link_bytes for row in crossing]
    ridge = peak / machine.memory_bytes_per_s
    low, high = min(intensities) / 3, max(*intensities, 4 * ridge) * 3
    data = [_roof(go, "device memory", machine.memory_bytes_per_s, peak, low, high, "solid")]
    if crossing and math.isfinite(machine.link_bytes_per_s):
        data.append(_roof(go, "link", machine.link_bytes_per_s, peak, low, high, "dash"))
    for phase, colour, symbol in zip(phases, (ORANGE, BLUE), ("circle", "diamond"), strict=True):
        shown = [row for row in phase.rows if row.intensity and row.seconds]
        data.append(
            go.Scatter(
                name=phase.name,
                mode="markers",
                x=[row.intensity for row in shown],
                y=[row.flops / row.seconds for row in shown],
                text=[f"{row.name}: {seconds(row.seconds)}, bound by {row.bound}" for row in shown],
                hovertemplate="%{text}<br>%{x:.3s} FLOP/byte<br>%{y:.3s}FLOP/s<extra>" + phase.name + "</extra>",
                marker={"color": colour, "symbol": symbol, "size": 10, "opacity": 0.85},
            )
        )
    if crossing:
        data.append(
            go.Scatter(
                name="decode, over the link",
                mode="markers",
                x=[row.flops / row.link_bytes for row in crossing],
                y=[row.flops / max(row.seconds, row.link_s) for row in crossing],
                text=[f"{row.name}: {seconds(row.link_s)} of the link" for row in crossing],
                hovertemplate="%{text}<br>%{x:.3s} FLOP/byte of the link<br>%{y:.3s}FLOP/s<extra></extra>",
                marker={"color": PINK, "symbol": "x", "size": 11},
            )
        )
    attained = [row.flops / max(row.seconds, row.link_s) for phase in phases for row in phase.rows if row.seconds]
    layout = layout_of(
        log_axis("FLOP per byte moved", (low, high), beyond=1.0),
        log_axis("FLOP/s", (*attained, peak), beyond=3.0),
    )
    table = tuple(_operation_cells(phase, row) for phase in phases for row in phase.rows)
    return Chart(
        "roofline-chart",
        "Operations under the roofs",
        figure(go, data, layout),
        f"{machine.device_name} computes at most {si(peak, 'FLOP/s')} and reads "
        f"{si(machine.memory_bytes_per_s, 'B/s')}: below {ridge:.0f} FLOP per byte memory is the limit. "
        f"{_bounds_in_words(found.prefill)} "
        f"{_bounds_in_words(found.decode)}",
        ("phase", "operation", "FLOP", "device memory", "link", "FLOP/byte", "bound", "time"),
        table,
        height_px=460,
    )


def _roof(go: Any, name: str, bytes_per_s: float, peak: float, low: float, high: float, dash: str) -> Any:
    """Bandwidth up to the ridge, then the peak."""
    step = (high / low) ** (1 / (POINTS_OF_A_ROOF - 1))
    x = sorted([*(low * step**idx for idx in range(POINTS_OF_A_ROOF)), peak / bytes_per_s])
    return go.Scatter(
        name=f"{name}, {si(bytes_per_s, 'B/s')}",
        mode="lines",
        x=x,
        y=[min(peak, bytes_per_s * value) for value in x],
        line={"color": GREY, "dash": dash, "width": 2},
        hoverinfo="skip",
    )


def _operation_cells(phase: Phase, row: OperationTime) -> tuple[str, ...]:
    return (
        phase.name,
        row.name,
        si(row.flops),
        si(row.memory_bytes, "B"),
        si(row.link_bytes, "B"),
        f"{row.intensity:.3g}",
        row.bound,
        seconds(max(row.seconds, row.link_s)),
    )


def _bounds_in_words(phase: Phase) -> str:
    bounds = sorted({row.bound for row in phase.rows})
    first, *others = (sum(row.bound == bound for row in phase.rows) for bound in bounds)
    parts = [f"{counted(first, 'operation is', 'operations are')} bound by {bounds[0]}"]
    parts += [f"{number} by {bound}" for number, bound in zip(others, bounds[1:], strict=True)]
    return f"{phase.name.capitalize()} takes {seconds(phase.seconds)}; {', '.join(parts)}."
