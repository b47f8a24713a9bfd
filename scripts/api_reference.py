#!/usr/bin/env python3
"""Write the reference of all public names, from their docstrings, with pdoc: `make docs`.

scripts/api_reference.py [--output build/docs]

Functions come first, errors last. What a field of a dataclass means is taken from its docstring, else from the page of
figures, else from the comment behind it.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import tokenize
from pathlib import Path
from typing import Annotated, Any

import pdoc.doc
import pdoc.render
import typer

import kvoffload
from kvoffload.cli.terminal import script
from kvoffload.hf.offloaded_cache import CacheOwner

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures.md"
OF_CACHES = {"offers_segments", *vars(CacheOwner)}  # what caches ask of their session


def reference() -> pdoc.doc.Module:
    """The package as pdoc shows it."""
    for name in kvoffload.__all__:
        getattr(kvoffload, name)  # imported when first used; pdoc looks at what is there
    module = pdoc.doc.Module(kvoffload)
    members: dict[str, Any] = dict(sorted(module.members.items(), key=lambda item: _place(item[1])))
    module.members = members
    for shown in members.values():
        if shown.kind == "class":
            _explain(shown)
    return module


def _explain(shown: Any) -> None:
    """Give every field its meaning, and hide what the class says already or keeps for itself."""
    meanings = meanings_of(shown.obj) if dataclasses.is_dataclass(shown.obj) else {}
    arguments = set(re.findall(r"^        (\w+): ", inspect.getsource(shown.obj), re.MULTILINE))
    has_arguments = "Args:" in (shown.obj.__doc__ or "")
    for name, member in shown.members.items():
        is_said = has_arguments and dataclasses.is_dataclass(shown.obj) and name in arguments
        is_made_elsewhere = name == "__init__" and not has_arguments
        if is_said or is_made_elsewhere or (shown.obj is kvoffload.Session and name in OF_CACHES):
            member.docstring = "@private"
        elif not member.docstring:
            member.docstring = meanings.get(name, "")


def meanings_of(cls: type) -> dict[str, str]:
    """By field: its row in the page of figures, or the comment behind it."""
    section = FIGURES.read_text(encoding="utf-8").partition(f"\n## {cls.__name__}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|$", section, re.MULTILINE)
    return field_comments(cls) | {name: meaning for names, meaning in rows for name in re.findall(r"`(\w+)`", names)}


def _place(shown: Any) -> int:
    if shown.kind == "function":
        return 0
    return 2 if issubclass(shown.obj, kvoffload.KVOffloadError) else 1


def field_comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a class, or above it."""
    found: dict[str, str] = {}
    above, name = "", ""
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
        text = token.string.lstrip("# ")
        if token.type == tokenize.NAME and token.start[1] == 4:
            name = token.string
            if above:
                found[name] = above
            above = ""
        elif token.type == tokenize.COMMENT and token.start[1] == 4:
            above = f"{above} {text}".strip()
        elif token.type == tokenize.COMMENT and name:
            found[name] = text
        elif token.type == tokenize.NEWLINE:
            name = ""
    return found


def main(
    output: Annotated[Path, typer.Option(file_okay=False, help="folder of the page")] = ROOT / "build" / "docs",
) -> None:
    """One page, kvoffload.html."""
    pdoc.render.configure(
        docformat="google",
        include_undocumented=True,
        show_source=False,
        search=False,
        footer_text=f"kvoffload {kvoffload.__version__}",
    )
    module = reference()
    output.mkdir(parents=True, exist_ok=True)
    path = output / "kvoffload.html"
    path.write_text(pdoc.render.html_module(module, {"kvoffload": module}), encoding="utf-8")
    typer.echo(f"wrote {path}")


if __name__ == "__main__":
    script(main)()
