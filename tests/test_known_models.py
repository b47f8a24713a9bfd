"""Well-known models by name: their sizes are the published ones, and a wrong name is answered with near ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from configs import CONFIGS

import kvoffload
from kvoffload.errors import ConfigError
from kvoffload.model import config_files
from kvoffload.model.config_files import read_configuration
from kvoffload.model.known_models import known_model, known_models, near_models
from kvoffload.model.stored_facts import facts_of

# as the pages of the models give them
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "phi-4": 14_659_507_200,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
}


def test_every_known_model_has_its_published_number_of_parameters() -> None:
    assert {name: facts_of(name).num_weights for name in known_models()} == PARAMETERS
    assert all(facts_of(name).is_exact and facts_of(name).position_limit for name in known_models())


@pytest.mark.parametrize("name", ["opt-6.7b", "llama-2-7b", "llama-3.1-8b", "qwen3-8b", "mixtral-8x7b"])
def test_a_name_says_what_a_file_says(name: str) -> None:
    assert kvoffload.model_shape(name) == kvoffload.model_shape(CONFIGS / f"{name}.json")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-70B", "llama-3.1-70b"),
        ("Qwen/Qwen2.5-72B-Instruct", "qwen2.5-72b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("facebook/opt-30b", "opt-30b"),
        ("OPT_30B", "opt-30b"),
    ],
)
def test_owner_case_and_how_it_was_trained_do_not_count(name: str, known: str) -> None:
    assert known_model(name) == known_model(known) is not None


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct-AWQ", "meta-llama/Llama-3.1-405B", "llama", ""])
def test_another_size_or_quantised_weights_are_another_model(name: str) -> None:
    assert known_model(name) is None


def test_near_names_are_those_that_hold_it_else_those_that_look_like_it() -> None:
    assert near_models("mixtral") == ["mixtral-8x7b"]
    assert near_models("lama-3.1-8b")[0] == "llama-3.1-8b"
    assert near_models("zzz") == []


def test_a_file_of_that_name_goes_first_then_the_cache_then_the_known_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "opt-30b").mkdir()
    (tmp_path / "opt-30b" / "config.json").write_text(json.dumps({"model_type": "mine"}))
    assert read_configuration("opt-30b") == {"model_type": "mine"}
    cached = tmp_path / "cached.json"
    cached.write_text(json.dumps({"model_type": "cached"}))
    monkeypatch.setattr(config_files, "cached_file", lambda name, file: str(cached) if "/" in name else None)
    assert read_configuration("facebook/opt-30b") == {"model_type": "cached"}
    monkeypatch.setattr(config_files, "cached_file", lambda name, file: None)
    assert read_configuration("facebook/opt-30b") == known_model("opt-30b")


def test_an_unknown_hub_id_is_asked_for_once_and_its_configuration_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "fetched"}))
    fetched: list[tuple[str, str]] = []

    def download(name: str, file: str) -> str:
        fetched.append((name, file))
        return str(path)

    monkeypatch.setattr(config_files, "cached_file", lambda name, file: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for answer in ("does not have it", "was not reached"):
        monkeypatch.setattr(config_files, "ask_hub", lambda name, answer=answer: answer)
        with pytest.raises(ConfigError, match=f"the hub {answer}$") as caught:
            read_configuration("nobody/qwen3")
        assert "near: qwen3-32b, qwen3-8b" in str(caught.value)
    assert fetched == []
    monkeypatch.setattr(config_files, "ask_hub", lambda name: "is there")
    assert read_configuration("somebody/model") == {"model_type": "fetched"}
    assert fetched == [("somebody/model", "config.json")]


@pytest.mark.parametrize("name", ["missing.json", "./missing", "/missing/folder", "~/missing"])
def test_a_path_that_leads_nowhere_is_told_as_a_path(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no such file; name a config.json or the folder it is in"):
        read_configuration(name)
