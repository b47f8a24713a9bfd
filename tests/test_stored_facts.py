"""Facts that are kept: read without torch, made anew when they are damaged, written whole."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import transformers
from commands import model_fixture as model_fixture
from commands import run_well
from configs import CONFIGS, LLAMA_2_7B

from kvoffload.cli import planning, terminal
from kvoffload.model import learn, stored_facts
from kvoffload.model.facts import Facts
from kvoffload.model.stored_facts import facts_of, is_known

SMALL = LLAMA_2_7B | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the facts of this test are kept; nothing is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stored_facts._facts.cache_clear()
    return tmp_path / "cache" / "kvoffload" / "models"


@pytest.fixture
def learnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was learned from transformers, by type."""
    found: list[str] = []
    learned = learn.learned
    monkeypatch.setattr(learn, "learned", lambda said: (found.append(said["model_type"]), learned(said))[1])
    return found


def asked_anew(config: object) -> Facts:
    stored_facts._facts.cache_clear()
    return facts_of(config)


def test_facts_are_learned_once_for_each_configuration(folder: Path, learnings: list[str]) -> None:
    first = facts_of(SMALL)
    assert asked_anew(SMALL) == first
    assert asked_anew(dict(reversed(SMALL.items())) | {"_name_or_path": "elsewhere"}) == first
    assert len(learnings) == 1
    assert asked_anew(SMALL | {"num_hidden_layers": 3}) != first
    assert len(learnings) == 2
    assert [path.name.partition("-")[0] for path in folder.iterdir()] == ["llama", "llama"]  # nothing half-written


def test_facts_of_another_release_are_not_those_of_this_one(
    folder: Path, learnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts_of(SMALL)
    monkeypatch.setattr(stored_facts, "_release", lambda: "99.0")
    assert not is_known(SMALL)
    asked_anew(SMALL)
    assert len(learnings) == 2


def test_the_release_is_found_without_importing_it() -> None:
    code = (
        "import sys; from kvoffload.model import stored_facts; print(stored_facts._release(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [transformers.__version__, "False"]


@pytest.mark.parametrize("command", ["plan", "roofline"])
def test_a_command_needs_neither_torch_nor_transformers_for_a_model_it_has_met(
    command: str, folder: Path, tmp_path: Path
) -> None:
    arguments = [command, "--config", str(CONFIGS / "qwen3-8b.json"), "--hardware", "a100-40gb-pcie4", "--json"]
    first = run_well(*arguments)
    code = (
        "import sys; from kvoffload.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout) == json.loads(first)


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", "null", '{"digest": 1, "facts": {}}', "a number", "a field", "\xff"]
)
def test_a_damaged_file_is_made_anew_with_one_line(
    damage: str, folder: Path, learnings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = facts_of(SMALL)
    (path,) = folder.iterdir()
    text = path.read_text()
    if damage == "a number":
        damage = text.replace(str(first.num_weights), str(first.num_weights + 1))
        assert damage != text
    elif damage == "a field":
        data = json.loads(text)
        del data["facts"]["layers"]
        damage = json.dumps({"digest": stored_facts._digest(data["facts"]), "facts": data["facts"]})
    path.write_bytes(damage.encode("latin-1"))
    with caplog.at_level(logging.INFO):
        assert asked_anew(SMALL) == first
    (record,) = [one for one in caplog.records if one.name.startswith("kvoffload")]
    assert record.getMessage().startswith(f"the facts of a model kept in {path} are damaged (")
    assert record.getMessage().endswith("): made anew")
    assert len(learnings) == 2
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written_or_made_is_no_error(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.parent.mkdir(parents=True)
    folder.parent.write_text("a file stands in the way")
    with caplog.at_level(logging.WARNING):
        assert facts_of(SMALL).num_layers == 2
    assert not caplog.records


def test_writers_at_the_same_time_leave_one_whole_file(folder: Path) -> None:
    text = stored_facts._text_of(SMALL)
    path = stored_facts.facts_path(text)
    facts = facts_of(SMALL)
    seen: list[Facts | None] = []

    def write_and_read() -> None:
        for _ in range(20):
            stored_facts._keep(facts, path)
            seen.append(stored_facts._kept(path))

    threads = [threading.Thread(target=write_and_read) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert seen == [facts] * 80
    assert list(folder.iterdir()) == [path]


def test_a_type_of_a_users_own_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(transformers.LlamaConfig):
        model_type = "theirs"

    transformers.AutoConfig.register("theirs", Theirs)
    transformers.AutoModelForCausalLM.register(
        Theirs, type("TheirModel", (transformers.LlamaForCausalLM,), {"config_class": Theirs})
    )
    try:
        assert facts_of(SMALL | {"model_type": "theirs"}).is_exact
    finally:
        del transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content["theirs"]
        del transformers.AutoModelForCausalLM._model_mapping._extra_content[Theirs]
    assert not folder.exists()


def test_facts_are_the_same_after_they_were_in_a_file() -> None:
    for name in ("mixtral-8x7b", "opt-6.7b"):
        facts = facts_of(CONFIGS / f"{name}.json")
        assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    quantised = facts_of(SMALL | {"quantization_config": {"load_in_4bit": True}})
    assert Facts.from_json(json.loads(json.dumps(quantised.to_json()))) == quantised
    with pytest.raises(ValueError, match="its schema is 0, not 2"):
        Facts.from_json(quantised.to_json() | {"schema": 0})


def test_a_line_says_what_takes_time_only_on_a_terminal_and_only_the_first_time(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    waiting = terminal.waiting
    monkeypatch.setattr(planning, "waiting", lambda text: (shown.append(text), waiting(text))[1])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    planning.facts_shown(str(model))
    assert shown == ["asking transformers what this model is made of, once"]
    assert shown[0] in capfd.readouterr().err
    planning.facts_shown(str(model))
    assert len(shown) == 1
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with terminal.waiting("nothing"):
        pass
    assert capfd.readouterr().err == ""
