"""What all commands have in common: help, one line for an error, its exit code, and nothing loaded without need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from commands import model_fixture as model_fixture
from commands import run_well
from typer.testing import CliRunner

import kvoffload
import kvoffload.cli as cli
from kvoffload.errors import ProfileError


def test_help_lists_the_commands_and_what_they_are_for() -> None:
    text = run_well("--help")
    for command in cli.COMMANDS:
        assert f" {command} " in text
        assert "--json" in run_well(command, "--help")


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_fits_80_columns_and_breaks_no_word(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    for columns in ("80", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        texts.append(run_well(*command.split(), "--help"))
    narrow, wide = (Counter(re.findall(r"[\w'/.|-]+", text)) for text in texts)
    assert max(map(len, texts[0].splitlines())) <= 80
    assert "…" not in texts[0]
    assert not set(narrow) - set(wide)
    assert "Any" not in wide


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_begins_with_a_sentence_or_two_and_ends_with_an_example(command: str) -> None:
    function, example = cli.COMMANDS[command]
    first = " ".join((function.__doc__ or "").split("\n\n")[0].split())
    assert 1 <= len(re.findall(r"\w[).]*\.( |$)", first)) <= 2
    assert len(first) <= 130
    assert example.startswith(f"kvoffload {command}")
    assert f"Example: {example}" in run_well(command, "--help")  # on one line


def test_commands_of_many_options_have_panels() -> None:
    for command, panels in {
        "generate": ("Prompts and answers", "Choosing tokens", "Offloading", "Machine"),
        "chat": ("Choosing tokens", "Offloading", "Machine"),
        "plan": ("Workload", "Machine", "Offloading", "Cost"),
        "roofline": ("Workload", "Machine", "Bits and places"),
        "report": ("Workload", "Machine", "Offloading"),
    }.items():
        text = run_well(command, "--help")
        for panel in panels:
            assert f"╭─ {panel} ─" in text, (command, panel)


def test_completion_is_offered() -> None:
    assert "--install-completion" in run_well("--help")
    for words, wanted in {
        "kvoffload plan --hardware l4": ["l4-24gb-pcie4", "l40s-48gb-pcie4"],
        "kvoffload hardware a6": ["a6000-48gb-pcie4"],
        "kvoffload chat --kv-dtype int": ["int8", "int4", "int2"],
        "kvoffload cha": ["chat"],
    }.items():
        env = {"_KVOFFLOAD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        found = CliRunner().invoke(cli.app, [], env=env, prog_name="kvoffload")
        assert found.stdout.split() == wanted, (words, found.stderr)


def test_it_says_its_version() -> None:
    assert run_well("--version") == f"kvoffload {kvoffload.__version__}\n"


def test_the_command_line_loads_without_torch() -> None:
    # the package itself is stood in for: what it imports is not the command line's doing
    code = (
        "import sys, types\n"
        "package = types.ModuleType('kvoffload')\n"
        f"package.__path__ = [{str(Path(kvoffload.__file__).parent)!r}]\n"
        "sys.modules['kvoffload'] = package\n"
        "import kvoffload.cli\n"
        "assert not {'torch', 'transformers', 'pulp'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_mistake_is_told_before_anything_large_is_loaded(tmp_path: Path, model: Path) -> None:
    """In a process of its own: what the tests themselves imported does not count."""
    (tmp_path / "smollm").mkdir()
    kvoffload.model_shape(model)  # the facts of a model are learned once, with transformers
    mistakes = {
        "plan --config nowhere": "nowhere",
        "plan --config lama-3.1-8b": "(near: llama-3.1-8b)",
        "plan --config nobody/nothing-like-it": "the hub is switched off (HF_HUB_OFFLINE)",
        f"plan --config {model} --seq 5q": "--seq must be a whole number from 1 to 1,000,000,000, got 5q",
        f"plan --config {model} --hardware ,": "--hardware names no device",
        f"plan --config {model} --hardware a100-40": "near: a100-40gb-pcie4",
        f"plan --config {model} --sweep 1": "sweep",
        f"roofline --config {model} --hardware t4 --batch 0": "--batch",
        "profile --latency-us -5": "--latency-us",
        "generate hi --max-new-tokens 0": "--max-new-tokens must be a whole number from 1 to 1,000,000,000, got 0",
        "generate hi --split 2": "--split",
        "generate hi --device gpu": "--device must be 'cpu', 'cuda' or 'cuda:N', got gpu",
        "generate hi --device-weights-gib 0": "--device-weights-gib must be 'auto' or 'all' or a number of GiB above",
        "generate hi --device-weights-gib most": "got most",
        "custom-generate . --device cuda:": "--device must be",
        "generate hi --model ./smolm": "'./smolm' (near: smollm)",
        "generate hi --model smolm": "no folder 'smolm' here (near: smollm), it is not in the local Hugging Face cache",
        "generate hi --model nobody/nothing-like-it": "switched off (HF_HUB_OFFLINE)",
        "generate hi --model missing.gguf": "'missing.gguf'",
        "generate hi --model smollm": "the folder smollm holds no model: it has no config.json",
        f"generate hi --model {model}/config.json": "name the folder",
        "demo --model ./smolm": "near: smollm",
        "demo --max-new-tokens 1": "--max-new-tokens must be a whole number from 2 to 1,000,000,000, got 1",
    }
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from kvoffload.cli import app\n"
        f"for line, message in {mistakes!r}.items():\n"
        "    result = CliRunner().invoke(app, line.split())\n"
        "    assert result.exit_code == 2 and result.stderr.count('\\n') == 1, (line, result.stderr)\n"
        "    assert message in result.stderr, (line, result.stderr)\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), line\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_errors_of_commands_added_later_follow_the_same_rule() -> None:
    import typer

    app = typer.Typer(cls=cli._Commands, pretty_exceptions_enable=False)

    @app.command("one")
    def one() -> None:
        raise ProfileError("no profile")

    @app.command("two")
    def two() -> None:
        raise RuntimeError("a mistake of ours")

    result = CliRunner().invoke(app, ["one"])
    assert (result.exit_code, result.stderr) == (2, "kvoffload: no profile\n")
    assert isinstance(CliRunner().invoke(app, ["two"]).exception, RuntimeError)
