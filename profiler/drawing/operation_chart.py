"""The roofline of a machine with a model's operations on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from kvoffload.profiler.drawing.marks import WORKLOAD, workload_star
from kvoffload.profiler.drawing.terminal_tables import seconds, si
from kvoffload.units import counted

POINTS_OF_A_ROOF = 60
CLOSE = 0.06  # of a decade: dots nearer than that in both directions are drawn as one


class Dot(NamedTuple):
    """Operations that stand at one place of a roofline."""

    intensity: float  # FLOP per byte
    flops_per_s: float
    names: tuple[str, ...]
    hover: tuple[str, ...]

    @property
    def label(self) -> str:
        """In few letters."""
        more = f" +{len(self.names) - 1}" if len(self.names) > 1 else ""
        return f"{self.names[0].replace('_', ' ')}{more}"


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
        dots = dots_of(
            shown,
            lambda row: row.intensity,
            lambda row: row.flops / row.seconds,
            lambda row: f"{row.name}: {seconds(row.seconds)}, bound by {row.bound}",
        )
        data.append(_dots(go, phase.name, dots, {"color": colour, "symbol": symbol, "size": 10}))
    if crossing:
        dots = dots_of(
            crossing,
            lambda row: row.flops / row.link_bytes,
            lambda row: row.flops / max(row.seconds, row.link_s),
            lambda row: f"{row.name}: {seconds(row.link_s)} of the link",
        )
        data.append(_dots(go, "decode, over the link", dots, {"color": PINK, "symbol": "hexagon", "size": 11}))
    for phase, colour in zip(phases, (ORANGE, BLUE), strict=True):
        data += _whole(phase, colour)
    attained = [row.flops / max(row.seconds, row.link_s) for phase in phases for row in phase.rows if row.seconds]
    attained += [phase.total("flops") / phase.seconds for phase in phases if phase.seconds]
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


def dots_of(
    rows: Sequence[OperationTime],
    x: Callable[[OperationTime], float],
    y: Callable[[OperationTime], float],
    hover: Callable[[OperationTime], str],
) -> list[Dot]:
    """Operations as dots, those at nearly the same place together; the first of each, which takes longest, names it."""
    found: list[Dot] = []
    for row in sorted(rows, key=lambda row: -max(row.seconds, row.link_s)):
        one = Dot(x(row), y(row), (row.name,), (hover(row),))
        near = next((idx for idx, dot in enumerate(found) if _is_near(dot, one)), None)
        if near is None:
            found.append(one)
        else:
            dot = found[near]
            found[near] = dot._replace(names=dot.names + one.names, hover=dot.hover + one.hover)
    return found


def _is_near(one: Dot, other: Dot) -> bool:
    ratios = (one.intensity / other.intensity, one.flops_per_s / other.flops_per_s)
    return max(abs(math.log10(ratio)) for ratio in ratios) < CLOSE


def _dots(go: Any, name: str, dots: Sequence[Dot], marker: dict[str, Any]) -> Any:
    """Dots with their names beside them; `page.js` takes away names that would overlap."""
    return go.Scatter(
        name=name,
        mode="markers+text",
        x=[dot.intensity for dot in dots],
        y=[dot.flops_per_s for dot in dots],
        text=[dot.label for dot in dots],
        textposition="bottom right",
        textfont={"size": 12},
        customdata=["<br>".join(dot.hover) for dot in dots],
        hovertemplate="%{customdata}<br>%{x:.3s} FLOP/byte<br>%{y:.3s}FLOP/s<extra>" + name + "</extra>",
        marker=marker | {"opacity": 0.85},
    )


def _whole(phase: Phase, colour: str) -> list[Any]:
    """A star for all operations of a phase together: where the workload stands."""
    num_bytes, flops = phase.total("memory_bytes"), phase.total("flops")
    if not (num_bytes and flops and phase.seconds):
        return []
    hover = f"whole {phase.name}: {seconds(phase.seconds)}<br>%{{x:.3s}} FLOP/byte<br>%{{y:.3s}}FLOP/s"
    return [workload_star(flops / num_bytes, flops / phase.seconds, colour, f"{WORKLOAD}: {phase.name}", hover)]


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
