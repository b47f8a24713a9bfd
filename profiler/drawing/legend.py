"""The legend of a chart as a list of the page, whose entries flow as words do: two in a line where a screen is narrow.

Owns how a symbol of a chart looks in small. Does not own colours and symbols (`chart` and its users).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import Any

WIDTH_PX, HEIGHT_PX, RADIUS_PX = 28, 16, 6
DASHES = {"dot": "2 3", "dash": "6 4", "longdash": "9 4", "dashdot": "6 3 2 3", "longdashdot": "9 3 2 3"}
SHAPES = {  # points of a polygon, how much nearer to the centre every second of them is, and where the first points to
    "square": (4, 1.0, 45.0),
    "diamond": (4, 1.0, 0.0),
    "triangle-up": (3, 1.0, 0.0),
    "hexagon": (6, 1.0, 0.0),
    "star": (10, 0.4, 0.0),
    "star-diamond": (8, 0.45, 0.0),
}


def legend(figure: dict[str, Any]) -> Iterator[str]:
    """An entry for each trace of a figure that is to have one; nothing where none is."""
    traces = [trace for trace in figure["data"] if trace.get("showlegend", True)]
    if traces:
        yield '<ul class="legend">'
        yield from (f"<li>{_symbol(trace)}{escape(trace['name'])}</li>" for trace in traces)
        yield "</ul>"


def _symbol(trace: dict[str, Any]) -> str:
    mode, middle = trace["mode"], HEIGHT_PX / 2
    drawn = ""
    if "lines" in mode:
        line = trace["line"]
        dash = DASHES.get(line.get("dash", ""), "")
        drawn += (
            f'<line x1="0" x2="{WIDTH_PX}" y1="{middle}" y2="{middle}" stroke="{line["color"]}" '
            f'stroke-width="{line["width"]}" stroke-dasharray="{dash}" opacity="{trace.get("opacity", 1)}"/>'
        )
    if "markers" in mode:
        marker = trace.get("marker", {})
        colour = marker.get("color") or trace["line"]["color"]
        drawn += _marker(marker.get("symbol", "circle"), colour)
    return f'<svg width="{WIDTH_PX}" height="{HEIGHT_PX}" aria-hidden="true">{drawn}</svg>'


def _marker(symbol: str, colour: str) -> str:
    x, y, r = WIDTH_PX / 2, HEIGHT_PX / 2, RADIUS_PX
    if symbol in SHAPES:
        number, inner, turn = SHAPES[symbol]
        corners = []
        for idx in range(number):
            angle, far = math.radians(360 * idx / number + turn), r * (inner if idx % 2 else 1.0)
            corners.append(f"{x + far * math.sin(angle):.1f},{y - far * math.cos(angle):.1f}")
        return f'<polygon points="{" ".join(corners)}" fill="{colour}"/>'
    if symbol in ("x", "x-thin"):
        width = 4 if symbol == "x" else 2.5
        path = f"M{x - 5} {y - 5}L{x + 5} {y + 5}M{x - 5} {y + 5}L{x + 5} {y - 5}"
        return f'<path d="{path}" stroke="{colour}" stroke-width="{width}"/>'
    if symbol == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{r - 1}" fill="{colour}"/>'
    return ""  # a line alone
