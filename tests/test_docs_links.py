"""Every link of every page leads somewhere, and every page is reached from the index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import GUIDES, PAGES, README, ROOT, anchors, links, words
from run_script import run_script

OURS = ("block", "chunk", "slot", "split", "near cache", "shadow")


def broken(page: Path) -> list[str]:
    """Links within the repository that lead nowhere, to no file or to no heading."""
    found = []
    for target in links(page):
        name, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and (path.suffix != ".md" or anchor not in anchors(path))):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert not broken(page)


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(
        "# A `b`, c!\n## A b c\n[1](#a-b-c) [2](#a-b-c-1) [3](#b) [4](c.md) [5](a.md#d) [6](https://e.org)\n"
        '<img src="f.svg"> ![](g.svg) [7][h]\n\n[h]: i.md\n\n```\n[8](j.md)\n```\n'
    )
    assert sorted(broken(page)) == ["#b", "a.md#d", "c.md", "f.svg", "g.svg", "i.md"]


def test_every_page_is_reached_from_the_index_and_the_index_from_the_readme() -> None:
    index = ROOT / "docs" / "README.md"

    def targets(page: Path) -> set[Path]:
        return {(page.parent / link.partition("#")[0]).resolve() for link in links(page) if "://" not in link}

    assert {page for page in GUIDES if page != index} <= targets(index)
    assert ROOT / "docs" / "adr" in targets(index)
    assert index in targets(README)


def test_the_readme_can_be_read_in_a_few_minutes() -> None:
    assert words(README) <= 1600


def test_words_of_ours_are_explained_where_the_readme_first_uses_them() -> None:
    text = " ".join(README.read_text(encoding="utf-8").split())
    prose = re.sub(r"<picture>.*?</picture>", "", text)
    for word in OURS:
        first = re.search(rf"\**\b{word}s?\b\**", prose)
        assert first is not None, word
        assert first.group().startswith("**"), f"{word} is used before it is explained"


def test_the_picture_is_the_one_that_the_script_draws(tmp_path: Path) -> None:
    assert run_script("picture", "--check").exit_code == 0
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    where = ("--root", tmp_path)
    assert run_script("picture", "--check", *where).exit_code == 1
    assert run_script("picture", *where).exit_code == 0
    assert run_script("picture", "--check", *where).exit_code == 0
    for theme in ("light", "dark"):
        path = tmp_path / "docs" / "figures" / f"how-it-works-{theme}.svg"
        assert f"docs/figures/{path.name}" in links(README)
        path.write_text(path.read_text().replace("Link (PCIe)", "Link"))
        assert "run scripts/picture.py" in run_script("picture", "--check", *where).stderr
        assert run_script("picture", *where).exit_code == 0
