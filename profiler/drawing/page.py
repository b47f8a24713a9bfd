"""A page in one file: headings, charts with their tables, and nothing that is fetched from anywhere.

Owns the markup, the way to every part by keyboard, and the promise of no request: a content security policy forbids
them all. Does not own what is told (`sections`), the charts (`chart`) nor how their library travels (`library`); style
and script lie beside this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from kvoffload.profiler.drawing.chart import Chart, plotly_version
from kvoffload.profiler.drawing.legend import legend
from kvoffload.profiler.drawing.library import packed_library

FOLDER = Path(__file__).parent
SAME_NUMBERS = "the tables hold the same numbers"
NO_FIT_WORDS = "does not fit"  # cells with these words have its colour
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


class Table(NamedTuple):
    """Words and numbers in columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # the last cell of a shorter row is as wide as what is left
    marked: int | None = None  # a row that stands out
    notes: tuple[str, ...] = ()  # below it
    style: str = "text"  # "text", or "numbers": to the right, and never broken


class Section(NamedTuple):
    """One part of the page; `name` is its anchor."""

    name: str
    title: str
    paragraphs: tuple[str, ...]
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    note: str = ""  # what is missing, and why
    facts: tuple[tuple[str, str], ...] = ()  # shown last


class Page(NamedTuple):
    """Everything that is shown."""

    title: str
    advice: tuple[str, ...]  # what to do first, then the reasons
    code: str  # to do it with; "" where nothing works
    sections: tuple[Section, ...]
    footer: str


def html(page: Page) -> str:
    """The whole file."""
    charts = [chart for section in page.sections for chart in section.charts]
    figures = json.dumps({chart.name: chart.figure for chart in charts}, allow_nan=False).replace("<", "\\u003c")
    head = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(page.title)}</title>
<style>
{_beside("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
"""
    return "\n".join(
        [
            head,
            *_navigation(page),
            *_header(page),
            '<main id="main" tabindex="-1">',
            *(line for section in page.sections for line in _section(section)),
            "</main>",
            f"<footer><p>{escape(page.footer)} Charts: plotly {escape(plotly_version())} (MIT licence).</p></footer>",
            f'<script type="text/plain" id="library">{packed_library()}</script>',
            f'<script type="application/json" id="figures">{figures}</script>',
            f"<script>\n{_beside('page.js')}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _navigation(page: Page) -> Iterator[str]:
    yield '<nav aria-label="Parts of the report"><ul class="scroll">'
    yield from (f'<li><a href="#{one.name}">{escape(one.title)}</a></li>' for one in page.sections)
    yield "</ul></nav>"


def _header(page: Page) -> Iterator[str]:
    yield f"<header>\n<h1>{escape(page.title)}</h1>"
    yield '<div class="advice">'
    for number, line in enumerate(page.advice):
        yield f"<p>{escape(line)}</p>"
        if number == 0 and page.code:
            yield f"<pre><code>{escape(page.code)}</code></pre>"
    yield f"</div>\n<noscript><p>The charts need JavaScript; {SAME_NUMBERS}.</p></noscript>"
    yield '<p class="note" id="old-browser" hidden>The charts need a browser with DecompressionStream (Chrome 80, '
    yield f"Firefox 113, Safari 16.4 or a later one); {SAME_NUMBERS}.</p>\n</header>"


def _section(section: Section) -> Iterator[str]:
    heading = f"{section.name}-heading"
    yield f'<section id="{section.name}" aria-labelledby="{heading}" tabindex="-1">'
    yield f'<h2 id="{heading}">{escape(section.title)}</h2>'
    yield from _words(section.paragraphs)
    if section.note:
        yield f'<p class="note">{_prose(section.note)}</p>'
    for table in section.tables:
        if table.title != section.title:
            yield f"<h3>{escape(table.title)}</h3>"
        yield from _table(table)
        yield from _words(table.notes)
    if section.charts:
        yield f'<div class="charts of-{len(section.charts)}">'
        for chart in section.charts:
            yield from _chart(chart)
        yield "</div>"
    if section.facts:
        yield "<dl>"
        yield from (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in section.facts)
        yield "</dl>"
    yield "</section>"


def _words(paragraphs: Sequence[str]) -> Iterator[str]:
    if paragraphs:
        yield '<div class="words">'
        yield from (f"<p>{_prose(text)}</p>" for text in paragraphs)
        yield "</div>"


def _chart(chart: Chart) -> Iterator[str]:
    title, name = escape(chart.title), chart.name
    yield f'<figure aria-labelledby="{name}-title">\n<h3 id="{name}-title">{title}</h3>'
    yield from legend(chart.figure)
    yield f'<div class="chart" id="{name}" role="img" aria-labelledby="{name}-title" aria-describedby="{name}-words"'
    yield f' style="height: {chart.height_px}px"></div>'
    yield f'<figcaption id="{name}-words">{escape(chart.alternative)}</figcaption>'
    yield f"<details><summary>Numbers: {title}</summary>"
    yield from _table(Table(chart.title, chart.columns, chart.rows, style="numbers"))
    yield "</details>\n</figure>"


def _table(table: Table) -> Iterator[str]:
    """A table that scrolls by itself where the screen is narrower."""
    title, width = escape(table.title), len(table.columns)
    yield f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {title}"><table class="{table.style}">'
    yield f"<thead><tr>{_cells('th', table.columns, width)}</tr></thead>\n<tbody>"
    mark = ' class="marked"'
    for idx, row in enumerate(table.rows):
        yield f"<tr{mark if idx == table.marked else ''}>{_cells('td', row, width)}</tr>"
    yield "</tbody></table></div>"


def _cells(tag: str, values: Sequence[str], width: int) -> str:
    scope, missing = ' scope="col"' if tag == "th" else "", width - len(values)
    cells = []
    for idx, value in enumerate(values):
        spans = f' colspan="{missing + 1}"' if missing and idx == len(values) - 1 else ""
        style = ' class="no-fit"' if NO_FIT_WORDS in value else ""
        cells.append(f"<{tag}{scope}{spans}{style}>{escape(value)}</{tag}>")
    return "".join(cells)


def _prose(text: str) -> str:
    """Words, with `commands` set as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _beside(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
