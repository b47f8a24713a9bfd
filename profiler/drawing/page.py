"""A page in one file: headings, charts with their tables, and nothing that is fetched from anywhere.

Owns the markup, the way to every part by keyboard, and the promise of no request: a content security policy forbids
them all. Does not own what is told (`sections`) nor the charts (`chart`); style and script lie beside this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from kvoffload.profiler.drawing.chart import Chart, plotly_javascript, plotly_version

FOLDER = Path(__file__).parent
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


class Table(NamedTuple):
    """Words and numbers in columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Section(NamedTuple):
    """One part of the page; `name` is its anchor."""

    name: str
    title: str
    paragraphs: tuple[str, ...]
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    note: str = ""  # what is missing, and why


class Page(NamedTuple):
    """Everything that is shown."""

    title: str
    advice: tuple[str, ...]  # what to do first, then the reasons
    facts: tuple[tuple[str, str], ...]
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
            *_header(page),
            '<main id="main" tabindex="-1">',
            *(line for section in page.sections for line in _section(section)),
            "</main>",
            f"<footer><p>{escape(page.footer)} Charts: plotly {escape(plotly_version())} (MIT licence).</p></footer>",
            f"<script>{plotly_javascript()}</script>",
            f'<script type="application/json" id="figures">{figures}</script>',
            f"<script>\n{_beside('page.js')}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _header(page: Page) -> Iterator[str]:
    yield f"<header>\n<h1>{escape(page.title)}</h1>"
    yield '<div class="advice">'
    yield from (f"<p>{escape(line)}</p>" for line in page.advice)
    yield "</div>\n<dl>"
    yield from (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in page.facts)
    yield "</dl>\n<noscript><p>The charts need JavaScript; the tables hold the same numbers.</p></noscript>\n</header>"
    yield '<nav aria-label="Parts of the report"><ul>'
    yield from (f'<li><a href="#{one.name}">{escape(one.title)}</a></li>' for one in page.sections)
    yield "</ul></nav>"


def _section(section: Section) -> Iterator[str]:
    heading = f"{section.name}-heading"
    yield f'<section id="{section.name}" aria-labelledby="{heading}" tabindex="-1">'
    yield f'<h2 id="{heading}">{escape(section.title)}</h2>'
    yield from (f"<p>{_prose(text)}</p>" for text in section.paragraphs)
    if section.note:
        yield f'<p class="note">{_prose(section.note)}</p>'
    for chart in section.charts:
        yield from _chart(chart)
    for table in section.tables:
        yield f"<h3>{escape(table.title)}</h3>"
        yield from _table(table, style="text")
    yield "</section>"


def _chart(chart: Chart) -> Iterator[str]:
    title, name = escape(chart.title), chart.name
    yield f'<figure aria-labelledby="{name}-title">\n<h3 id="{name}-title">{title}</h3>'
    yield f'<div class="chart" id="{name}" role="img" aria-labelledby="{name}-title" aria-describedby="{name}-words"'
    yield f' data-height="{chart.height_px}" style="height: {chart.height_px}px"></div>'
    yield f'<figcaption id="{name}-words">{escape(chart.alternative)}</figcaption>'
    yield f"<details><summary>Numbers: {title}</summary>"
    yield from _table(Table(chart.title, chart.columns, chart.rows), style="numbers")
    yield "</details>\n</figure>"


def _table(table: Table, style: str) -> Iterator[str]:
    """A table that scrolls by itself where the screen is narrower."""
    title = escape(table.title)
    yield f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {title}"><table class="{style}">'
    yield f"<thead><tr>{_cells('th', table.columns)}</tr></thead>\n<tbody>"
    yield from (f"<tr>{_cells('td', row)}</tr>" for row in table.rows)
    yield "</tbody></table></div>"


def _cells(tag: str, values: Sequence[str]) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    return "".join(f"<{tag}{scope}>{escape(value)}</{tag}>" for value in values)


def _prose(text: str) -> str:
    """Words, with `commands` set as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _beside(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
