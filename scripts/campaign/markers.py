"""A section between two markers of a file, written by a script: put there, or compared with what stands there."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(file: Path, name: str, section: str, *, check: bool, command: str) -> None:
    """Put a section between its markers, or fail if another one stands there.

    Args:
        file: which has the markers `<!-- name:begin -->` and `<!-- name:end -->`.
        name: of the section.
        section: Markdown.
        check: change nothing.
        command: that writes it, for the message.
    """
    text = file.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, ending, after = rest.partition(end)
    if not found or not ending:
        sys.exit(f"{file} has no markers {begin} and {end}")
    wanted = f"{before}{begin}\n{section}\n{end}{after}"
    if not check:
        file.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        sys.exit(f"{file} differs from what plan predicts now: run {command}")
