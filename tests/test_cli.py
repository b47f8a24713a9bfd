"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import kvoffload
import kvoffload.cli as cli
from kvoffload.errors import ConfigError, ProfileError
from kvoffload.hardware_profile import HardwareProfile
from kvoffload.profiler import profile, rows, stored

RECORDED = Path(__file__).parent / "data" / "profile_emulated_2_threads.json"
DISTURBANCE: dict[str, object] = {}  # laid over the facts of the next measurements
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "torch_dtype": "float16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def test_help_lists_the_commands_and_what_they_are_for() -> None:
    text = run_well("--help")
    for command in ("env", "profile", "plan", "report"):
        assert f" {command} " in text
        assert "--json" in run_well(command, "--help")


def test_it_says_its_version() -> None:
    assert run_well("--version") == f"kvoffload {kvoffload.__version__}\n"


def test_the_command_line_loads_without_torch() -> None:
    # the package itself is stood in for: what it imports is not the command line's doing
    code = (
        "import sys, types\n"
        "package = types.ModuleType('kvoffload')\n"
        f"package.__path__ = [{str(Path(kvoffload.__file__).parent)!r}]\n"
        "sys.modules['kvoffload'] = package\n"
        "import kvoffload.cli\n"
        "assert not {'torch', 'transformers', 'pulp'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- env and profile ---------------------------------------------------------------------------------------------


def test_env_shows_the_link_in_use_against_its_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvoffload.profiler import environment

    facts = {
        "gpu_name": "NVIDIA A100",
        "pcie_generation": 3,
        "pcie_generation_max": 4,
        "pcie_width": 8,
        "pcie_width_max": 16,
        "gpu_numa_node": 1,
    }
    monkeypatch.setattr(environment, "gpu_facts", lambda device=None: environment.NO_GPU | facts)
    text = run_well("env")
    assert "3 in use, 4 at most" in text
    assert "8 in use, 16 at most" in text
    assert "NUMA node of the GPU" in text
    assert "ulimit -l" in text or "no limit" in text
    data = json.loads(run_well("env", "--json"))
    assert data["pcie_width_max"] == 16
    assert data["gpu_numa_node"] == 1


def test_env_says_what_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvoffload.profiler import environment

    monkeypatch.setattr(environment, "gpu_facts", lambda device=None: dict(environment.NO_GPU))
    lines = [line for line in run_well("env").splitlines() if "PCIe" in line or "NUMA" in line]
    assert len(lines) == 3
    assert all("not available" in line and "in use" not in line for line in lines)
    assert json.loads(run_well("env", "--json"))["pcie_generation"] is None


def test_profile_prints_and_keeps_what_it_measured(cache: Path) -> None:
    text = run_well("profile", "--link-gb-per-s", 0.5, "--latency-us", 100)
    assert "emulated 0.5 GB/s" in text
    assert "(assumed)" in text
    assert "GFLOP/s" in text
    assert "PCIe lanes" in text
    assert len(list(cache.glob("*.json"))) == 1


def test_profile_as_json_is_a_profile_file(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.json"
    path.write_text(run_well("profile", "--json"))
    assert HardwareProfile.load(path).gemm == HardwareProfile.load(RECORDED).gemm


def test_profile_of_an_unpaced_link_says_it_has_no_speed(cache: Path) -> None:
    from kvoffload.config import EmulatedLink

    assert profile.with_link(HardwareProfile.load(RECORDED), EmulatedLink()).h2d is None
    unpaced = rows.profile_rows(profile.with_link(HardwareProfile.load(RECORDED), EmulatedLink()))
    assert dict(unpaced)["H2D, D2H"].startswith("no speed")


def test_profile_goes_where_output_says_and_a_bad_place_is_an_error(cache: Path, tmp_path: Path) -> None:
    result = run("profile", "--output", tmp_path / "p.json")
    assert result.exit_code == 0
    assert result.stderr == f"stored in {tmp_path / 'p.json'}\n"  # and no progress bar: this is no terminal
    assert not cache.exists()
    assert HardwareProfile.load(tmp_path / "p.json").emulated_link
    assert "--output" in run_badly("profile", "--output", tmp_path / "p.json" / "below.json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("profile --output nowhere/p.json", "--output: cannot write nowhere/p.json: there is no folder nowhere"),
        ("profile --output .", "--output: cannot write .: Is a directory; choose another file"),
        ("profile", "cannot keep a profile in /proc/none/kvoffload: "),
        ("report --config CONFIG --measure --output nowhere/r.html", "--output: cannot write nowhere/r.html"),
        ("report --config CONFIG --measure --trace nowhere/t.json", "--trace: cannot write nowhere/t.json"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_measured(
    line: str, message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    monkeypatch.setattr(profile, "measure_hardware", measure)
    monkeypatch.setattr(stored, "measure_hardware", measure)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert message in run_badly(*line.replace("CONFIG", str(model)).split())
    assert not list(Path().iterdir())


def test_looking_whether_a_file_can_be_written_changes_nothing(model: Path, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("before")
    run_badly("profile", "--output", path, "--latency-us", 100)
    assert path.read_text() == "before"
    run_badly("profile", "--output", tmp_path / "new.json", "--latency-us", 100)
    assert not (tmp_path / "new.json").exists()


def test_profile_refuses_a_link_without_speed_and_an_unknown_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "above zero" in run_badly("profile", "--link-gb-per-s", 0)
    assert "'cuda'" in run_badly("profile", "--device", "toaster")


def test_profile_measures_in_full_unless_it_shall_be_quick(cache: Path) -> None:
    assert json.loads(run_well("profile", "--json"))["extra"]["thoroughness"] == "full"
    assert json.loads(run_well("profile", "--quick", "--json"))["extra"]["thoroughness"] == "quick"


def test_a_latency_without_a_speed_is_refused_and_the_stored_profile_stays(cache: Path) -> None:
    run_well("profile", "--link-gb-per-s", 0.5)
    (path,) = cache.glob("*.json")
    before = path.read_text()
    message = run_badly("profile", "--latency-us", 100)
    assert "--latency-us 100 needs --link-gb-per-s" in message
    assert path.read_text() == before


def test_a_doubtful_profile_is_shown_but_not_stored(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_well("profile", "--link-gb-per-s", 0.5)
    (path,) = cache.glob("*.json")
    before = path.read_text()
    monkeypatch.setitem(DISTURBANCE, "other_cpu_load_fraction", 0.62)
    result = run("profile", "--link-gb-per-s", 2)
    assert result.exit_code == 2
    assert "emulated 2 GB/s" in result.stdout
    assert result.stderr.startswith("kvoffload: not stored, since other work kept 0.62 of the CPUs busy (at most 0.25")
    assert "--force" in result.stderr
    assert "--output" in result.stderr
    assert path.read_text() == before


def test_a_doubtful_profile_is_kept_on_demand_and_said_to_be_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DISTURBANCE, "noisy", [f"gemm {idx} (spread 0.90)" for idx in range(30)])
    for arguments, path in (
        (["--force"], None),
        (["--output", tmp_path / "p.json"], tmp_path / "p.json"),
    ):
        result = run("profile", *arguments)
        assert result.exit_code == 0
        assert "this profile is doubtful: the trials of 30 of" in result.stderr
        assert f"stored in {path or cache}" in result.stderr
    assert len(list(cache.glob("*.json"))) == 1


# ---- plan --------------------------------------------------------------------------------------------------------


def test_plan_recommends_and_compares(model: Path) -> None:
    text = run_well("plan", "--model", model, "--batch", 100, "--hardware", "a100-40gb-pcie4")
    assert text.startswith("Do not offload, unless the batch must stay together")
    assert "sub-batches" in text
    assert "On NVIDIA A100 40GB PCIe, PCIe 4.0 x16:" in text


def test_plan_never_cuts_the_name_of_a_way(model: Path) -> None:
    arguments = ["--price-per-hour", 2, "--grid-g-per-kwh", 300, "--batch", 100, "--hardware", "a100-40gb-pcie4"]
    text = run_well("plan", "--model", model, *arguments)
    for way in ("sub-batches", "offload", "full transfer", "paper's schedule"):
        assert f"│ {way} " in text


def test_plan_groups_long_numbers_and_names_one_block_one() -> None:
    config = Path(__file__).parent / "data" / "configs" / "opt-6.7b.json"
    text = run_well("plan", "--config", config, "--hardware", "a100-40gb-pcie4", "--sweep", "1:131072")
    assert "16,777,216 or more offloaded" in text
    assert " 131,072 tokens " in text
    assert "largest batch with these prompts: 34 on the device" in text
    rows = run_well("roofline", "--config", config, "--hardware", "a100-40gb-pcie4", "--seq", 131072, "--new-tokens", 1)
    assert "one token of 1 sequence at a context of 131,072" in rows
    assert "1 x 131,072 tokens and 1 new one each" in rows


def test_plan_as_json_holds_the_plan_and_the_alternatives(model: Path) -> None:
    arguments = ["--model", model / "config.json", "--prompt-tokens", 100000, "--hardware", "a100-40gb-pcie4"]
    data = json.loads(run_well("plan", *arguments, "--json"))
    assert data["activation_blocks"] > 0
    assert data["predicted_step_s"] < data["full_transfer_step_s"]
    assert data["alternatives"][0]["way"] == "offload"
    transferred = json.loads(run_well("plan", *arguments, "--split", "transfer", "--device-gib", 5, "--json"))
    assert transferred["activation_blocks"] == 0
    assert transferred["device_bytes"] <= 5 * 2**30


def test_plan_for_this_machine_takes_the_stored_profile_and_an_emulated_speed(model: Path, cache: Path) -> None:
    (model / "config.json").write_text(json.dumps(LLAMA | {"hidden_size": 128, "intermediate_size": 256}))
    arguments = ["plan", "--model", model, "--prompt-tokens", 4096, "--json"]
    slow = json.loads(run_well(*arguments, "--link-gb-per-s", 0.1, "--split", "transfer"))
    fast = json.loads(run_well(*arguments, "--link-gb-per-s", 1.0, "--split", "transfer"))
    assert slow["predicted_step_s"] > fast["predicted_step_s"]
    assert slow["link_bytes_per_step"] == fast["link_bytes_per_step"] > 0
    assert len(list(cache.glob("*.json"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "b300"], "a100-40gb-pcie4"),
        (["--hardware", "missing.json"], "missing.json"),
        (["--batch", -1], "--batch must be a whole number from 1 to 1,000,000,000, got -1"),
        (["--new-tokens", 0], "--new-tokens must be"),
        (["--num-beams", 0], "--num-beams must be"),
        (["--seq", 0], "--prompt-tokens/--seq must be"),
        (["--split", 1.5], "--split must be 'auto' or 'transfer' or 'recompute' or a share from 0 to 1, got 1.5"),
        (["--split", "everything"], "--split must be"),
        (["--split", "nan"], "--split must be"),
        (["--device-gib", "lots"], "--device-gib must be 'auto' or 'min' or a number of GiB above zero, got lots"),
        (["--device-gib", 0], "--device-gib must be"),
        (["--host-gib", "min"], "--host-gib must be 'auto' or a number of GiB above zero, got min"),
        (["--link", "pcie9"], "--link: unknown link 'pcie9'"),
        (["--device-memory", 0], "--device-memory must be a number of GB"),
        (["--price-per-hour", -1], "--price-per-hour must be a price"),
        (["--grid-g-per-kwh", 9999], "--grid-g-per-kwh must be grams from 0 to 5000, got 9999.0"),
        (["--link-gb-per-s", 0], "--link-gb-per-s must be a number above zero (GB/s), got 0.0"),
        (["--device-gib", 0.001, "--prompt-tokens", 100000], "device_gib"),
        (["--host-gib", 0.001, "--prompt-tokens", 100000], "host memory"),
        (["--link-gb-per-s", 1], "link of its own"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_bad_request_is_one_line_and_exit_code_2(arguments: list[object], message: str, model: Path) -> None:
    assert message in run_badly("plan", "--model", model, "--hardware", "a100-40gb-pcie4", *arguments)


def test_the_latency_is_said_in_the_unit_it_is_given_in() -> None:
    message = run_badly("profile", "--link-gb-per-s", 1, "--latency-us", -1)
    assert "--latency-us must be a number of microseconds from 0 to 1e+06, got -1.0" in message


def test_a_mistake_is_told_before_anything_large_is_loaded(tmp_path: Path, model: Path) -> None:
    """In a process of its own: what the tests themselves imported does not count."""
    (tmp_path / "smollm").mkdir()
    mistakes = {
        "plan --config nowhere": "nowhere",
        f"plan --config {model} --hardware a100-40": "near: a100-40gb-pcie4",
        f"plan --config {model} --sweep 1": "sweep",
        f"roofline --config {model} --hardware t4 --batch 0": "--batch",
        "profile --latency-us -5": "--latency-us",
        "generate hi --max-new-tokens 0": "--max-new-tokens must be a whole number from 1 to 1,000,000,000, got 0",
        "generate hi --split 2": "--split",
        "generate hi --model ./smolm": "'./smolm' (near: smollm)",
        "generate hi --model smolm": "no folder 'smolm' here (near: smollm), it is not in the local Hugging Face cache",
        "generate hi --model nobody/nothing-like-it": "switched off (HF_HUB_OFFLINE)",
        "generate hi --model missing.gguf": "'missing.gguf'",
        "generate hi --model smollm": "the folder smollm holds no model: it has no config.json",
        f"generate hi --model {model}/config.json": "name the folder",
        "demo --model ./smolm": "near: smollm",
        "demo --max-new-tokens 1": "--max-new-tokens must be a whole number from 2 to 1,000,000,000, got 1",
    }
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from kvoffload.cli import app\n"
        f"for line, message in {mistakes!r}.items():\n"
        "    result = CliRunner().invoke(app, line.split())\n"
        "    assert result.exit_code == 2 and result.stderr.count('\\n') == 1, (line, result.stderr)\n"
        "    assert message in result.stderr, (line, result.stderr)\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), line\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_bad_model_or_profile_file_is_named(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert str(broken) in run_badly("plan", "--model", broken, "--hardware", "a100-40gb-pcie4")
    assert f"cannot read the hardware profile {broken}" in run_badly("plan", "--model", model, "--hardware", broken)
    assert "nowhere" in run_badly("plan", "--model", tmp_path / "nowhere", "--hardware", "a100-40gb-pcie4")


@pytest.mark.parametrize("command", ["plan", "report"])
def test_a_machine_without_a_link_to_plan_with_is_told_before_it_is_measured(
    command: str, model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    message = run_badly(command, "--config", model)
    assert "has no speed to plan with: give it one with --link-gb-per-s, or name the machine" in message
    assert not cache.exists()
    run_well("plan", "--config", model, "--link", "pcie4")
    assert len(list(cache.glob("*.json"))) == 1


def test_a_damaged_stored_profile_stops_plan_and_names_the_file(model: Path, cache: Path) -> None:
    run_well("plan", "--model", model, "--link-gb-per-s", 1)
    (path,) = cache.glob("*.json")
    path.write_text("damaged")
    assert str(path) in run_badly("plan", "--model", model, "--link-gb-per-s", 1)


# ---- roofline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "roofline"])
def test_the_length_of_the_prompt_has_the_same_two_names_everywhere(command: str, model: Path) -> None:
    arguments = [command, "--model", model, "--hardware", "a100-40gb-pcie4", "--json"]
    by_one, by_other = (json.loads(run_well(*arguments, name, 2048)) for name in ("--seq", "--prompt-tokens"))
    assert by_one == by_other
    assert by_one != json.loads(run_well(*arguments, "--seq", 4096))


def test_roofline_of_this_machine_takes_the_stored_profile_and_measures_nothing(model: Path, cache: Path) -> None:
    arguments = ["roofline", "--config", model, "--hardware", "auto", "--json"]
    assert "`kvoffload profile` measures and keeps one, or name a preset" in run_badly(*arguments)
    assert not cache.exists()
    run_well("profile")
    found = json.loads(run_well(*arguments))
    assert found["mode"] == "fitted"
    assert found["hardware"] == HardwareProfile.load(RECORDED).device_name


def test_generate_says_what_it_loads_before_that_takes_its_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvoffload import chat

    def load(*args: object) -> None:
        raise ConfigError("not today")

    monkeypatch.setattr(chat, "load", load)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run("generate", "hi", "--model", model)
    assert result.stderr.splitlines() == [f"loading {model} on cpu", "kvoffload: not today"]


def test_errors_of_commands_added_later_follow_the_same_rule() -> None:
    import typer

    app = typer.Typer(cls=cli._Commands, pretty_exceptions_enable=False)

    @app.command("one")
    def one() -> None:
        raise ProfileError("no profile")

    @app.command("two")
    def two() -> None:
        raise RuntimeError("a mistake of ours")

    result = CliRunner().invoke(app, ["one"])
    assert (result.exit_code, result.stderr) == (2, "kvoffload: no profile\n")
    assert isinstance(CliRunner().invoke(app, ["two"]).exception, RuntimeError)


def test_custom_generate_writes_the_options_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run_well("custom-generate", tmp_path, "--split", "0.5", "--device-gib", "min", "--link-gb-per-s", "2")
    path = tmp_path / "custom_generate" / "generate.py"
    assert f"wrote {path}" in out
    assert f"custom_generate={str(tmp_path)!r}, trust_remote_code=True" in out
    written: dict[str, Any] = {}
    exec(path.read_text(), written)
    assert written["OPTIONS"] == {"split": 0.5, "device_gib": "min", "link": {"h2d_gb_per_s": 2.0}}
    found = json.loads(run_well("custom-generate", tmp_path, "--hardware", "a100-40gb-pcie4", "--json"))
    assert found == {"path": str(path), "options": {"profile": "a100-40gb-pcie4"}}
    monkeypatch.chdir(RECORDED.parent)  # a call may come from another folder
    found = json.loads(run_well("custom-generate", tmp_path, "--hardware", RECORDED.name, "--json"))
    assert found["options"] == {"profile": str(RECORDED)}


def test_custom_generate_says_which_option_is_wrong(tmp_path: Path) -> None:
    assert "--split must be" in run_badly("custom-generate", tmp_path, "--split", 7)
    assert "a100-40gb-pcie4" in run_badly("custom-generate", tmp_path, "--hardware", "a100-40gb-pci4")
    assert not list(tmp_path.iterdir())
