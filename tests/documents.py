"""The documents as data: their links, anchors and code."""

from __future__ import annotations

import functools
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = [README, *sorted((ROOT / "docs").glob("*.md"))]  # what a reader follows step by step
PAGES = [*GUIDES, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs" / "adr").glob("*.md"))]


class Block(NamedTuple):
    """Code that stands in a page by itself."""

    page: Path
    line: int
    language: str  # "" where none is named
    text: str


@functools.cache
def tokens(page: Path) -> list[Token]:
    """A page as CommonMark with tables reads it."""
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def _inner(page: Path) -> list[Token]:
    return [one for token in tokens(page) for one in token.children or []]


def blocks(page: Path) -> list[Block]:
    """Fenced and indented code."""
    return [
        Block(page, (token.map or [0])[0] + 1, token.info.strip(), token.content)
        for token in tokens(page)
        if token.type in ("fence", "code_block")
    ]


def inline_code(page: Path) -> list[str]:
    """What stands between backticks in the text."""
    return [" ".join(token.content.split()) for token in _inner(page) if token.type == "code_inline"]


class _Sources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src", "srcset") and value]


def links(page: Path) -> list[str]:
    """Targets of links and pictures, those in HTML included."""
    found = [str(token.attrs.get("href") or token.attrs.get("src") or "") for token in _inner(page)]
    html = _Sources()
    for token in [*tokens(page), *_inner(page)]:
        if token.type in ("html_block", "html_inline"):
            html.feed(token.content)
    return [target for target in [*found, *html.found] if target]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    found: set[str] = set()
    parsed = tokens(page)
    for token, text in itertools.pairwise(parsed):
        if token.type == "heading_open":
            words = "".join(one.content for one in text.children or [])
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            numbered = [slug, *(f"{slug}-{n}" for n in range(1, 99))]
            found.add(next(one for one in numbered if one not in found))
    return found


def words(page: Path) -> int:
    """As `wc -w` counts them."""
    return len(page.read_text(encoding="utf-8").split())
