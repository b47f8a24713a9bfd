"""A chart: what is drawn, what it says in words, and the numbers behind it as a table.

Owns the access to plotly (an optional dependency, imported nowhere else), colours and axes. Does not own what is drawn
(`operation_chart`, `timeline_chart`, `plan_charts`), the colours of text and background (`page.js`, which knows whether
the page is dark) nor the page (`page`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kvoffload.errors import ConfigError
from kvoffload.profiler.drawing.terminal_tables import si

# Okabe and Ito's palette, which colour-blind people can tell apart, a little darker where it is pale.
BLUE, ORANGE, GREEN, PINK, PURPLE, GREY = "#2f81c7", "#d97a06", "#12936b", "#c2548c", "#7b6fd0", "#8a8f98"
TEAL, GOLD, BROWN = "#139aa8", "#b08900", "#8c5a3c"
NO_FIT = "#d4002a"  # of nothing else: what does not fit
# tens of a logarithmic axis over limits so far apart at most, and where it has ticks besides
TICKS = ((10, (1, 1.5, 2, 3, 4, 5, 7)), (150, (1, 2, 5)), (math.inf, (1,)))
NARROWEST_TICKS = 1.2  # ticks nearer to the workload's than that are left out


class Chart(NamedTuple):
    """One chart and everything that stands in for it."""

    name: str  # also the anchor
    title: str
    figure: dict[str, Any]  # data and layout, as Plotly takes them
    alternative: str  # what it shows, in a sentence or two
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    height_px: int = 420


def require_plotly() -> Any:
    """Plotly's graph objects.

    Raises:
        ConfigError: it is not installed; says how to.
    """
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise ConfigError(
            "a report is drawn with plotly, which is not installed: pip install 'kvoffload[report]' (or plotly); "
            "`kvoffload plan` and `kvoffload roofline` show the same numbers without it"
        ) from error
    return plotly.graph_objects


def plotly_javascript() -> str:
    """The library that draws the charts, as it stands in the page."""
    require_plotly()
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def plotly_version() -> str:
    """Of the Python package."""
    require_plotly()
    import plotly

    return str(plotly.__version__)


def figure(go: Any, data: list[Any], layout: dict[str, Any]) -> dict[str, Any]:
    """Checked by plotly, as plain data."""
    figure = go.Figure(data=data, layout={"template": go.layout.Template(), **layout}).to_plotly_json()
    return {"data": figure["data"], "layout": figure["layout"]}


def layout_of(x: dict[str, Any], y: dict[str, Any], own: float | None = None) -> dict[str, Any]:
    """Axes that make room for their labels; the tick at `own` is shown where others have to make room."""
    shared = {"automargin": True}
    return {
        "xaxis": shared | x,
        "yaxis": shared | y,
        "margin": {"l": 10, "r": 16, "t": 10, "b": 10},
        "showlegend": False,  # it is a list of the page (`legend`)
        "hovermode": "closest",
        "meta": {"own": own},
    }


def log_axis(title: str, values: Iterable[float | None], beyond: float = 1.25) -> dict[str, Any]:
    """A logarithmic axis over some values, `beyond` times as far at both ends; the shorter, the more ticks."""
    known = [value for value in values if value]
    low, high = min(known) / beyond, max(known) * beyond
    steps = next(steps for most, steps in TICKS if high / low < most)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    at = [step * 10.0**exponent for exponent in exponents for step in steps if low <= step * 10.0**exponent <= high]
    return {
        "type": "log",
        "title": {"text": title},
        "range": [math.log10(low), math.log10(high)],
        "tickmode": "array",
        "tickvals": at,
        "ticktext": [si(value).replace(" ", "") for value in at],
    }


def ticks(sizes: Sequence[int], own: int) -> dict[str, Any]:
    """Ticks of `log_axis` at the sizes themselves, in few letters; none so near to `own` that they would touch."""
    shown = [size for size in sizes if size == own or max(size, own) / min(size, own) >= NARROWEST_TICKS]
    texts = [str(size) if size < 10_000 else si(size).replace(" ", "") for size in shown]
    return {"tickvals": shown, "ticktext": texts, "tickangle": 0}


def end_of_axis(sizes: Sequence[int], most: int | None) -> dict[str, Any]:
    """A logarithmic axis over sizes that ends at the largest the model takes, or at a larger one that is shown."""
    if most is None or max(sizes) < most / 1.25:
        return {}
    return {"range": [math.log10(min(sizes) / 1.25), math.log10(max(most, *sizes))]}


def time_unit(longest_s: float) -> tuple[float, str]:
    """A factor and the unit that makes the longest time at least 1."""
    return next(((factor, unit) for factor, unit in ((1.0, "s"), (1e3, "ms")) if longest_s * factor >= 1), (1e6, "us"))
