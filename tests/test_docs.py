"""The documents keep what they promise: options, modules and links exist, and one page stays one page."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from test_layering import ALLOWED

from kvoffload.config import OffloadConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_readme_lists_every_option_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    options = [(field.name, repr(field.default).replace("'", '"')) for field in dataclasses.fields(OffloadConfig)]
    assert rows == options


def test_the_architecture_page_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [name for name in ALLOWED if name != "__init__" and not re.search(rf"`{name}/?`", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]


def test_pages_stay_short() -> None:
    limits = dict.fromkeys((ROOT / "docs" / "adr").glob("*.md"), 40) | {ROOT / "docs" / "architecture.md": 60}
    assert not {
        page.name: count
        for page, limit in limits.items()
        if (count := len(page.read_text(encoding="utf-8").splitlines())) >= limit
    }
