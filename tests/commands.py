"""The commands as tests run them, a model's configuration, and a machine that is never really measured.

Not a test module. Its fixtures `model` and `cache` are those of the test modules that import them.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from configs import LLAMA_2_7B
from typer.testing import CliRunner, Result

from kvoffload import cli
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.profiler import profile, stored

RECORDED = Path(__file__).parent / "data" / "profile_emulated_2_threads.json"
DISTURBANCE: dict[str, object] = {}  # laid over the facts of the next measurements


@pytest.fixture(name="model")
def model_fixture(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return path


@pytest.fixture(name="cache")
def cache_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and measurements that take no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def measure(device: object = "auto", link: Any = "auto", **options: object) -> HardwareProfile:
        key = profile.machine_key(profile.resolve_device("cpu", "auto"))
        recorded = HardwareProfile.load(RECORDED)
        facts = recorded.extra | {"other_cpu_load_fraction": 0.0} | options
        recorded = dataclasses.replace(
            recorded, key=key, method=profile.METHOD, extra=facts | {"progress": None} | DISTURBANCE
        )
        return recorded if link == "auto" else profile.with_link(recorded, link)

    monkeypatch.setattr(profile, "measure_hardware", measure)
    monkeypatch.setattr(stored, "measure_hardware", measure)
    return tmp_path / "cache" / "kvoffload"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run_well(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def run_badly(*arguments: object) -> str:
    """The one line on stderr of a command that ends with our error."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("kvoffload: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def table_words(text: str) -> Counter[str]:
    """What stands in the tables of an output, except their headers."""
    return Counter(word for line in text.splitlines() if line.startswith("│") for word in line.split() if word != "│")
