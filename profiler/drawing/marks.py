"""What a chart marks: the user's own workload, and what does not fit.

Owns their colours, symbols and names, which are the same in every chart. Does not own where they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvoffload.profiler.drawing.chart import GREY, NO_FIT, require_plotly

WORKLOAD = "your workload"


def workload_line(at: float, low: float, high: float, name: str = WORKLOAD) -> Any:
    """An upright line at the workload's own size.

    Args:
        at: where, in units of the horizontal axis.
        low: the lower end of the upright axis.
        high: its upper end.
        name: in the legend.
    """
    return require_plotly().Scatter(
        name=name,
        mode="lines",
        x=[at, at],
        y=[low, high],
        line={"color": GREY, "dash": "solid", "width": 6},
        opacity=0.45,
        hoverinfo="skip",
    )


def workload_star(x: float, y: float, colour: str, name: str, hover: str) -> Any:
    """A star where the workload itself stands."""
    return require_plotly().Scatter(
        name=name,
        mode="markers",
        x=[x],
        y=[y],
        marker={"color": colour, "symbol": "star", "size": 18, "line": {"width": 1.5, "color": "#ffffff"}},
        hovertemplate=f"{hover}<extra></extra>",
        cliponaxis=False,
    )


def no_fit(x: Sequence[float], y: Sequence[float], name: str, why: Sequence[str], symbol: str = "x-thin") -> Any:
    """Crosses where something does not fit, which say why."""
    return require_plotly().Scatter(
        name=name,
        mode="markers",
        x=list(x),
        y=list(y),
        text=list(why),
        marker={"color": NO_FIT, "symbol": symbol, "size": 11, "line": {"width": 3, "color": NO_FIT}},
        hovertemplate="%{text}<extra></extra>",
        cliponaxis=False,
    )


def no_fit_line(sizes: Sequence[int], y: float) -> Any:
    """A line along whole numbers that do not fit, in as many pieces as they are.

    Args:
        sizes: the numbers, ascending.
        y: at what height.
    """
    x: list[float | None] = []
    for size in sizes:
        if x and x[-1] == size - 0.5:
            x[-1] = size + 0.5
        else:
            x += [*([None] * bool(x)), size - 0.5, size + 0.5]
    return require_plotly().Scatter(
        name="does not fit",
        mode="lines",
        x=x,
        y=[None if value is None else y for value in x],
        line={"color": NO_FIT, "width": 7},
        hovertemplate="does not fit: more memory than there is<extra></extra>",
        cliponaxis=False,
    )
