"""Decode steps as lanes over time: as planned, and planned beside measured."""

from __future__ import annotations

from collections.abc import Iterator

from kvoffload.profiler.drawing.chart import (
    BLUE,
    BROWN,
    GOLD,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    PURPLE,
    TEAL,
    Chart,
    figure,
    layout_of,
    require_plotly,
    time_unit,
)
from kvoffload.profiler.drawing.study import MeasuredRun, Study
from kvoffload.profiler.drawing.terminal_tables import seconds, si
from kvoffload.profiler.drawing.trace import LABELS
from kvoffload.timeline import LANES, Lane, Timeline
from kvoffload.units import counted

COLOURS: dict[Lane, str] = {
    "h2d": BLUE,
    "weights": BROWN,
    "draft": TEAL,
    "verification": GOLD,
    "recompute": ORANGE,
    "attention": GREEN,
    "dense": PURPLE,
    "wait": GREY,
    "d2h": PINK,
}
SHORT: dict[Lane, str] = {
    "h2d": "link",
    "weights": "weights",
    "draft": "drafts",
    "verification": "verifying",
    "recompute": "recompute",
    "attention": "attention",
    "dense": "dense, rest",
    "wait": "waiting",
    "d2h": "link back",
}
LANE_PX, HEADING_PX, ROOM_PX = 40, 34, 80  # of a lane, of a heading between timelines, of everything around them
MAX_COPIES = 40  # of a planned step: each can be seen on a narrow screen


def planned_chart(found: Study) -> Chart:
    """One planned decode step, or as much of its beginning as can be told apart."""
    assert found.planned is not None
    step_s = found.planned.steps_s[-1]
    copies = found.planned.lane("h2d")
    shown_s = copies[MAX_COPIES].start_s if len(copies) > MAX_COPIES else step_s
    part = f"the first {seconds(shown_s)} of " if shown_s < step_s else ""
    shown = found.planned.between(0.0, shown_s)
    return _timelines_chart(
        "planned-timeline",
        f"One decode step as planned: {part}{seconds(step_s)}",
        {"planned": shown},
        "",
        {"planned": found.planned},
    )


def measured_chart(run: MeasuredRun) -> Chart:
    """Planned beside measured decode steps of this machine."""
    link = "emulated link" if run.is_emulated else "its own link"
    low_s, high_s = sorted(run.predicted_range_s)
    both = {"planned": run.planned, "measured": run.measured}
    return _timelines_chart(
        "measured-timeline",
        f"{counted(run.measured.num_steps, 'decode step')}, planned and measured on {run.device_name}, {link}",
        both,
        f"The median of {counted(len(run.step_s), 'measured step')} is {seconds(run.median_step_s)}, the prediction "
        f"{seconds(run.predicted_step_s)} ({seconds(low_s)} to {seconds(high_s)} at the rates before and after them). ",
        both,
    )


def _timelines_chart(
    name: str, title: str, shown: dict[str, Timeline], words: str, counted: dict[str, Timeline]
) -> Chart:
    """Lanes over time, one timeline below the other; the table adds up `counted`, which may be more than is shown."""
    go = require_plotly()
    longest_s = max(span.end_s for found in shown.values() for span in found.spans)
    factor, unit = time_unit(longest_s)
    layout = layout_of({"title": {"text": f"time, {unit}"}, "range": [0, longest_s * factor]}, {})
    lanes = {which: [lane for lane in LANES if found.lane(lane)] for which, found in shown.items()}
    num_lanes = sum(map(len, lanes.values()))
    height_px = ROOM_PX + LANE_PX * num_lanes + HEADING_PX * (len(shown) - 1)
    data, top = [], 1.0
    for number, (which, found) in enumerate(shown.items(), start=1):
        axis = f"y{number}" if number > 1 else "y"
        bottom = top - LANE_PX * len(lanes[which]) / (height_px - ROOM_PX)
        layout["yaxis" + axis[1:]] = {
            "domain": [max(0.0, bottom), top],
            "categoryorder": "array",
            "categoryarray": [SHORT[lane] for lane in reversed(lanes[which])],
            "automargin": True,
            "fixedrange": True,
        }
        heading = {"text": which, "x": 0, "y": top, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
        if len(shown) > 1:
            layout.setdefault("annotations", []).append(heading | {"xref": "paper", "yref": "paper"})
        layout["xaxis"]["anchor"] = axis
        for lane in lanes[which]:
            spans = found.lane(lane)
            hover = f"{LABELS[lane]}, {which}<br>from %{{base:.4g}} {unit}<br>for %{{x:.4g}} {unit}<extra></extra>"
            data.append(
                go.Bar(
                    name=f"{LABELS[lane]}, {which}",
                    orientation="h",
                    yaxis=axis,
                    y=[SHORT[lane]] * len(spans),
                    base=[span.start_s * factor for span in spans],
                    x=[span.seconds * factor for span in spans],
                    marker={
                        "color": COLOURS[lane],
                        "line": {"width": 0.4 * (lane in ("h2d", "weights")), "color": "#ffffff"},
                    },
                    hovertemplate=hover,
                    showlegend=False,
                )
            )
        top = bottom - HEADING_PX / (height_px - ROOM_PX)
    layout |= {"barmode": "overlay", "bargap": 0.25}
    layout["margin"] = layout["margin"] | {"t": 28 if len(shown) > 1 else 10}
    return Chart(
        name,
        title,
        figure(go, data, layout),
        words + " ".join(_busy_in_words(which, found) for which, found in counted.items()),
        ("timeline", "lane", "stretches", "seconds", "share of the time", "bytes"),
        tuple(_lane_cells(counted)),
        height_px=height_px,
    )


def _busy_in_words(which: str, found: Timeline) -> str:
    total_s = found.steps_s[-1]
    shares = [f"{LABELS[lane]} {found.busy_s(lane) / total_s:.2f}" for lane in LANES if found.lane(lane)]
    return f"Shares of the {which} time: {', '.join(shares)}."


def _lane_cells(counted: dict[str, Timeline]) -> Iterator[tuple[str, ...]]:
    for which, found in counted.items():
        for lane in LANES:
            spans = found.lane(lane)
            if spans:
                busy_s = found.busy_s(lane)
                share = f"{busy_s / found.steps_s[-1]:.3f}"
                moved = sum(span.num_bytes for span in spans)
                yield which, LABELS[lane], str(len(spans)), seconds(busy_s), share, si(moved, "B") if moved else ""
