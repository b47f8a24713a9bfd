"""Where the prompts of `kvoffload generate` come from, and what it does with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import model_fixture as model_fixture
from commands import run, run_badly, run_well
from models import make_model
from tokenizing import CHARACTERS, TEMPLATE, make_tokenizer

from kvoffload.cli.sampling import Sampling, sampling_of

NEW_TOKENS = 7
PROMPTS = ("one", "two and more", "three, which is the longest", "4")


@pytest.fixture(scope="module")
def tiny() -> Any:
    made = make_model("llama", vocab_size=len(CHARACTERS), num_hidden_layers=2)
    made.generation_config.eos_token_id = 2
    return made


@pytest.fixture(autouse=True)
def loads(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvoffload.cli import chat

    monkeypatch.setattr(chat, "load_model", lambda *args, **options: (tiny, make_tokenizer()))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture(name="base")
def base_fixture(model: Path) -> tuple[object, ...]:
    return ("generate", "--model", model, "--max-new-tokens", NEW_TOKENS, "--split", "transfer")


def expected(model: Any, *prompts: str, system: str = "") -> list[str]:
    """What the model says to each, without offloading and one by one."""
    tokenizer, found = make_tokenizer(TEMPLATE), []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(f"{system}<u>{prompt}~<a>")["input_ids"]])
        tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(ids))
        found.append(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


def test_one_prompt_comes_from_five_places(tiny: Any, base: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("two\nlines\n")
    (wanted,) = expected(tiny, "two\nlines")
    for source, given in (
        (("two\nlines",), None),
        (("--prompt", "two\nlines"), None),
        (("--prompt-file", tmp_path / "prompt.txt"), None),
        (("-",), "two\nlines\n"),
        ((), "two\nlines\n"),
    ):
        result = run(*base, *source, "--json", given=given)
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        assert (found["text"], found["tokens_equal"], found["new_tokens"]) == (wanted, None, NEW_TOKENS)
        assert found["stats"]["h2d_bytes"] > 0
        text = run(*base, *source, given=given)
        assert text.stdout.strip() == wanted  # streamed, with the white space it has
        assert "plan: offloaded tokens cross as K/V" in text.stderr


def test_a_system_message_comes_first(tiny: Any, base: tuple[object, ...]) -> None:
    found = json.loads(run_well(*base, "one", "--system", "be brief", "--json"))
    assert [found["text"]] == expected(tiny, "one", system="<s>be brief~")
    assert found["prompt_tokens"] == len("<s>be brief~<u>one~<a>")


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("kind", ["lines", "json"])
def test_many_prompts_are_answered_as_each_by_itself(
    tiny: Any, base: tuple[object, ...], tmp_path: Path, batch: int, kind: str
) -> None:
    path, output = tmp_path / "prompts", tmp_path / "answers.jsonl"
    lines = PROMPTS if kind == "lines" else [json.dumps({"id": idx, "prompt": one}) for idx, one in enumerate(PROMPTS)]
    path.write_text("\n\n".join(lines) + "\n")
    output.write_text("old\n")
    result = run(*base, "--prompts", path, "--batch", batch, "--output", output)
    assert result.exit_code == 0, result.stderr
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [one["text"] for one in found] == expected(tiny, *PROMPTS)
    assert [one["prompt"] for one in found] == list(PROMPTS)
    assert [one["prompt_tokens"] for one in found] == [len(f"<u>{one}~<a>") for one in PROMPTS]
    assert [one.get("id") for one in found] == ([None] * 4 if kind == "lines" else [0, 1, 2, 3])
    batches = {1: "4 batches", 3: "2 batches", 8: "1 batch"}[batch]
    tokens = sum(one["new_tokens"] for one in found)
    assert f"wrote 4 answers to {output}" in result.stderr
    assert f"4 answers in {batches}: {tokens} tokens, " in result.stderr
    assert run_well(*base, "--prompts", path, "--batch", batch, "--output", "-") == output.read_text()


def test_many_answers_are_shown_under_their_prompts_or_as_one_document(
    tiny: Any, base: tuple[object, ...], tmp_path: Path
) -> None:
    path = tmp_path / "prompts"
    path.write_text("one\n4\n")
    wanted = expected(tiny, "one", "4")
    assert run_well(*base, "--prompts", path) == f"1/2 one\n{wanted[0]}\n\n2/2 4\n{wanted[1]}\n\n"
    found = json.loads(run(*base, "--prompts", "-", "--json", given="one\n4\n").stdout)
    assert [one["text"] for one in found["answers"]] == wanted
    assert len(found["stats"]) == 1


def test_compare_says_both_speeds_and_whether_tokens_are_equal(base: tuple[object, ...], tmp_path: Path) -> None:
    result = run(*base, "one", "--compare")
    (line,) = [line for line in result.stderr.splitlines() if "as without offloading" in line]
    assert line.startswith("the same tokens as without offloading; ")
    assert " tokens/s with offloading, " in line
    path = tmp_path / "prompts"
    path.write_text("\n".join(PROMPTS))
    for arguments in (["one"], ["--prompts", path, "--batch", 3], ["one", "--temperature", 1.5]):
        found = json.loads(run_well(*base, *arguments, "--compare", "--json"))
        assert found["tokens_equal"] is True
        assert found["tokens_per_s"] > 0
        assert found["plain_tokens_per_s"] > 0


def test_compare_tells_other_tokens_and_what_does_not_fit(
    tiny: Any, base: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvoffload.cli import answering

    generate = answering._generate

    def other(model: Any, batch: Any, **options: Any) -> torch.Tensor:
        tokens = generate(model, batch, **options)
        if "stopping_criteria" in options:
            tokens[0, -1] += 1
        return tokens

    monkeypatch.setattr(answering, "_generate", other)
    assert "NOT the same tokens as without offloading; " in run(*base, "one", "--compare").stderr
    assert json.loads(run_well(*base, "one", "--compare", "--json"))["tokens_equal"] is False

    def full(model: Any, batch: Any, **options: Any) -> torch.Tensor:
        if "stopping_criteria" in options:
            raise torch.cuda.OutOfMemoryError
        return generate(model, batch, **options)

    monkeypatch.setattr(answering, "_generate", full)
    result = run(*base, "one", "--compare")
    assert result.exit_code == 0
    assert "not compared: it does not fit on the device without offloading" in result.stderr


def test_sampling_is_repeated_by_its_seed_and_greedy_without_options(tiny: Any, base: tuple[object, ...]) -> None:
    def text(*options: object) -> Any:
        return json.loads(run_well(*base, "one", *options, "--json"))

    assert [text("--seed", 5)["text"]] == expected(tiny, "one") == [text("--temperature", 0)["text"]]
    first = text("--temperature", 3, "--top-p", 0.99, "--top-k", 90, "--seed", 1)
    assert first["text"] == text("--temperature", 3, "--top-p", 0.99, "--top-k", 90, "--seed", 1)["text"]
    assert first["text"] != text("--temperature", 3, "--seed", 2)["text"]
    drawn = text("--temperature", 3)
    assert text("--temperature", 3, "--seed", drawn["seed"])["text"] == drawn["text"]
    assert [text("--temperature", 3, "--top-k", 1)["text"]] == expected(tiny, "one")


def test_what_was_not_asked_for_is_off_whatever_the_model_says() -> None:
    assert Sampling().arguments() == Sampling(seed=3).arguments() == {"do_sample": False}
    assert sampling_of(None, 0.5, None, None).arguments() == {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.5,
        "top_k": 0,
    }


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        (["hi", "--prompt", "hi"], None, "PROMPT and --prompt both give prompts: leave out all but one"),
        (["--prompts", "ok", "--prompt-file", "ok"], None, "--prompt-file and --prompts both give prompts"),
        (["--prompt", "hi", "--prompts", "ok"], None, "--prompt and --prompts both give prompts"),
        (["--prompt-file", "empty"], None, "--prompt-file: empty is empty: give it some text to answer"),
        (["--prompts", "empty"], None, "--prompts: empty is empty: write one prompt a line, or JSON lines"),
        (["--prompts", "bad.jsonl"], None, "--prompts: line 3 of bad.jsonl is no JSON (Expecting value, column 12)"),
        (["--prompts", "other.jsonl"], None, '--prompts: line 2 of other.jsonl has no text "prompt": write {"prompt"'),
        (["--prompts", "binary"], None, "--prompts: binary is no text in UTF-8 (byte 2): convert it"),
        (["--prompts", "missing"], None, "--prompts: cannot read missing: No such file or directory"),
        (["--prompt-file", "."], None, "--prompt-file: cannot read .: Is a directory"),
        (["--prompt", " "], None, "--prompt is empty"),
        ([], "\n", "standard input is empty: give it some text to answer"),
        (["hi", "--output", "nowhere/a"], None, "--output: cannot write nowhere/a: there is no folder nowhere"),
        (["hi", "--output", "-", "--json"], None, "--json and --output - both write to standard output"),
        (["hi", "--temperature", "0", "--top-p", "0.5"], None, "--temperature 0 is greedy: leave it out, or leave out"),
        (["hi", "--top-p", "0"], None, "--top-p 0 leaves no token to choose"),
        (["hi", "--top-p", "1.5"], None, "--top-p must be a share from 0 to 1, got 1.5"),
        (["hi", "--temperature", "-1"], None, "--temperature must be a number from 0 to 100, got -1.0"),
        (["hi", "--top-k", "0"], None, "--top-k must be a whole number from 1 to"),
        (["hi", "--batch", "0"], None, "--batch must be a whole number from 1 to"),
        (["hi", "--seed", "-1"], None, "--seed must be a whole number from 0 to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_request_is_one_line_with_the_way_out(
    arguments: list[str], given: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ok").write_text("hi\n")
    Path("empty").write_text("\n")
    Path("binary").write_bytes(b"hi\xff\xfe")
    Path("bad.jsonl").write_text('{"prompt": "hi"}\n\n{"prompt": \n')
    Path("other.jsonl").write_text('{"prompt": "hi"}\n{"text": "hi"}\n')
    assert message in run_badly("generate", *arguments, given=given)


def test_without_a_prompt_at_a_terminal_the_ways_to_give_one_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvoffload.cli.prompts import read_prompts
    from kvoffload.errors import ConfigError

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(ConfigError, match="no prompt: give one, .*--prompt-file FILE, --prompts FILE, or pipe it in"):
        read_prompts(None, None, None, None)
