"""What is wrong with an option of a script is one line on stderr and exit code 2, before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_script import run_script
from typer.testing import CliRunner

from campaign import rows
from kvoffload.cli.terminal import script
from kvoffload.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("harness --split 7", "--split must be 'auto' or 'transfer' or 'recompute' or a share from 0 to 1, got 7.0"),
        ("harness --link-gb-per-s -1", "--link-gb-per-s must be a number above zero"),
        ("harness --model ./nowhere", "no folder or GGUF file './nowhere'"),
        ("bench_decode --preset opt-6.7b", "choose a cpu- preset"),
        ("bench_decode --profile nowhere.json", "no profile file nowhere.json"),
        ("bench_decode --json nowhere/a.json", "--json: cannot write nowhere/a.json: there is no folder"),
        ("bench_decode --csv .", "cannot add rows to .: Is a directory; choose another file with --csv"),
        ("bench_transfer --preset opt-6.7b", "choose a cpu- preset"),
        ("bench_kernels --device cuda", "--device cpu"),
        ("bench_kernels --quick --json nowhere/a.json", "--json: cannot write nowhere/a.json: there is no folder"),
        ("bench_kernels --quick --csv .", "cannot add rows to .: Is a directory; choose another file with --csv"),
        ("ablation --csv .", "cannot add rows to .: Is a directory"),
        ("bench_campaign --csv .", "cannot add rows to .: Is a directory"),
        ("bench_transfer --csv .", "cannot add rows to .: Is a directory"),
        ("eval_predictions --csv file/a.csv", "cannot add rows to file/a.csv: "),
        ("eval_predictions --csv binary", "binary holds no rows"),
        ("eval_predictions --csv /proc/a.csv", "cannot add rows to /proc/a.csv: "),
        ("sweep_models --types llama --csv .", ". holds no rows of a sweep: "),
        ("sweep_models --types llama --csv binary", "binary holds no rows of a sweep: "),
        ("sweep_models --types llama --csv file/a.csv", "cannot add rows to file/a.csv: "),
        ("sweep_models --docs --csv nowhere.csv", "no rows in nowhere.csv: run scripts/sweep_models.py first"),
        ("report --results .", "no rows in .: "),
        (f"report --results {ROOT}/scripts/results --root .", "there is no docs/performance.md: --root names"),
    ],
)
def test_an_error_of_ours_is_one_line(line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "binary").write_bytes(b"\x89PNG\xff")
    name, *args = line.split()
    done = run_script(name, *args)
    assert (done.exit_code, done.stdout) == (2, ""), done.exception
    assert done.stderr.startswith(f"{name}: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary", "file"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("will_it_help --root nowhere", "nowhere"),
        (f"will_it_help --check --root {ROOT}/README.md", "is a file"),
        ("report --results nowhere", "--results"),
        ("report --root nowhere", "--root"),
        ("bench_campaign --cells cpu,nowhere", "matches 'nowhere'"),
        ("sweep_models --types llama,nowhere", "no text model type nowhere"),
    ],
)
def test_an_option_that_cannot_be_is_an_error_of_usage(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    name, *args = line.split()
    done = run_script(name, *args)
    assert (done.exit_code, done.stdout) == (2, ""), done.exception
    assert done.stderr.startswith("Usage: ")
    assert message in done.stderr


def test_a_mistake_of_ours_in_a_script_is_no_error_of_its_user() -> None:
    def main(kind: str) -> None:
        """Fail."""
        raise {"ours": RuntimeError, "theirs": ConfigError}[kind]("so")

    runner, app = CliRunner(), script(main)
    assert isinstance(runner.invoke(app, ["ours"]).exception, RuntimeError)
    assert runner.invoke(app, ["theirs"]).stderr == "test_scripts: so\n"


def test_checking_leaves_a_file_of_rows_as_it_is_and_makes_the_folder_of_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows.save(path, [rows.skipped("bench", "one", "x", {}, "link", "why")])
    before = path.read_bytes()
    rows.check(path)
    assert path.read_bytes() == before
    rows.check(tmp_path / "new" / "b.csv")
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["a.csv", "new"]
