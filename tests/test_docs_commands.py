"""Commands in the documents: each parses, those that answer at once run, and targets, scripts and extras exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from documents import GUIDES, ROOT, blocks, inline_code
from typer.testing import CliRunner

from kvoffload.cli import app

QUICK = ("plan", "roofline", "hardware", "env", "custom-generate")  # answer in a second or two
COMMANDS: Any = typer.main.get_command(app)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def lines(page: Path) -> Iterator[str]:
    """Lines of shell in code that stands by itself; a comment behind one is not part of it."""
    for block in blocks(page):
        if block.language != "python":
            yield from (line.strip() for line in block.text.splitlines())


ALONE = sorted({line for page in GUIDES for line in lines(page) if line.startswith("kvoffload ")})
IN_TEXT = sorted({code for page in GUIDES for code in inline_code(page) if re.match(r"kvoffload [a-z-]", code)})
EVERYTHING = [*ALONE, *IN_TEXT, *(line for page in GUIDES for line in [*lines(page), *inline_code(page)])]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with what the names in capitals stand for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("the capital of France is\n")
    (tmp_path / "DIR").mkdir()
    (tmp_path / "DIR" / "config.json").write_bytes((ROOT / "tests/data/configs/llama-3.1-8b.json").read_bytes())
    return tmp_path


@pytest.mark.parametrize("line", ALONE)
def test_a_command_parses_and_runs_if_it_is_quick(line: str, place: Path) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = COMMANDS.commands.get(name)
    assert command is not None, f"there is no command {name}"
    with COMMANDS.context_class(COMMANDS) as parent:
        command.make_context(name, list(arguments), parent=parent)
    if name in QUICK:
        done = CliRunner().invoke(app, [name, *arguments])
        assert done.exit_code == 0, done.output
        assert done.stdout.strip()


@pytest.mark.parametrize("code", IN_TEXT)
def test_a_command_in_the_text_exists_with_its_options(code: str) -> None:
    _, name, *rest = code.split()
    if name.startswith("-"):
        name, rest, command = "", [name], COMMANDS
    else:
        command = COMMANDS.commands.get(name)
    assert command is not None, f"there is no command {name}"
    known = {option for param in command.params for option in param.opts} | {"--help"}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known


def test_targets_of_make_exist() -> None:
    named = set()
    for line in EVERYTHING:
        if re.match(r"make( |$)", line):
            words = shlex.split(line, comments=True)[1:]
            named |= {word for word in words if "=" not in word and not word.startswith("-")}
    assert {"demo", "test", "check", "docs", "bench"} <= named <= TARGETS


def test_scripts_exist_and_know_the_options_that_are_named() -> None:
    named = [line for line in EVERYTHING if line.startswith("scripts/") and not line.endswith("/")]
    assert len(named) > 20
    for line in named:
        script, *options = shlex.split(line, comments=True)
        path = ROOT / script
        assert path.exists() or list(ROOT.glob(script)), line
        text = "".join(one.read_text() for one in ROOT.glob(f"{script.partition('.')[0]}*") if one.is_file())
        for option in options:
            if option.startswith("--"):
                assert option in text or f"{option.strip('-').replace('-', '_')}:" in text or option == "--help", line


def test_extras_exist() -> None:
    named = {name for line in EVERYTHING for name in re.findall(r"pip install '\.\[(\w+)\]'", line)}
    known = re.findall(r'"(\w+)": ', (ROOT / "setup.py").read_text().partition("extras_require=")[2])
    assert {"report", "nvml"} <= named <= set(known)
