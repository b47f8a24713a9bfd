"""`kvoffload generate`, `demo` and `custom-generate`, up to where a model would be loaded or answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DISTURBANCE, RECORDED, run, run_badly, run_well
from commands import cache_fixture as cache_fixture
from commands import model_fixture as model_fixture
from configs import LLAMA_2_7B

from kvoffload.errors import ConfigError


def test_generate_says_what_it_loads_before_that_takes_its_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvoffload.cli import chat

    def load(*args: object, **options: object) -> None:
        raise ConfigError("not today")

    monkeypatch.setattr(chat, "load_model", load)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run("generate", "hi", "--model", model)
    assert result.stderr.splitlines() == [f"loading {model} on cpu", "kvoffload: not today"]


def test_a_device_that_is_not_there_is_told_before_anything_is_loaded(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "device='cuda': PyTorch sees no CUDA device" in run_badly(
        "generate", "hi", "--model", model, "--device=cuda"
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "sees 2 CUDA devices here" in run_badly("generate", "hi", "--model", model, "--device", "cuda:2")


@pytest.mark.parametrize("command", ["generate", "custom-generate"])
def test_help_shows_the_options_for_weights_within_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run_well(command, "--help").splitlines()
    assert max(map(len, lines)) <= 80
    for option in ("--device", "--device-weights-gib", "--device-gib"):
        assert sum(f" {option} " in line for line in lines) == 1


@pytest.mark.parametrize("kind", ["llama", "opt"])  # for which transformers fails, and makes an empty tokenizer
def test_a_folder_without_a_tokenizer_is_told_as_such(kind: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (model / "config.json").write_text(json.dumps(LLAMA_2_7B | {"model_type": kind}))
    (model / "model.safetensors").write_text("")
    result = run("generate", "hi", "--model", model)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[1].startswith(f"kvoffload: the folder {model} has no tokenizer files: ")
    (model / "tokenizer.json").write_text("damaged")
    assert "cannot load" in run("generate", "hi", "--model", model).stderr


def test_the_demo_measures_for_this_run_and_gives_no_advice_that_cannot_help(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kvoffload.cli import chat

    def answer(*args: object, **options: object) -> None:
        raise ConfigError("not today")

    monkeypatch.setattr(chat, "load_model", lambda *args: (None, None))
    monkeypatch.setattr(chat, "answer", answer)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(DISTURBANCE, "other_cpu_load_fraction", 0.62)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert run("demo", "--model", model).exit_code == 2
    finally:
        torch.set_num_threads(threads)
    assert caplog.messages == [
        "measuring this machine with 1 thread for this run, about 10 s",
        "not stored, since other work kept 0.62 of the CPUs busy (at most 0.25 may be)",
    ]


def test_custom_generate_writes_the_options_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run_well("custom-generate", tmp_path, "--split", "0.5", "--device-gib", "min", "--link-gb-per-s", "2")
    path = tmp_path / "custom_generate" / "generate.py"
    assert f"wrote {path}" in out
    assert f"custom_generate={str(tmp_path)!r}, trust_remote_code=True" in out
    written: dict[str, Any] = {}
    exec(path.read_text(), written)
    assert written["OPTIONS"] == {"split": 0.5, "device_gib": "min", "link": {"h2d_gb_per_s": 2.0}}
    found = json.loads(run_well("custom-generate", tmp_path, "--hardware", "a100-40gb-pcie4", "--force", "--json"))
    assert found == {"path": str(path), "options": {"profile": "a100-40gb-pcie4"}}
    monkeypatch.chdir(RECORDED.parent)  # a call may come from another folder
    found = json.loads(run_well("custom-generate", tmp_path, "--hardware", RECORDED.name, "--force", "--json"))
    assert found["options"] == {"profile": str(RECORDED)}


def test_custom_generate_writes_where_weights_are(tmp_path: Path) -> None:
    found = json.loads(
        run_well("custom-generate", tmp_path, "--device", "cuda:1", "--device-weights-gib", "all", "--json")
    )
    assert found["options"] == {"device": "cuda:1", "device_weights_gib": "all"}
    again = ("custom-generate", tmp_path, "--device-weights-gib", "7.5", "--force", "--json")
    assert json.loads(run_well(*again))["options"] == {"device_weights_gib": 7.5}


def test_custom_generate_overwrites_what_a_user_edited_only_by_force(tmp_path: Path) -> None:
    arguments = ["custom-generate", tmp_path, "--split", "0.5"]
    run_well(*arguments)
    path = tmp_path / "custom_generate" / "generate.py"
    written = path.read_text()
    run_well(*arguments)
    assert f"{path} has other options or was edited" in run_badly("custom-generate", tmp_path, "--split", "0.25")
    assert path.read_text() == written
    path.write_text(written.replace("0.5", "0.75"))
    assert "write it anew with --force" in run_badly(*arguments)
    assert "0.75" in path.read_text()
    run_well(*arguments, "--force")
    assert path.read_text() == written


def test_custom_generate_says_which_option_is_wrong(tmp_path: Path) -> None:
    assert "--split must be" in run_badly("custom-generate", tmp_path, "--split", 7)
    assert "a100-40gb-pcie4" in run_badly("custom-generate", tmp_path, "--hardware", "a100-40gb-pci4")
    assert not list(tmp_path.iterdir())
