"""What moves on a terminal while something takes its time, and that it is nowhere else."""

from __future__ import annotations

import pytest
from commands import code_in_terminal

from kvoffload.cli import terminal, waits

LONG = "first, of which there is much to be said, more than fits on a single line of this terminal"
STEPS = f"""
import time
from kvoffload.cli import waits
waits.LEAST_S = 0.2
with waits.steps() as tell:
    tell({LONG!r})
    time.sleep(0.3)
    tell("second")
    tell("  a result of it")
    tell("third")
    tell("last")
print("done")
"""
WAITING = """
import time
from kvoffload.cli import waits
with waits.waiting("in hand"):
    time.sleep(0.3)
with waits.progress("measuring") as tell:
    tell("copies", 0.5)
    time.sleep(0.3)
print("done")
"""
WORDS = """
import logging
from kvoffload.cli.stream import tell_for_now
from kvoffload.cli.terminal import LogLines, print_text
logging.basicConfig(format="%(message)s", handlers=[LogLines()])
tell_for_now("reading a prompt that is as long as it is")
logging.getLogger("x").warning("a message " * 12)
print_text("one two-three " * 12 + "x" * 90, err=True, style="dim")
"""


def test_steps_stay_with_their_seconds_and_fit_the_terminal() -> None:
    code, lines = code_in_terminal(STEPS)
    assert code == 0
    assert max(map(len, lines)) <= 80
    text = [line.rstrip() for line in lines if line.strip()]
    assert " ".join(text[:2]).startswith(f"{LONG} (")
    assert text[2:] == ["second", "  a result of it", "third", "done"]


def test_a_wait_leaves_nothing_behind() -> None:
    code, lines = code_in_terminal(WAITING)
    assert (code, "".join(lines).split()) == (0, ["done"])


def test_messages_are_whole_words_over_what_was_said_for_now() -> None:
    code, lines = code_in_terminal(WORDS)
    assert code == 0
    text = [line.rstrip() for line in lines if line.strip()]
    assert text[:2] == [("a message " * 8).strip(), ("a message " * 4).strip()]
    assert all(len(line) <= 80 or set(line) == {"x"} for line in text)
    assert {word for line in text for word in line.split()} == {"a", "message", "one", "two-three", "x" * 90}


def test_where_there_is_no_terminal_only_lines_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with waits.waiting("in hand"), waits.progress("measuring") as tell:
        assert tell is None
    with waits.waiting("loading", otherwise=True):
        pass
    with waits.steps() as step:
        step("first")
        step("  a result")
    assert capsys.readouterr() == ("", "loading\nfirst\n  a result\n")


@pytest.mark.parametrize(("columns", "longest"), [("40", 39), ("", 139)])
def test_text_is_wrapped_at_columns_and_else_left_as_it_is(
    columns: str, longest: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    terminal.print_text(" ".join(["a word"] * 20) + "\nnext", err=True)
    text = capsys.readouterr().err
    assert text.endswith("\nnext\n")
    assert max(map(len, text.splitlines())) == longest
    assert text.split() == ["a", "word"] * 20 + ["next"]
