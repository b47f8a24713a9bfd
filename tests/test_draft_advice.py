"""Verified drafts in `plan`, in verdicts and in the cost model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvoffload import HardwareProfile, OffloadConfig, Workload
from kvoffload.advise.advice import advise, task_of
from kvoffload.advise.comparison import compare_ways
from kvoffload.advise.verdict import judge
from kvoffload.cli import app
from kvoffload.planning import planner
from kvoffload.planning.drafts import expected_rounds, round_times

CONFIG = Path(__file__).parent / "data" / "configs" / "llama-3.1-8b.json"
LLAMA_3_8B: dict[str, Any] = json.loads(CONFIG.read_text(encoding="utf-8"))
RTX_4090 = HardwareProfile.preset("rtx4090-24gb-pcie4")
LONG = Workload(batch=1, prompt_tokens=131_072, new_tokens=256)


def rows(config: OffloadConfig, acceptance: float = 0.7, workload: Workload = LONG) -> dict[str, Any]:
    task = task_of(LLAMA_3_8B, workload, RTX_4090, config, acceptance=acceptance)
    return {row.name: row for row in compare_ways(task)}


def test_one_long_context_with_grouped_queries_gains_by_drafts_alone() -> None:
    found = rows(OffloadConfig(packing="off"))
    assert found["offload"].step_s == pytest.approx(found["full_transfer"].step_s, rel=0.01)
    assert found["drafts"].step_s < found["offload"].step_s / 2
    assert found["drafts"].tokens_per_pass > 2.5
    assert found["drafts"].device_bytes == found["offload"].device_bytes
    assert found["drafts"].link_utilization < found["offload"].link_utilization
    assert judge(task_of(LLAMA_3_8B, LONG, RTX_4090, OffloadConfig())).gain > 1.5


def test_the_gain_follows_the_assumed_acceptance() -> None:
    steps = [rows(OffloadConfig(), acceptance)["drafts"].step_s for acceptance in (0.4, 0.7, 0.9)]
    assert steps == sorted(steps, reverse=True)
    assert "drafts" not in rows(OffloadConfig(), acceptance=0.0)


@pytest.mark.parametrize(
    ("config", "workload"),
    [
        (OffloadConfig(speculate="off"), LONG),
        (OffloadConfig(schedule="kvpr"), LONG),
        (OffloadConfig(), Workload(batch=1, prompt_tokens=32_768, new_tokens=64, num_beams=8)),
    ],
    ids=["off", "kvpr", "beams"],
)
def test_where_there_are_no_drafts_none_are_planned(config: OffloadConfig, workload: Workload) -> None:
    assert "drafts" not in rows(config, workload=workload)


def test_a_batch_gains_less_in_lock_step_than_at_its_own_pace() -> None:
    """It goes in lock-step where blocks keep activations, whose positions are those of all rows."""

    def gain(batch: int, split: Any) -> float:
        workload = Workload(batch=batch, prompt_tokens=65_536, new_tokens=64)
        found = rows(OffloadConfig(split=split), workload=workload)
        return float(found["offload"].step_s / found["drafts"].step_s) if "drafts" in found else 1.0

    assert gain(1, 0.1) > gain(2, 0.1) >= gain(8, 0.1) == 1.0
    assert gain(8, "transfer") > 1.5


def test_a_pass_of_many_tokens_takes_hardly_longer_where_the_link_is_the_bound() -> None:
    task = task_of(LLAMA_3_8B, LONG, RTX_4090, OffloadConfig())
    inputs = task.inputs(task.mean_tokens())
    times = round_times(inputs, planner.solve(inputs), task.shape, task.profile, rows=1)
    assert times.pass_s[15] == pytest.approx(times.pass_s[0], rel=0.01)
    assert list(times.pass_s) == sorted(times.pass_s)
    assert 15 < times.pass_s[0] / times.draft_s < 40
    assert times.window_tokens > 128
    assert expected_rounds(times, 1).tokens > 2.5


def test_the_advice_names_what_is_assumed() -> None:
    advice = advise(LLAMA_3_8B, LONG, RTX_4090, OffloadConfig(), acceptance=0.8)
    assert advice.best.way == "drafts"
    read = "with verified drafts from the newest tokens, each assumed to be right with a chance of 0.80"
    assert read in advice.answer.speed
    assert f"{read}, a token takes" in advice.answer.details


def test_the_command_takes_an_acceptance() -> None:
    arguments = ["plan", "--config", str(CONFIG), "--hardware", "rtx4090-24gb-pcie4", "--prompt-tokens", "131072"]
    steps = {}
    for acceptance in ("0.5", "0.9"):
        result = CliRunner().invoke(app, [*arguments, "--acceptance", acceptance, "--json"])
        assert result.exit_code == 0, result.output
        steps[acceptance] = {row["name"]: row for row in json.loads(result.stdout)["forecast"]}["drafts"]["tpot_s"]
    assert steps["0.9"] < steps["0.5"]
    result = CliRunner().invoke(app, [*arguments, "--acceptance", "1.5"])
    assert result.exit_code != 0
    assert "--acceptance must be a share from 0 to 1" in result.output


def test_copies_of_few_bits_are_advised_where_they_fit() -> None:
    """Of 64k tokens 4-bit copies take 2.8 GB of what weights leave, of 128k more than there is."""
    for tokens, fits in ((65_536, True), (131_072, False)):
        workload = Workload(batch=1, prompt_tokens=tokens, new_tokens=256)
        found = {}
        for cache in ("auto", "window", "int4"):
            task = task_of(LLAMA_3_8B, workload, RTX_4090, OffloadConfig(draft_cache=cache))
            rounds = task.rounds()
            assert rounds is not None
            found[cache] = rounds
        assert not found["window"].reads_all
        assert found["int4"].reads_all == fits
        assert found["auto"] in found.values()
        assert found["window"].acceptance == 0.7
        assert found["int4"].acceptance == (0.9 if fits else 0.7)
    config = OffloadConfig(draft_cache="int4")
    advice = advise(LLAMA_3_8B, Workload(batch=1, prompt_tokens=65_536, new_tokens=256), RTX_4090, config)
    assert (
        "from 4-bit copies of all tokens, each assumed to be right with a chance of 0.90" in advice.plan.recommendation
    )


def test_the_row_of_drafts_has_the_memory_and_traffic_of_their_own_plan() -> None:
    """With 4-bit copies hardly a block stays exact on the device, so that nearly the whole cache crosses in a round."""
    workload = Workload(batch=1, prompt_tokens=65_536, new_tokens=256)
    found = {}
    for cache in ("window", "int4"):
        config = OffloadConfig(draft_cache=cache, packing="off")
        found[cache] = rows(config, workload=workload)
        assert found[cache]["drafts"].host_bytes == pytest.approx(65_792 * 131_072, rel=0.01)  # bytes of all tokens
        assert found[cache]["drafts"].device_bytes <= 24e9
    window, coarse = found["window"]["drafts"], found["int4"]["drafts"]
    seconds = {
        name: row.link_utilization * row.step_s * row.tokens_per_pass for name, row in (("w", window), ("c", coarse))
    }
    assert seconds["c"] > 1.3 * seconds["w"]
