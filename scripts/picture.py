#!/usr/bin/env python3
"""Draw README's picture: host memory, the link and the device, for light and for dark pages.

scripts/picture.py            write docs/figures/how-it-works-light.svg and -dark.svg
scripts/picture.py --check    fail where a file shows another
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from kvoffload.cli.terminal import script

ROOT = Path(__file__).parents[1]
FOLDER = "docs/figures"
WIDTH, HEIGHT = 480, 392  # pixels; text stays readable on a page of 400
TITLE = "Blocks of the KV cache in host memory cross the link chunk by chunk into slots on the device, in every step"
FONT = "-apple-system, BlinkMacSystemFont, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"


class Colours(NamedTuple):
    """Of one theme."""

    text: str
    quiet: str
    line: str
    box: str
    kv: str
    kv_box: str
    activation: str
    activation_box: str


THEMES = {
    "light": Colours("#1f2328", "#59636e", "#818b98", "#f6f8fa", "#0969da", "#ddf4ff", "#bc4c00", "#fff1e5"),
    "dark": Colours("#f0f6fc", "#9198a1", "#6e7681", "#151b23", "#4493f8", "#121d2f", "#f0883e", "#2c1f14"),
}


def picture(colours: Colours) -> str:
    """The whole file."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" font-family="{FONT}" font-size="14">'
    )
    parts = [*_host(colours), *_device(colours), *_link(colours)]
    return "\n".join([head, f"<title>{TITLE}</title>", *parts, "</svg>", ""])


def _host(c: Colours) -> Iterator[str]:
    yield _box(1, 1, 478, 112, c.line, c.box)
    yield _text(16, 24, "Host memory", c.text, bold=True)
    for x, height, line, fill in ((16, 36, c.kv, c.kv_box), (252, 18, c.activation, c.activation_box)):
        yield from (_box(x + 35 * idx, 38, 30, height, line, fill, radius=3) for idx in range(6))
    yield _text(16, 98, "older tokens as K and V", c.kv)
    yield _text(252, 76, "others as activations,", c.activation)
    yield _text(252, 98, "recomputed on arrival", c.activation)


def _link(c: Colours) -> Iterator[str]:
    yield _arrow(150, 113, 211, c.kv)
    yield _arrow(330, 113, 211, c.activation)
    yield _arrow(446, 196, 116, c.line)
    yield _text(240, 152, "Link (PCIe)", c.text, bold=True, anchor="middle")
    yield _text(240, 174, "chunk by chunk", c.quiet, anchor="middle")
    yield _text(75, 152, "in every", c.quiet, anchor="middle")
    yield _text(75, 170, "step", c.quiet, anchor="middle")
    yield _text(390, 152, "new blocks,", c.quiet, anchor="middle")
    yield _text(390, 170, "once", c.quiet, anchor="middle")


def _device(c: Colours) -> Iterator[str]:
    yield _box(1, 196, 478, 195, c.line, c.box)
    yield _text(16, 232, "slots", c.quiet)
    for idx in range(4):
        line, fill = (c.kv, c.kv_box) if idx < 2 else (c.activation, c.activation_box)
        yield _box(112 + 66 * idx, 212, 60, 28, line, fill, radius=3)
    yield _box(16, 266, 150, 32, c.kv, c.kv_box)
    yield _text(91, 287, "newest: stay here", c.kv, anchor="middle")
    yield _box(262, 266, 202, 32, c.activation, c.activation_box)
    yield _text(363, 287, "recompute K and V", c.activation, anchor="middle")
    yield _arrow(91, 298, 322, c.kv)
    yield _arrow(210, 240, 322, c.kv)
    yield _arrow(330, 240, 266, c.activation)
    yield _arrow(363, 298, 322, c.kv)
    yield _box(16, 322, 448, 32, c.line, "none")
    yield _text(240, 343, "attention, to each chunk as it arrives", c.text, anchor="middle")
    yield _text(16, 379, "Device (GPU)", c.text, bold=True)
    yield _text(464, 379, "weights stay here, if they fit", c.quiet, anchor="end")


def _box(x: int, y: int, width: int, height: int, line: str, fill: str, radius: int = 6) -> str:
    size = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}"'
    return f'<rect {size} fill="{fill}" stroke="{line}" stroke-width="1.5"/>'


def _text(x: int, y: int, words: str, colour: str, *, bold: bool = False, anchor: str = "start") -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}"{weight}>{words}</text>'


def _arrow(x: int, start: int, end: int, colour: str) -> str:
    """A vertical one, with its head at `end`."""
    back = end - 8 if end > start else end + 8
    line = f'<path d="M{x} {start}V{back}" stroke="{colour}" stroke-width="2.5"/>'
    return f'{line}<path d="M{x - 6} {back}h12L{x} {end}z" fill="{colour}"/>'


def main(
    check: Annotated[bool, typer.Option("--check", help="change nothing, fail where a file shows another")] = False,
    root: Annotated[Path, typer.Option(exists=True, file_okay=False, help="folder of docs/")] = ROOT,
) -> None:
    """The picture in both themes."""
    for theme, colours in THEMES.items():
        path, drawn = root / FOLDER / f"how-it-works-{theme}.svg", picture(colours)
        if not check:
            path.write_text(drawn, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != drawn:
            typer.echo(f"{path} shows another picture: run scripts/picture.py", err=True)
            raise typer.Exit(1)


if __name__ == "__main__":
    script(main)()
