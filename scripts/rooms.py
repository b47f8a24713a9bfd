#!/usr/bin/env python3
"""Draw which room imports which, for docs/architecture.md. A room is a folder of kvoffload/, or a file there.

scripts/rooms.py            write the picture
scripts/rooms.py --check    fail where the page shows another
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from kvoffload.cli.terminal import script

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kvoffload"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms:begin -->\n", "<!-- rooms:end -->"


def room_of(path: Path) -> str:
    """`kvoffload/errors.py` -> "errors", `kvoffload/kernels/pack.py` -> "kernels"."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def source_files() -> list[Path]:
    """Every source file as it is imported, `kernels/` and `profiler/` through their links."""
    return sorted(path for pattern in ("*.py", "*/*.py", "*/*/*.py") for path in PACKAGE.glob(pattern))


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Full dotted name of everything imported; literal `import_module("x")` and `__import__("x")` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "kvoffload." * bool(node.level) + (f"{node.module}." if node.module else "")
            yield from (prefix + alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def room_imports() -> dict[str, set[str]]:
    """By room, those it imports; inside functions and behind `TYPE_CHECKING` as well."""
    rooms = {room_of(path) for path in source_files()}
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for path in source_files():
        for name in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top == "kvoffload":
                found[room_of(path)].add(target if target in rooms else "__init__")
    return {room: targets - {room} for room, targets in found.items()}


def floors(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Rooms by the longest way down from them, the ground first.

    Raises:
        ValueError: there is a circle.
    """
    left, found = {room: set(targets) for room, targets in edges.items()}, list[list[str]]()
    while left:
        ground = sorted(room for room, targets in left.items() if not targets & left.keys())
        if not ground:
            raise ValueError(f"imports of {', '.join(sorted(left))} go in a circle")
        found.append(ground)
        for room in ground:
            del left[room]
    return found


def direct(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same without arrows that a longer way implies."""

    return {
        room: {target for target in targets if not any(target in _reached(edges, other) for other in targets)}
        for room, targets in edges.items()
    }


def picture(edges: Mapping[str, set[str]]) -> str:
    """A Mermaid chart of the folders: the commands on top, an arrow from whoever imports."""
    folders = {room for room in edges if (PACKAGE / room).is_dir()}
    shown = direct({room: _reached(edges, room) & folders for room in folders})
    lines = [
        f"  {room} --> {' & '.join(sorted(shown[room]))}"
        for floor in reversed(floors(edges))
        for room in floor
        if room in folders and shown[room]
    ]
    return "\n".join(["```mermaid", "flowchart TB", *lines, "```", ""])


def _reached(edges: Mapping[str, set[str]], room: str) -> set[str]:
    """Everything below a room, through files at the root as well."""
    return edges[room].union(*(_reached(edges, target) for target in edges[room]))


def main(
    check: Annotated[bool, typer.Option("--check", help="change nothing, fail where the page shows another")] = False,
    page: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="page with the picture")] = PAGE,
) -> None:
    """The picture of the rooms."""
    before = page.read_text(encoding="utf-8")
    after = re.sub(f"(?s)(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: picture(room_imports()), before)
    if check and after != before:
        typer.echo(f"{page} shows other imports than there are: run scripts/rooms.py", err=True)
        raise typer.Exit(1)
    page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    script(main)()
