"""The commands as tests run them, a model's configuration, and a machine that is never really measured.

Not a test module. Its fixtures `model` and `cache` are those of the test modules that import them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from configs import LLAMA_2_7B
from typer.testing import CliRunner, Result

from kvoffload import cli
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.profiler import profile, stored

RECORDED = Path(__file__).parent / "data" / "profile_emulated_2_threads.json"
DISTURBANCE: dict[str, object] = {}  # laid over the facts of the next measurements


@pytest.fixture(name="model")
def model_fixture(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return path


@pytest.fixture(name="cache")
def cache_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and measurements that take no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def measure(device: object = "auto", link: Any = "auto", **options: object) -> HardwareProfile:
        key = profile.machine_key(profile.resolve_device("cpu", "auto"))
        recorded = HardwareProfile.load(RECORDED)
        facts = recorded.extra | {"other_cpu_load_fraction": 0.0} | options
        recorded = dataclasses.replace(
            recorded, key=key, method=profile.METHOD, extra=facts | {"progress": None} | DISTURBANCE
        )
        return recorded if link == "auto" else profile.with_link(recorded, link)

    monkeypatch.setattr(profile, "measure_hardware", measure)
    monkeypatch.setattr(stored, "measure_hardware", measure)
    return tmp_path / "cache" / "kvoffload"


def run(*arguments: object, given: str | None = None) -> Result:
    """A command with a text on standard input, which is no terminal."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=given)


def run_in_terminal(*arguments: object, columns: int = 80) -> tuple[int, list[str]]:
    """The exit code of a command in a terminal of its own, and the lines it leaves there, without colours."""
    return code_in_terminal("from kvoffload.cli import main; main()", *arguments, columns=columns)


def code_in_terminal(code: str, *arguments: object, columns: int = 80, typed: str = "") -> tuple[int, list[str]]:
    """As `run_in_terminal`, of a piece of Python, for which somebody has typed ahead."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    os.write(ours, typed.encode())
    written = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while part := os.read(ours, 4096):
            written += part
    os.close(ours)
    return process.wait(timeout=60), on_screen(written.decode())


def on_screen(text: str) -> list[str]:
    """What is left on a screen of any size: the cursor moved, text erased, colours left out."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|[\s\S]", text):
        if part == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
        elif part == "\r":
            column = 0
        elif part == "\b":
            column -= 1
        elif part == "\x1b[K":
            lines[row] = lines[row][:column]
        elif part == "\x1b[2K":
            lines[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(up[1])
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
    return lines


def run_well(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def run_badly(*arguments: object, given: str | None = None) -> str:
    """The one line on stderr of a command that ends with our error."""
    result = run(*arguments, given=given)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("kvoffload: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def table_words(text: str) -> Counter[str]:
    """What stands in the tables of an output, except their headers."""
    return Counter(word for line in text.splitlines() if line.startswith("│") for word in line.split() if word != "│")
