"""Figures of every way against each other, against hand calculations and against the paper; what still fits."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import llmcompass
import pytest
from commands import run
from configs import CONFIGS, LLAMA_2_7B
from typer.testing import Result

from kvoffload.advise.advice import advise, task_of
from kvoffload.advise.capacity import MAX_SEARCHED, limits
from kvoffload.advise.comparison import WayFigures, compare_ways
from kvoffload.advise.economics import Economics
from kvoffload.advise.overview import Overview, overview
from kvoffload.advise.sweep import BestAtSize, Grid, grid
from kvoffload.advise.task import Task
from kvoffload.config import GIB, OffloadConfig
from kvoffload.errors import ConfigError, InfeasiblePlanError
from kvoffload.machine.datasheet import link_named
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.machine import what_if
from kvoffload.model.model_shape import model_shape
from kvoffload.planning import planner
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.workload import Workload

ROOT = Path(__file__).parents[1]
A100 = HardwareProfile.preset("a100-40gb-pcie4")
BATCH = Workload(batch=64, prompt_tokens=1024, new_tokens=128)
PAPER_LATENCY, PAPER_THROUGHPUT = 1 / (1 - 0.358), 1.462  # "up to", arXiv 2411.17089


def task(name: str = "opt-6.7b", workload: Workload = BATCH, profile: HardwareProfile = A100, **config: Any) -> Task:
    return task_of(CONFIGS / f"{name}.json", workload, profile, OffloadConfig(**config))


def by_name(rows: tuple[WayFigures, ...]) -> dict[str, WayFigures]:
    return {row.name: row for row in rows}


# ---- the paper, and a worked example ---------------------------------------------------------------------------------


def opt(hidden: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": hidden // 128,
        "num_hidden_layers": 4,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "torch_dtype": "float16",
    }


def link_and_recomputation(config: Any, profile: HardwareProfile, schedule: str) -> PlanInputs:
    """The planning problem of a preset with nothing in it but the link and recomputation, in fine blocks."""
    workload = Workload(batch=32, prompt_tokens=1024, new_tokens=1)
    found = task_of(config, workload, profile, OffloadConfig(schedule=schedule, packing="off")).inputs(1024)  # type: ignore[arg-type]
    nothing = {"attention_s_per_token": 0.0, "dense_s": 0.0, "head_s": 0.0, "gap_s": 0.0}
    rates = dataclasses.replace(found.rates, **nothing, host_s_per_layer=0.0, host_s_per_chunk=0.0)
    return dataclasses.replace(
        found, rates=rates, num_blocks=1000, block_tokens=1, host_bytes=2**62, device_bytes=found.fixed_device_bytes
    )


def gain(config: Any, profile: HardwareProfile, schedule: str) -> tuple[float, float]:
    """Share of the cache that is recomputed, and full transfer's step over the plan's."""
    plan = planner.solve(link_and_recomputation(config, profile, schedule))
    return plan.split_fraction, plan.full_transfer_step_s / plan.predicted_step_s


def test_the_predictions_beside_the_papers_results_are_those_of_the_page() -> None:
    text = (ROOT / "docs" / "predictions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d{4}) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["4096", "5120", "7168"]
    nominal = what_if(A100, link="32GB/s")
    for hidden, share, paper, lower, ours in ((int(row[0]), *map(float, row[1:])) for row in rows):
        found_share, found_paper = gain(opt(hidden), nominal, "kvpr")
        assert found_share == pytest.approx(share, abs=0.006)
        assert found_paper == pytest.approx(paper, abs=0.006)
        assert 1 - 1 / found_paper == pytest.approx(lower, abs=0.006)
        assert gain(opt(hidden), nominal, "pipelined")[1] == pytest.approx(ours, abs=0.006)
    best = float(rows[0][2])
    assert pytest.approx(best, rel=0.02) == PAPER_LATENCY
    assert best > PAPER_THROUGHPUT


def test_grouped_queries_recompute_nothing_in_either_schedule() -> None:
    for name in ("llama-3.1-8b", "mixtral-8x7b", "qwen3-8b"):
        for schedule in ("kvpr", "pipelined"):
            large = what_if(A100, device_memory_bytes=400e9)
            assert gain(CONFIGS / f"{name}.json", large, schedule) == (0.0, pytest.approx(1.0))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-8b", "mixtral-8x7b"])
def test_where_activations_are_no_smaller_the_plan_is_full_transfer_with_all_its_room(name: str) -> None:
    """No memory is set aside for recomputing, so that planning is never behind not planning."""
    tight = HardwareProfile.preset("h200-pcie5" if name == "mixtral-8x7b" else "rtx3090-24gb-pcie4")
    asked = task(name, dataclasses.replace(BATCH, batch=256), tight)
    asked = asked._replace(config=dataclasses.replace(asked.config, packing="off"))
    rows = by_name(compare_ways(asked))
    assert rows["offload"] == rows["full_transfer"]._replace(name="offload")


def test_the_gain_depends_on_the_device() -> None:
    gains = {
        name: gain(opt(4096), HardwareProfile.preset(name), "pipelined")[1]
        for name in ("a100-40gb-pcie4", "h200-pcie5", "rtx4090-24gb-pcie4", "t4-16gb-pcie3")
    }
    assert gains["a100-40gb-pcie4"] == gains["h200-pcie5"] == pytest.approx(2.0, rel=0.01)
    assert gains["t4-16gb-pcie3"] < gains["rtx4090-24gb-pcie4"] < 1.85


def test_an_activation_over_keys_and_values_is_half_or_less_only_without_grouping() -> None:
    gemma_7b = {
        "model_type": "gemma",
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_attention_heads": 16,
        "head_dim": 256,
        "num_hidden_layers": 28,
        "vocab_size": 256000,
    }
    ratios = [
        shape.activation_row_bytes / shape.kv_row_bytes
        for shape in (
            model_shape(CONFIGS / "opt-6.7b.json"),
            model_shape(gemma_7b),
            model_shape(CONFIGS / "llama-3.1-8b.json"),
        )
    ]
    assert ratios == pytest.approx([0.5, 0.375, 2.0])


def test_the_page_states_the_errors_of_the_fit_as_they_are() -> None:
    text = (ROOT / "docs" / "predictions.md").read_text(encoding="utf-8")
    groups = {
        "A100 matrix products": llmcompass.leave_one_out(llmcompass.products("A100")),
        "MI210 matrix products": llmcompass.leave_one_out(llmcompass.products("MI210"), "MI210"),
        **{
            f"A100 {kind}": llmcompass.leave_one_out(llmcompass.passes(kind))
            for kind in ("softmax", "layernorm", "gelu")
        },
        "all-reduce, 4x A100": llmcompass.left_out_all_reduces(),
        **{f"GPT-3 layer, {phase}": llmcompass.layer(phase) for phase in ("prefill", "decode")},
    }
    for name, rows in groups.items():
        found = re.search(rf"^\| {name} \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
        assert found, name
        errors = [row.error for row in rows]
        expected = llmcompass.mean(errors), max(map(abs, errors)), llmcompass.mean([row.roofline_error for row in rows])
        assert [float(value) for value in found.groups()] == pytest.approx(expected, abs=6e-4), name


# ---- every way ---------------------------------------------------------------------------------------------------


def test_every_way_is_there_and_says_what_it_takes() -> None:
    rows = by_name(compare_ways(task()))
    assert list(rows) == ["on_device", "sub_batches", "offload", "full_transfer", "kvpr"]
    assert "the cache needs" in rows["on_device"].problem
    for name, row in rows.items():
        if row.problem:
            continue
        assert row.total_s == pytest.approx(row.runs * (row.prefill_s + 127 * row.step_s)), name
        assert row.tokens_per_s == pytest.approx(64 * 128 / row.total_s)
        assert (row.ttft_s, row.tpot_s) == (row.prefill_s, row.step_s)
        assert 0 <= row.link_utilization <= 1
        assert 0 < row.device_utilization <= 1
        assert 0 < row.mfu < 1
        assert 0 < row.mbu <= 1.001
    assert rows["sub_batches"].runs * rows["sub_batches"].batch == 64
    assert rows["offload"].step_s < rows["kvpr"].step_s < rows["full_transfer"].step_s
    assert rows["offload"].host_bytes < rows["full_transfer"].host_bytes
    assert rows["full_transfer"].link_utilization == pytest.approx(1.0)
    assert rows["sub_batches"].link_utilization == 0.0


def test_what_fits_needs_no_parts() -> None:
    rows = by_name(compare_ways(task(workload=dataclasses.replace(BATCH, batch=4))))
    assert rows["on_device"].runs == 1
    assert rows["sub_batches"].problem == "the whole batch fits"
    alone = by_name(compare_ways(task(workload=Workload(batch=1, prompt_tokens=200_000, new_tokens=8))))
    assert alone["sub_batches"].problem == "not even one sequence fits"


def test_a_way_that_does_not_work_says_why_and_the_others_stay() -> None:
    rows = by_name(compare_ways(task(host_gib=8.0)))
    assert "host memory" in rows["full_transfer"].problem
    assert not rows["offload"].problem
    assert rows["offload"].host_bytes <= 8 * GIB


def test_shares_of_the_peaks_by_hand() -> None:
    one = task(workload=dataclasses.replace(BATCH, batch=4))
    row = by_name(compare_ways(one))["on_device"]
    weights = 32 * (4 * 4096**2 + 2 * 4096 * 16384) + 4096 * 50272
    context = 1024 + 127 // 2
    cached = 4 * context * 32 * 2 * 4096
    assert row.mbu == pytest.approx(2 * (weights + cached) / 1555e9 / row.step_s)
    step = 4 * (2 * weights + 32 * 4 * context * 4096)
    prefill = 4 * 1024 * 2 * (weights - 4096 * 50272) + 32 * 4 * 1024**2 / 2 * 4 * 4096
    assert row.mfu == pytest.approx((prefill + 127 * step) / (312e12 * row.total_s))
    parts = by_name(compare_ways(task(workload=dataclasses.replace(BATCH, batch=64))))["sub_batches"]
    assert parts.mfu == pytest.approx(16 * (prefill + 127 * step) / (312e12 * parts.total_s))  # 64 of 4 sequences


def test_money_and_carbon_follow_from_time() -> None:
    rows = by_name(compare_ways(task(), Economics(price_per_hour=3.6, power_w=250, grid_g_per_kwh=400)))
    row = rows["sub_batches"]
    decode_s = row.total_s - row.runs * row.prefill_s
    assert row.price_per_million_prompt_tokens == pytest.approx(1e-3 * row.runs * row.prefill_s / (64 * 1024) * 1e6)
    assert row.price_per_million_new_tokens == pytest.approx(1e-3 * decode_s / (64 * 128) * 1e6)
    assert row.energy_j == pytest.approx(250 * row.total_s)
    assert row.co2_g == pytest.approx(250 * row.total_s / 3.6e6 * 400)
    assert row.co2_g_per_million_new_tokens == pytest.approx(250 * decode_s / 3.6e6 * 400 / (64 * 128) * 1e6)
    bare = by_name(compare_ways(task()))["sub_batches"]
    assert bare.price_per_million_new_tokens is bare.co2_g is bare.energy_j is None
    known = Economics.of(A100, None, 400.0)
    assert (known.price_per_hour, known.power_w, known.grid_g_per_kwh) == (None, 250, 400.0)
    sheet = A100.extra["datasheet"] | {"price_per_hour": 1.25}
    priced = dataclasses.replace(A100, extra=A100.extra | {"datasheet": sheet})
    assert Economics.of(priced, None, None).price_per_hour == 1.25
    assert Economics.of(priced, 2.0, None).price_per_hour == 2.0


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), 1e9, True])
def test_absurd_prices_are_refused(wrong: float) -> None:
    for name in ("price_per_hour", "power_w", "grid_g_per_kwh"):
        with pytest.raises(ConfigError, match=name):
            Economics(**{name: wrong})


# ---- what fits, and what if --------------------------------------------------------------------------------------


def test_limits_are_the_last_sizes_that_work() -> None:
    one = task(host_gib=64.0)._replace(facts=None)  # no end of positions
    found = limits(one)

    def sized(batch: int, prompt: int) -> Task:
        return one._replace(workload=dataclasses.replace(BATCH, batch=batch, prompt_tokens=prompt))

    def on_device(it: Task) -> bool:
        return it.resident_bytes(it.workload.batch) <= it.free_bytes(it.workload.batch)

    def offloaded(it: Task) -> bool:
        try:
            planner.solve(it.inputs(it.workload.cached_tokens))
        except InfeasiblePlanError:
            return False
        return True

    for works, batch, prompt in (
        (on_device, found.largest_batch_on_device, found.longest_prompt_on_device),
        (offloaded, found.largest_batch_offloaded, found.longest_prompt_offloaded),
    ):
        assert works(sized(batch, 1024))
        assert not works(sized(batch + 1, 1024))
        assert works(sized(64, prompt))
        assert not works(sized(64, prompt + 64))
    assert (found.host_bytes, found.host_is_known) == (64 * GIB, True)
    assert found.largest_batch_offloaded > 2 * found.largest_batch_on_device > 0


def test_limits_end_where_the_models_positions_do_and_where_host_memory_does() -> None:
    config = LLAMA_2_7B | {"max_position_embeddings": 4096}
    found = limits(task_of(config, BATCH, A100, OffloadConfig()))
    assert found.most_positions == found.longest_prompt_offloaded == 4096 - BATCH.new_tokens
    assert (found.host_bytes, found.host_is_known) == (256 * 10**9, False)
    row_bytes = 32 * 2 * 4096 * 2 * BATCH.cached_tokens  # layers, keys and values, two bytes each
    on_host = (found.largest_batch_offloaded - found.largest_batch_on_device) * row_bytes
    assert 200e9 < on_host < 2 * 256e9  # as activations it is half
    by_bits = {one.weight_bits: one.longest_prompt for one in found.on_device_by_bits}
    assert by_bits.keys() == {8, 4}
    assert found.longest_prompt_on_device < by_bits[8] < by_bits[4]
    narrow = limits(task_of(config, BATCH, A100, OffloadConfig(), w_bits=4.5))
    assert narrow.longest_prompt_on_device == by_bits[4]
    assert narrow.on_device_by_bits == ()


def test_limits_without_end_are_the_largest_searched_and_impossible_ones_zero() -> None:
    endless = {name: value for name, value in LLAMA_2_7B.items() if name != "max_position_embeddings"}
    one = task_of(endless, dataclasses.replace(BATCH, batch=1), A100, OffloadConfig(host_gib=1e7))
    found = limits(one._replace(facts=dataclasses.replace(one.facts, position_limit=None)))
    assert found.longest_prompt_offloaded == MAX_SEARCHED
    small = what_if(A100, device_memory_bytes=14.5e9)
    found = limits(task(profile=small, workload=dataclasses.replace(BATCH, batch=400)))
    assert found.longest_prompt_on_device == 0


def test_a_size_at_which_nothing_works_has_no_figures_in_json() -> None:
    cells = (BestAtSize(1, 128, None, 0.0, 0.0, 0.0), BestAtSize(1, 64, "on_device", 1.0, 2.0, 3.0))
    told = Overview((), limits(task()), cells).to_json()["sweep"]
    assert told[0] == {"batch": 1, "prompt_tokens": 128} | dict.fromkeys(
        ("name", "tpot_s", "tokens_per_s", "offload_tokens_per_s")
    )
    assert told[1] == cells[1]._asdict()


def test_a_sweep_names_the_fastest_way_at_every_size() -> None:
    found = overview(task(), Economics(), Grid([1, 64], [1024, 200_000]))
    cells = {(cell.batch, cell.prompt_tokens): cell for cell in found.cells}
    assert cells[1, 1024].name == "on_device"
    assert cells[64, 1024].name == "sub_batches"
    assert cells[1, 200_000].name == "drafts"
    assert cells[1, 200_000].tokens_per_s == cells[1, 200_000].offload_tokens_per_s
    rows = by_name(compare_ways(task()))
    assert cells[64, 1024].tokens_per_s == rows["sub_batches"].tokens_per_s
    assert cells[64, 1024].offload_tokens_per_s == rows["offload"].tokens_per_s


@pytest.mark.parametrize(
    ("text", "name", "bytes_per_s", "latency_s"),
    [
        ("pcie3", "PCIe 3.0 x16", 12.5e9, 0.0),
        ("PCIe5x8", "PCIe 5.0 x8", 27.5e9, 0.0),
        ("pcie6x16", "PCIe 6.0 x16", 110e9, 0.0),
        ("nvlink-c2c", "NVLink-C2C", 375e9, 0.0),
        ("cxl", "CXL 2.0 memory x8", 26e9, 1e-6),
        ("cxlx4", "CXL 2.0 memory x4", 13e9, 1e-6),
        ("3GB/s+100us", "3GB/s+100us", 3e9, 1e-4),
        ("0.5 GB/s + 2ms", "0.5 GB/s + 2ms", 0.5e9, 2e-3),
    ],
)
def test_a_link_by_its_short_name(text: str, name: str, bytes_per_s: float, latency_s: float) -> None:
    assert link_named(text)[:3] == (name, pytest.approx(bytes_per_s), pytest.approx(latency_s))
    profile = what_if(A100, link=text)
    assert profile.h2d is not None
    assert profile.h2d.seconds(2**24) == pytest.approx(latency_s + 2**24 / bytes_per_s, rel=1e-6)
    assert profile.link_name == name
    assert profile.h2d.provenance == "assumed"
    assert profile.gemm == A100.gemm


@pytest.mark.parametrize("text", ["pcie7", "pcie5x3", "nvlink-c2cx4", "0GB/s", "-3GB/s", "3GB", "3GB/s+1h", ""])
def test_an_unknown_link_lists_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError, match="known: pcie3, pcie4.*3GB/s"):
        what_if(A100, link=text)


def test_a_faster_link_and_a_larger_device_never_make_it_slower() -> None:
    steps = [
        by_name(compare_ways(task(profile=what_if(A100, link=f"pcie{n}"))))["full_transfer"].step_s
        for n in (3, 4, 5, 6)
    ]
    assert steps == sorted(steps, reverse=True)
    larger = what_if(A100, device_memory_bytes=80e9)
    assert by_name(compare_ways(task(profile=larger)))["on_device"].problem == ""
    for wrong in (40.0, -1.0, float("nan"), 1e20):
        with pytest.raises(ConfigError, match="makes no sense"):
            what_if(A100, device_memory_bytes=wrong)


# ---- the command -------------------------------------------------------------------------------------------------


def run_plan(*arguments: object) -> Result:
    base = ["plan", "--config", CONFIGS / "opt-6.7b.json", "--hardware", "a100-40gb-pcie4", "--batch", 64]
    return run(*base, *arguments)


def test_the_command_shows_ways_limits_and_a_sweep() -> None:
    options = ("--price-per-hour", 1.5, "--grid-g-per-kwh", 400, "--sweep", "1,64:1024,4096", "--link", "pcie5")
    result = run_plan(*options)
    assert result.exit_code == 0, result.output
    assert "4096 tokens" in result.output
    assert "Largest batch" not in result.output  # the sweep alone
    whole = run_plan(*options[:4], "--link", "pcie5").output
    assert "PCIe 5.0 x16" in whole
    assert "Largest batch with these prompts: " in whole
    assert "no offload: the cache needs" in whole
    data = json.loads(run_plan(*options, "--json").output)
    assert [row["name"] for row in data["forecast"]][2] == "offload"
    assert data["forecast"][1]["price_per_million_new_tokens"] > 0
    assert data["forecast"][1]["co2_g"] > 0
    assert len(data["sweep"]) == 4
    assert data["limits"]["largest_batch_on_device"] > 0
    assert data["recommendation"]
    assert json.loads(run_plan("--device-memory", 80, "--json").output)["alternatives"][0]["way"] == "on_device"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--link", "pcie9"], "unknown link 'pcie9'"),
        (["--device-memory", -3], "--device-memory must be a number of GB from 0.1 to 100000, got -3.0"),
        (["--price-per-hour", -1], "--price-per-hour"),
        (["--grid-g-per-kwh", -1], "--grid-g-per-kwh"),
        (["--sweep", "1,2"], "a sweep is batches and prompts"),
        (["--sweep", "1,x:5"], "a sweep is batches and prompts"),
        (["--sweep", "0:5"], "go from 1"),
    ],
)
def test_a_bad_request_is_one_line(arguments: list[object], message: str) -> None:
    result = run_plan(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_sweep_is_an_empty_one() -> None:
    assert grid(None) == Grid([], [])
    assert grid("1,8:1024") == Grid([1, 8], [1024])


@pytest.mark.parametrize("batch", range(13, 20))
def test_auto_is_never_foreseen_to_be_slower_than_full_transfer(batch: int) -> None:
    """On a device this small the memory for recomputing is missed by resident blocks."""
    small = HardwareProfile.preset("l4-24gb-pcie4")
    workload = dataclasses.replace(BATCH, batch=batch)
    rows = by_name(compare_ways(task(workload=workload, profile=small)))
    assert rows["offload"].tokens_per_s >= rows["full_transfer"].tokens_per_s > 0
    advice = advise(CONFIGS / "opt-6.7b.json", workload, small, OffloadConfig())
    alone = advise(CONFIGS / "opt-6.7b.json", workload, small, OffloadConfig(split="transfer"))
    assert advice.plan.full_transfer_step_s == alone.plan.predicted_step_s
    ours, plain = (next(way for way in one.alternatives if way.way == "offload") for one in (advice, alone))
    assert ours.total_s <= plain.total_s
