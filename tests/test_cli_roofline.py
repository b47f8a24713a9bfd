"""`kvoffload roofline`: what it prints and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import RECORDED, run, run_badly, run_well, table_words
from commands import cache_fixture as cache_fixture
from commands import model_fixture as model_fixture
from configs import CONFIGS, LLAMA_2_13B
from toys import MODELS

from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.stored_facts import facts_of
from kvoffload.profiler.drawing import terminal_tables


@pytest.mark.parametrize("name", MODELS)
def test_the_command_works_for_every_configuration(name: str) -> None:
    arguments = [
        "--config",
        CONFIGS / f"{name}.json",
        "--hardware",
        "h100-80gb-sxm5",
        "--batch",
        4,
        "--seq",
        512,
    ]
    result = run("roofline", *arguments, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    dims = facts_of(CONFIGS / f"{name}.json")
    assert data["parameters"] == dims.num_weights
    assert data["parameters_are_exact"]
    for phase in ("prefill", "decode", "task"):
        totals = data[phase]
        for field in ("OPs", "memory_access", "load_weight", "load_kv_cache", "inference_time"):
            assert totals[field] > 0
        assert totals["OPs"] == pytest.approx(sum(one["flops"] for one in totals["operations"]))
        assert sum(one["share"] for one in totals["operations"]) == pytest.approx(1.0)
    table = run("roofline", *arguments).output
    assert "decode: one token of 4 sequences at a context of 512" in table
    assert "weights in 8 bits" in table
    assert "of 80 GB device memory: " in table


@pytest.mark.parametrize("width", [60, 80, 160])
@pytest.mark.parametrize("kv_on_host", [0, 0.5])
def test_no_figure_is_cut_on_a_narrow_terminal(width: int, kv_on_host: float, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--config", CONFIGS / "llama-2-7b.json", "--hardware", "a100-40gb-pcie4", "--batch", 64]
    arguments += ["--kv-on-host", kv_on_host]
    monkeypatch.setattr(terminal_tables, "WIDTH", 1000)
    wide = run_well("roofline", *arguments)
    monkeypatch.setattr(terminal_tables, "WIDTH", width)
    narrow = run_well("roofline", *arguments)
    assert "…" not in narrow
    assert "1.99e+03" in table_words(wide)
    assert table_words(wide) <= table_words(narrow)
    assert max(map(len, narrow.splitlines())) <= width


@pytest.mark.parametrize("command", ["plan", "roofline"])
def test_a_pipe_is_as_wide_as_columns_says(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [command, "--config", CONFIGS / "llama-2-7b.json", "--hardware", "a100-40gb-pcie4", "--batch", 64]
    wide = run_well(*arguments)
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run_well(*arguments)
    assert max(map(len, wide.splitlines())) > 100
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow
    assert set(re.findall(r"[a-z]{4,}", narrow)) == set(re.findall(r"[a-z]{4,}", wide))  # no word is broken


def test_the_command_takes_bits_and_a_host_share(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_13B))
    arguments = ["--config", tmp_path, "--hardware", "a100-40gb-pcie4", "--batch", 32]
    table = run("roofline", *arguments).output
    assert "does not fit by" in table
    assert "try --kv-on-host 0.5" in table
    options = ("--w-bits", 8, "--a-bits", 8, "--kv-bits", 4, "--kv-on-host", 0.25, "--attention", "unfused", "--json")
    data = json.loads(run("roofline", *arguments, *options).output)
    assert (data["w_bits"], data["a_bits"], data["kv_bits"], data["attention"]) == (8, 8, 4, "unfused")
    assert data["decode"]["load_kv_cache"] == pytest.approx(26843545600 / 4)
    assert data["decode"]["link_bytes"] == pytest.approx(26843545600 / 16, rel=2e-3)
    assert "host memory" in run("roofline", *arguments, "--kv-on-host", 0.5).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "h100"], "near: h100-80gb-pcie5"),
        (["--hardware", "missing.json"], "missing.json"),
        (["--batch", 0], "--batch must be a whole number from 1 to 1,000,000,000, got 0"),
        (["--seq", -5], "--prompt-tokens/--seq must be a whole number from 1 to 1,000,000,000, got -5"),
        (["--seq", 10**10], "--prompt-tokens/--seq must be"),
        (["--new-tokens", 0], "--new-tokens must be"),
        (["--w-bits", 0], "--w-bits must be a number of bits from 1 to 64, got 0.0"),
        (["--kv-bits", 65], "--kv-bits must be a number of bits"),
        (["--a-bits", "nan"], "--a-bits must be a number of bits"),
        (["--kv-on-host", 1.5], "--kv-on-host must be a share from 0 to 1, got 1.5"),
        (["--weights-on-host", -0.1], "--weights-on-host must be a share"),
        (["--attention", "flash"], "--attention must be 'fused' or 'unfused', got flash"),
        (["--config", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_bad_request_is_one_line_with_the_way_out(arguments: list[object], message: str) -> None:
    base = ["--config", CONFIGS / "opt-6.7b.json", "--hardware", "t4-16gb-pcie3"]
    result = run("roofline", *base, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unknown_type_without_a_needed_field_names_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    unknown = LLAMA_2_13B | {"model_type": "brandnew"}
    path.write_text(json.dumps({name: value for name, value in unknown.items() if name != "vocab_size"}))
    result = run("roofline", "--config", path, "--hardware", "t4-16gb-pcie3")
    assert (result.exit_code, "lacks vocab_size" in result.stderr) == (2, True)


@pytest.mark.parametrize("command", ["plan", "roofline"])
def test_the_length_of_the_prompt_has_the_same_two_names_everywhere(command: str, model: Path) -> None:
    arguments = [command, "--model", model, "--hardware", "a100-40gb-pcie4", "--json"]
    by_one, by_other = (json.loads(run_well(*arguments, name, 2048)) for name in ("--seq", "--prompt-tokens"))
    assert by_one == by_other
    assert by_one != json.loads(run_well(*arguments, "--seq", 4096))


def test_roofline_of_this_machine_takes_the_stored_profile_and_measures_nothing(model: Path, cache: Path) -> None:
    arguments = ["roofline", "--config", model, "--hardware", "auto", "--json"]
    assert "`kvoffload profile` measures and keeps one, or name a preset" in run_badly(*arguments)
    assert not list(cache.glob("*.json"))
    run_well("profile")
    found = json.loads(run_well(*arguments))
    assert found["mode"] == "fitted"
    assert found["hardware"] == HardwareProfile.load(RECORDED).device_name
