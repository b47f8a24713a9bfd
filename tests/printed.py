"""What is printed in paragraphs, each of which may go on in further lines, as tests read it."""

from __future__ import annotations

WIDTH = 80  # of the narrowest terminal


def paragraphs(printed: object) -> list[str]:
    """The paragraphs, each in one line; checks that no line is too wide for a terminal."""
    found: list[str] = []
    for line in str(printed).splitlines():
        assert len(line) < WIDTH
        if line.startswith("  "):
            found[-1] += " " + line.strip()
        else:
            found.append(line)
    return found


def said(printed: object) -> str:
    """All of it in one line."""
    return " ".join(paragraphs(printed))
