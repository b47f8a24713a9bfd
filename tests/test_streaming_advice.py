"""What `plan` says where the weights do not fit: how many layers stay, which batch pays, and what 4 bits would do."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from configs import CONFIGS

from kvoffload import InfeasiblePlanError, OffloadConfig, Workload
from kvoffload.advise.advice import advise, task_of
from kvoffload.advise.comparison import compare_ways
from kvoffload.advise.streaming import best_batch, quantised_way, streams_weights
from kvoffload.advise.task import Task
from kvoffload.advise.verdict import judge
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.planning import planner
from kvoffload.planning.weights import WeightSizes

ROOT = Path(__file__).parents[1]


def config(name: str, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return found | changes


OPT_30B = config(
    "opt-6.7b",
    hidden_size=7168,
    ffn_dim=4 * 7168,
    word_embed_proj_dim=7168,
    num_attention_heads=56,
    num_hidden_layers=48,
)
MIXTRAL = config("mixtral-8x7b")


def task(model: dict[str, Any], preset: str, batch: int, prompt: int = 512, **options: Any) -> Task:
    workload = Workload(batch=batch, prompt_tokens=prompt, new_tokens=32)
    return task_of(model, workload, HardwareProfile.preset(preset), OffloadConfig(**options))


CELLS = [
    (OPT_30B, "a100-40gb-pcie4", 64, 1024),
    (OPT_30B, "rtx4090-24gb-pcie4", 4, 2000),
    (MIXTRAL, "a100-40gb-pcie4", 16, 2048),
    (MIXTRAL, "l4-24gb-pcie4", 128, 512),
]


@pytest.mark.parametrize(("model", "preset", "batch", "prompt"), CELLS)
def test_no_other_number_of_layers_that_stay_is_predicted_to_be_faster(
    model: dict[str, Any], preset: str, batch: int, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = task(model, preset, batch, prompt, speculate="off")
    kept = asked.kept_layers(batch)
    assert kept is not None
    chosen_s = planner.solve(asked.inputs(asked.mean_tokens())).predicted_step_s
    for other in {0, kept // 4, kept // 2, 3 * kept // 4} - {kept}:
        monkeypatch.setattr(Task, "kept_layers", lambda self, rows, other=other: other)
        assert chosen_s <= 1.01 * planner.solve(asked.inputs(asked.mean_tokens())).predicted_step_s


@pytest.mark.parametrize(("model", "preset", "batch", "prompt"), CELLS)
def test_the_plan_charges_weights_to_the_link_and_to_the_device(
    model: dict[str, Any], preset: str, batch: int, prompt: int
) -> None:
    asked = task(model, preset, batch, prompt)
    found = advise(model, asked.workload, asked.profile, asked.config)
    sizes, kept = asked.weight_sizes, asked.kept_layers(batch)
    assert kept is not None
    assert found.plan.weight_bytes_per_step == sizes.streamed_bytes(kept)
    assert found.plan.weight_device_bytes == sizes.device_bytes(kept) - sizes.outside
    link_s = found.plan.link_bytes_per_step / asked.profile.h2d.points[-1].x[0] * asked.profile.h2d.points[-1].seconds  # type: ignore[union-attr]
    assert found.plan.predicted_step_s >= 0.99 * link_s
    assert found.best.device_bytes <= asked.profile.device_memory_bytes
    assert sizes.outside + sum(sizes.layers) == pytest.approx(asked.shape.weight_bytes, rel=1e-6)


def test_recomputation_hides_under_the_weights_of_a_multi_head_model() -> None:
    ways = {row.name: row for row in compare_ways(task(OPT_30B, "a100-40gb-pcie4", 128, speculate="off"))}
    assert ways["offload"].tokens_per_s >= 1.3 * ways["full_transfer"].tokens_per_s
    assert ways["offload"].tokens_per_s >= 1.1 * ways["kvpr"].tokens_per_s


def test_the_link_is_busy_with_weights() -> None:
    ways = {row.name: row for row in compare_ways(task(MIXTRAL, "l4-24gb-pcie4", 64, speculate="off"))}
    assert ways["offload"].link_utilization > 0.95
    assert ways["offload"].host_bytes > 80e9


def test_weights_that_fit_are_not_streamed() -> None:
    asked = task(config("llama-3.1-8b"), "rtx4090-24gb-pcie4", 4)
    assert not streams_weights(asked)
    assert advise(config("llama-3.1-8b"), asked.workload, asked.profile, asked.config).plan.weight_bytes_per_step == 0
    forced = task(config("llama-3.1-8b"), "rtx4090-24gb-pcie4", 4, device_weights_gib=8)
    assert streams_weights(forced)
    assert forced.device_weight_bytes <= 8 * 2**30
    assert not streams_weights(task(MIXTRAL, "l4-24gb-pcie4", 4, device_weights_gib="all"))


def test_the_recommended_batch_comes_close_to_the_most_tokens_per_second() -> None:
    asked = task(MIXTRAL, "a100-40gb-pcie4", 1)
    best = best_batch(asked)
    assert best is not None
    assert best.batch >= 256
    assert best.found.tokens_per_s > 50 * judge(asked).tokens_per_s
    larger = replace(asked.workload, batch=2 * best.batch)
    more = {row.name: row for row in compare_ways(asked._replace(workload=larger))}["offload"]
    assert more.problem or best.found.tokens_per_s >= 0.9 * more.tokens_per_s or best.batch * 2 > 1024


def test_weights_of_four_bits_are_named_where_they_fit_and_where_they_do_not() -> None:
    fits, not_even = task(MIXTRAL, "a100-40gb-pcie4", 64), task(MIXTRAL, "l4-24gb-pcie4", 64)
    found = quantised_way(fits)
    assert found is not None
    assert found.tokens_per_s > judge(fits).tokens_per_s
    assert quantised_way(not_even) is None
    said = advise(MIXTRAL, fits.workload, fits.profile, fits.config).plan.recommendation
    assert said.startswith("Stream the weights")
    assert "weights in 4 bits (4.5 with scales) do" in said
    assert "instead of" in said
    said = advise(MIXTRAL, not_even.workload, not_even.profile, not_even.config).plan.recommendation
    assert "4 bits do not fit either" in said


def test_the_verdict_is_a_rate_and_a_batch() -> None:
    found = judge(task(MIXTRAL, "l4-24gb-pcie4", 64))
    assert found.answer == "stream"
    assert 0 < found.tokens_per_s < found.best_tokens_per_s
    assert found.best_batch > 64


def test_weights_that_fit_nowhere_are_refused_with_the_memory_and_the_numbers() -> None:
    profile = HardwareProfile.preset("l4-24gb-pcie4")
    small_host = replace(profile, extra={**profile.extra, "host_memory_bytes": 64 * 10**9})
    workload = Workload(batch=1, prompt_tokens=512, new_tokens=32)
    with pytest.raises(InfeasiblePlanError, match=r"host memory: weights of 9\d.* do not fit on the device, and not"):
        advise(MIXTRAL, workload, small_host, OffloadConfig())
    small_device = replace(profile, device_memory_bytes=2 * 10**9)
    with pytest.raises(InfeasiblePlanError, match=r"device memory: weights of .* \(others are streamed\)"):
        advise(MIXTRAL, workload, small_device, OffloadConfig())


def test_the_layers_of_a_budget_are_spread_evenly() -> None:
    sizes = WeightSizes(outside=10, layers=(4,) * 12)
    assert sizes.least == 18
    assert sizes.num_resident(17) == -1
    assert [sizes.num_resident(budget) for budget in (18, 21, 22, 57, 58)] == [0, 0, 1, 9, 12]
    assert sizes.resident(4) == (0, 3, 6, 9)
    assert sizes.device_bytes(4) == 10 + 16 + 8
    assert sizes.streamed_bytes(4) == 32


def test_the_table_of_the_page_is_what_plan_predicts() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "plan_weights.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
