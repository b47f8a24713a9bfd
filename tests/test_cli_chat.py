"""`kvoffload chat`: turns in one cache, and what a user does to them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import code_in_terminal, on_screen, run
from commands import model_fixture as model_fixture
from models import make_model
from tokenizing import CHARACTERS, TEMPLATE, TRIMMING, make_tokenizer

import kvoffload
from kvoffload.cli.conversation import Conversation
from kvoffload.cli.sampling import Sampling
from kvoffload.cli.stream import Lines, Stop, stopped_by_interrupt
from kvoffload.errors import ConfigError

SAID = ("hello", "and now?", "once more, please")
NEW_TOKENS = 9
Forwards = list[int]  # tokens of each


@pytest.fixture(scope="module")
def tiny() -> Any:
    made = make_model("llama", vocab_size=len(CHARACTERS), num_hidden_layers=2)
    made.generation_config.eos_token_id = 2
    return made


@pytest.fixture(name="forwards")
def forwards_fixture(tiny: Any) -> Iterator[Forwards]:
    """How many tokens went through the model in each forward."""
    found: Forwards = []
    hook = tiny.get_input_embeddings().register_forward_pre_hook(lambda module, args: found.append(args[0].shape[1]))
    yield found
    hook.remove()


def plain(model: Any, ids: list[int]) -> list[int]:
    """What the model goes on with, without a session or an earlier turn."""
    given = torch.tensor([ids])
    tokens = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    found: list[int] = tokens[0, len(ids) :].tolist()
    return found


def talk_with(session: Any, template: str | None = TEMPLATE, **options: Any) -> Conversation:
    return Conversation(session, make_tokenizer(template), max_new_tokens=NEW_TOKENS, **options)


def expected_turns(model: Any, template: str, said: tuple[str, ...]) -> list[str]:
    tokenizer, messages, answers = make_tokenizer(template), [], []
    for text in said:
        messages.append({"role": "user", "content": text})
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        new = plain(model, tokenizer(whole, add_special_tokens=False)["input_ids"])
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
def test_no_token_goes_through_the_model_twice(tiny: Any, forwards: Forwards, split: Any) -> None:
    expected = expected_turns(tiny, TEMPLATE, SAID)
    forwards.clear()
    with kvoffload.offload(tiny, kvoffload.OffloadConfig(split=split, block_tokens=4, chunk_blocks=2)) as session:
        talk = talk_with(session)
        turns = [talk.say(text) for text in SAID]
        assert [one.text for one in turns] == [text.strip() for text in expected]
        assert sum(forwards) == talk.num_tokens - 1 == turns[-1].cached_tokens
        assert turns[1].prefilled_tokens < turns[0].cached_tokens  # not the whole conversation again
        assert sum(one.prefilled_tokens + one.new_tokens for one in turns) == talk.num_tokens + len(SAID) - 1


def test_what_was_generated_is_not_split_into_tokens_again(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with kvoffload.offload(tiny) as session:
        talk = talk_with(session)
        encoded: list[str] = []
        encode = talk._encoded
        monkeypatch.setattr(talk, "_encoded", lambda text: encoded.append(text) or encode(text))
        first, second = talk.say("hello"), talk.say("and now?")
        assert encoded[0] == "<u>hello~<a>"
        assert encoded[1].endswith("<u>and now?~<a>")
        assert len(encoded[1]) <= len("~<u>and now?~<a>")
        assert second.prefilled_tokens <= len(encoded[1]) + 1
        assert first.text


def test_a_template_that_changes_what_was_said_is_followed(tiny: Any, forwards: Forwards) -> None:
    expected = expected_turns(tiny, TRIMMING, SAID)
    forwards.clear()
    with kvoffload.offload(tiny, kvoffload.OffloadConfig(split="transfer", block_tokens=4)) as session:
        talk = talk_with(session, TRIMMING)
        turns = [talk.say(text) for text in SAID]
    assert [one.text for one in turns] == [text.strip() for text in expected]
    again = sum(one.prefilled_tokens for one in turns)
    assert again < sum(len(make_tokenizer()(str(text))["input_ids"]) for text in SAID) * 3  # what is common stays


def test_where_a_cache_cannot_be_cut_it_begins_anew(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvoffload.hf.offloaded_cache import OffloadedHFCache

    expected = expected_turns(tiny, TRIMMING, SAID)
    monkeypatch.setattr(OffloadedHFCache, "why_not_croppable", lambda cache: "a recurrent state")
    with kvoffload.offload(tiny, kvoffload.OffloadConfig(split="transfer", block_tokens=4)) as session:
        talk = talk_with(session, TRIMMING)
        turns = [talk.say(text) for text in SAID]
        assert [one.text for one in turns] == [text.strip() for text in expected]
        assert turns[-1].prefilled_tokens + turns[-1].new_tokens == talk.num_tokens


def test_without_a_template_text_is_continued(tiny: Any, forwards: Forwards) -> None:
    tokenizer = make_tokenizer(None)
    ids: list[int] = []
    for text in SAID:
        ids = ids[:-1] if ids and ids[-1] == 2 else ids
        ids = ids + tokenizer(("\n" if ids else "so\n") + text)["input_ids"]
        ids = ids + plain(tiny, ids)
    forwards.clear()
    with kvoffload.offload(tiny, kvoffload.OffloadConfig(split="transfer", block_tokens=4)) as session:
        talk = talk_with(session, None, system="so")
        turns = [talk.say(text) for text in SAID]
        assert talk._ids == ids
        assert sum(forwards) == turns[-1].cached_tokens


def test_a_stopped_answer_is_part_of_the_conversation(tiny: Any, forwards: Forwards) -> None:
    stop = Stop()

    class Streamer:
        seen = 0

        def put(self, value: torch.Tensor) -> None:
            self.seen += 1
            stop.is_asked = self.seen > 3  # the prompt, and three tokens

        def end(self) -> None:
            pass

    with kvoffload.offload(tiny, kvoffload.OffloadConfig(split="transfer", block_tokens=4)) as session:
        talk = talk_with(session)
        turn = talk.say(SAID[0], streamer=Streamer(), stop=stop)
        assert (turn.was_stopped, 3 <= turn.new_tokens <= 4) == (True, True)
        assert str(turn).startswith("stopped; ")
        stop.is_asked = False
        ids = talk._ids
        talk.say(SAID[1], stop=stop)
        assert talk._ids[: len(ids)] == ids
        delta = make_tokenizer()(f"~<u>{SAID[1]}~<a>")["input_ids"]
        assert talk._ids[len(ids) :] == delta + plain(tiny, ids + delta)
        forwards.clear()
        talk.say(SAID[2])
        assert forwards[0] < 40


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_turn_that_fails_leaves_the_conversation_as_it_was(tiny: Any, template: str | None) -> None:
    with kvoffload.offload(tiny, kvoffload.OffloadConfig(split="transfer", block_tokens=4)) as session:
        talk = talk_with(session, template)
        talk.say(SAID[0])
        before = list(talk._ids)

        def interrupt(*args: object) -> None:
            raise KeyboardInterrupt

        hook = tiny.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            talk.say(SAID[1])
        hook.remove()
        assert talk._ids == before
        turn = talk.say(SAID[2])
        assert talk._ids[: len(before) - 1] == before[:-1]
        prompt = talk._ids[: len(talk._ids) - turn.new_tokens]
        assert talk._ids == prompt + plain(tiny, prompt)
        assert turn.prefilled_tokens == len(prompt)  # all of it anew


def test_reset_forgets_everything_but_the_system_message(tiny: Any) -> None:
    with kvoffload.offload(tiny) as session:
        talk = talk_with(session, system="be brief")
        first = talk.say(SAID[0])
        talk.say(SAID[1])
        talk.reset()
        assert talk.num_tokens == 0
        again = talk.say(SAID[0])
    assert again[:3] == first[:3]
    assert first.prefilled_tokens == len("<s>be brief~<u>hello~<a>")


def test_sampling_with_a_seed_gives_the_same_conversation_again(tiny: Any) -> None:
    found = []
    for seed in (1, 1, 2):
        with kvoffload.offload(tiny) as session:
            talk = talk_with(session, sampling=Sampling(temperature=2.0, seed=seed))
            found.append([talk.say(text).text for text in SAID])
    assert found[0] == found[1] != found[2]


def test_a_template_that_takes_no_system_message_says_so(tiny: Any) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    with kvoffload.offload(tiny) as session, pytest.raises(ConfigError, match="no system role; leave out --system"):
        talk_with(session, template, system="be brief").say("hi")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def loads(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvoffload.cli import chat

    monkeypatch.setattr(chat, "load_model", lambda *args, **options: (tiny, make_tokenizer()))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.usefixtures("loads")
def test_piped_lines_are_one_turn_each(tiny: Any, model: Path) -> None:
    arguments = ("chat", "--model", model, "--max-new-tokens", NEW_TOKENS, "--split", "transfer")
    expected = expected_turns(tiny, TEMPLATE, SAID[:2])
    result = run(
        *arguments, "--json", given=f"{SAID[0]}\n\n{SAID[1]}\n/reset\n{SAID[0]}\n/stats\n/what\n/quit\nnever\n"
    )
    assert result.exit_code == 0, result.stderr
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["prompt"] for one in turns] == [SAID[0], SAID[1], SAID[0]]
    assert [one["text"] for one in turns] == [text.strip() for text in (*expected, expected[0])]
    assert turns[2]["prefilled_tokens"] == turns[0]["prefilled_tokens"]
    for said in ("forgotten", "plan: offloaded tokens cross as K/V", "unknown command /what; known: /stats"):
        assert said in result.stderr
    text = run(*arguments, "--no-stats", given=SAID[0])
    assert text.stdout.strip() == expected[0].strip()
    assert text.stderr == f"loading {model} on cpu\n"


@pytest.mark.usefixtures("loads")
def test_a_turn_is_followed_by_a_line_about_it(model: Path) -> None:
    result = run("chat", "--model", model, "--max-new-tokens", 3, given="hello\n")
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"read {len('<u>hello~<a>')} tokens in ")
    assert ", 0 were cached; 3 new at " in line


@pytest.mark.usefixtures("loads")
def test_a_space_makes_text_of_a_command_and_the_end_of_the_model_is_told(tiny: Any, model: Path) -> None:
    (expected,) = expected_turns(tiny, TEMPLATE, ("/stats",))
    arguments = ("chat", "--model", model, "--max-new-tokens", NEW_TOKENS, "--no-stats")
    result = run(*arguments, given=" /stats\n")
    assert result.stdout.strip() == expected.strip()
    assert "may exceed" not in result.stderr
    long = run(*arguments, given="x" * (256 - NEW_TOKENS - 8) + "\n")
    assert "tokens: another answer may exceed what this model was made for; /reset begins anew" in long.stderr


def test_a_model_without_a_template_is_told_once(tiny: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvoffload.cli import chat

    monkeypatch.setattr(chat, "load_model", lambda *args, **options: (tiny, make_tokenizer(None)))
    result = run("chat", "--model", model, "--max-new-tokens", 3, given="a\nb\n")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("no chat template: what you write is continued as plain text") == 1


IN_TERMINAL = """
import sys
sys.path.insert(0, TESTS)
from models import make_model
from tokenizing import CHARACTERS, make_tokenizer
from kvoffload import cli
from kvoffload.cli import chat
tiny = make_model("llama", vocab_size=len(CHARACTERS), num_hidden_layers=2)
chat.load_model = lambda *args, **options: (tiny, make_tokenizer())
cli.main()
"""


def test_a_conversation_in_a_terminal_fits_it(tiny: Any, model: Path) -> None:
    code = IN_TERMINAL.replace("TESTS", repr(str(Path(__file__).parent)))
    arguments = ("chat", "--model", model, "--max-new-tokens", 200, "--split", "transfer")
    status, lines = code_in_terminal(code, *arguments, typed="hello\n/stats\n/reset\n/quit\n")
    assert status == 0, lines
    assert sum(len(line) > 80 for line in lines) <= 1  # the answer of random weights, which may be a single word
    shown = "\n".join(line.rstrip() for line in lines)
    for said in ("> hello", "> /stats", "forgotten: the conversation begins anew", "Ctrl-C stops an answer"):
        assert said in shown
    assert " 200 new at " in shown
    assert "reading ..." not in shown
    assert "verdict: none, this link copies as fast as it can" in shown


# ---- printing and stopping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [12, 20, 80])
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_an_answer_is_broken_between_words(columns: int, size: int) -> None:
    text = "The quick brown fox, it jumps!\n\nOver   the lazy dog and off again, again.\nend " * 3
    written: list[str] = []
    lines = Lines(columns, written.append)
    for start in range(0, len(text), size):
        lines.put(text[start : start + size])
    shown = on_screen("".join(written))
    assert max(map(len, shown)) < columns
    assert " ".join(shown).split() == text.split()


def test_a_word_longer_than_the_line_and_wide_characters_are_shown_whole() -> None:
    written: list[str] = []
    lines = Lines(10, written.append)
    for char in "ab " + "x" * 25 + " " + "日本語" * 3:
        lines.put(char)
    shown = on_screen("".join(written))
    assert "".join("".join(shown).split()) == "ab" + "x" * 25 + "日本語" * 3
    assert len(shown) > 3
    assert max(len(line) for line in shown[1:] if "x" not in line) <= 4  # each as wide as two


def test_the_first_interrupt_asks_and_the_second_ends() -> None:
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with stopped_by_interrupt(lambda: asked.append(1)) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_asked
        assert stop(torch.zeros(2, 1), None).tolist() == [True, True]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert asked == [1]
    assert signal.getsignal(signal.SIGINT) is before
