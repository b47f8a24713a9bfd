"""What is recommended, for which reason, and that the numbers behind it agree with the plan's."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import closed_forms
import pytest
import torch
from configs import CONFIGS, LLAMA_2_7B
from models import make_model

from kvoffload.advise.advice import advise, advised_plan
from kvoffload.advise.answer import placement
from kvoffload.advise.task import Task
from kvoffload.config import GIB, EmulatedLink, OffloadConfig
from kvoffload.errors import InfeasiblePlanError, ProfileError, UnsupportedModelError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.model_shape import model_shape
from kvoffload.planning import planner
from kvoffload.planning.workload import Workload
from kvoffload.profiler.profile import with_link
from kvoffload.units import count, duration

LLAMA_3_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
RECORDED = Path(__file__).parent / "data" / "profile_emulated_2_threads.json"
A100 = HardwareProfile.preset("a100-40gb-pcie4")
LONG = Workload(batch=1, prompt_tokens=100_000, new_tokens=200)
LARGE_BATCH = Workload(batch=100, prompt_tokens=1024, new_tokens=128)
SMALL = Workload(batch=1, prompt_tokens=1024, new_tokens=128)


def slower_device(profile: HardwareProfile, factor: float) -> HardwareProfile:
    """The same machine with a device that computes and reads its memory slower, and the same link."""

    def slower(curve: Any) -> Any:
        points = tuple(point._replace(seconds=point.seconds * factor) for point in curve.points)
        return dataclasses.replace(curve, points=points)

    return dataclasses.replace(
        profile,
        gemm=slower(profile.gemm),
        attention=slower(profile.attention),
        device_copy_bytes_per_s=profile.device_copy_bytes_per_s / factor,
    )


@pytest.mark.parametrize(
    ("name", "limit"), [("opt-6.7b", 2048), ("llama-2-7b", 4096), ("qwen3-8b", 40960), ("gpt2", 1024)]
)
def test_more_tokens_than_the_model_has_positions_for_are_told(name: str, limit: int) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text()) if name != "gpt2" else GPT2
    fits, beyond = (Workload(batch=1, prompt_tokens=limit - 100, new_tokens=new) for new in (100, 101))
    assert "positions" not in advised_plan(config, fits, A100, OffloadConfig()).recommendation
    text = advised_plan(config, beyond, A100, OffloadConfig()).recommendation
    assert text.endswith(
        f"But prompt and new tokens make {count(limit + 1)}, and the model's configuration has positions for "
        f"{count(limit)}."
    )


def test_a_limit_of_positions_is_the_configurations_own_where_it_has_one() -> None:
    scaled = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}
    told = "has positions for 4096."
    config = LLAMA_2_7B | scaled | {"max_position_embeddings": 4096}
    assert advised_plan(config, LONG, A100, OffloadConfig()).recommendation.endswith(told)
    model = make_model("llama", max_position_embeddings=4096)
    assert advised_plan(model, LONG, A100, OffloadConfig()).recommendation.endswith(told)
    nested = {"text_config": config}
    assert told in advised_plan(nested, LONG, A100, OffloadConfig()).recommendation
    for unlimited in ({}, {"max_position_embeddings": -1}):
        assert "positions" not in advised_plan(LLAMA_2_7B | unlimited, LONG, A100, OffloadConfig()).recommendation


def test_what_fits_on_the_device_is_not_to_be_offloaded() -> None:
    advice = advise(LLAMA_2_7B, SMALL, A100, OffloadConfig())
    assert advice.best.way == "on_device"
    assert advice.plan.recommendation.startswith("Do not offload: ")
    assert "so it fits" in advice.plan.recommendation
    assert advice.best.step_s <= advice.alternatives[1].step_s


def test_a_batch_that_does_not_fit_is_better_run_in_parts_that_do() -> None:
    advice = advise(LLAMA_2_7B, LARGE_BATCH, A100, OffloadConfig())
    assert advice.best.way == "sub_batches"
    assert advice.best.runs * advice.best.batch >= LARGE_BATCH.batch
    assert (advice.best.runs - 1) * advice.best.batch < LARGE_BATCH.batch
    assert "unless the batch must stay together" in advice.plan.recommendation
    assert f"{advice.best.runs} runs of {advice.best.batch}" in advice.answer.details
    assert f"but batches of {advice.best.batch} fit" in advice.answer.verdict


def test_sub_batches_are_the_fewest_runs_that_fit_in_equal_parts() -> None:
    task = Task(model_shape(LLAMA_2_7B), LARGE_BATCH, A100, OffloadConfig())
    chosen = task.on_device()
    assert chosen is not None
    larger = -(-LARGE_BATCH.batch // (chosen.runs - 1))  # the batch that one run fewer would need
    assert task.resident_bytes(larger) > task.free_bytes(larger)
    assert task.resident_bytes(chosen.batch) <= task.free_bytes(chosen.batch)
    assert chosen.device_bytes <= A100.device_memory_bytes


def test_blocks_and_sequences_are_told_in_their_number() -> None:
    advice = advise(LLAMA_2_7B, LONG, A100, OffloadConfig())
    places = {"resident_kv": 0, "resident_activation": 1, "kv": 1, "activation": 1}
    text = placement(dataclasses.replace(advice.plan, blocks=places), advice.best)
    assert "1 stays on the device as activations, 1 is transferred as K/V, 1 is transferred as activations and" in text
    text = placement(dataclasses.replace(advice.plan, blocks=dict.fromkeys(places, 2)), advice.best)
    assert "2 stay on the device as K/V, 2 stay on the device as activations, 2 are transferred as K/V" in text
    one = Workload(batch=2, prompt_tokens=32768, new_tokens=128)
    assert "but one sequence alone fits." in advise(LLAMA_2_7B, one, A100, OffloadConfig()).plan.recommendation


def test_one_context_too_long_for_the_device_is_offloaded() -> None:
    advice = advise(LLAMA_2_7B, LONG, A100, OffloadConfig(speculate="off"))
    assert [one.way for one in advice.alternatives] == ["offload"]
    assert advice.plan.recommendation.startswith("Offload: ")
    assert "not even one sequence fits" in advice.plan.recommendation
    assert advice.plan.activation_blocks + advice.plan.resident_activation_blocks > 0
    assert advice.plan.is_segmented
    assert advice.plan.predicted_step_s < advice.plan.full_transfer_step_s


def test_sub_batches_are_not_recommended_where_offloading_ends_first() -> None:
    # four sequences of which three fit: two runs on a slow device against one whose link hides behind it
    workload = Workload(batch=4, prompt_tokens=1024, new_tokens=512)
    profile = slower_device(A100, 40)
    task = Task(model_shape(LLAMA_3_8B), workload, profile, OffloadConfig())
    gib = task.resident_bytes(3) / GIB
    advice = advise(LLAMA_3_8B, workload, profile, OffloadConfig(device_gib=gib))
    assert [one.way for one in advice.alternatives] == ["offload", "sub_batches"]
    assert advice.plan.recommendation.startswith("Offload: ")
    assert "2 runs of 2" in advice.answer.verdict


@pytest.mark.parametrize("workload", [SMALL, LONG, LARGE_BATCH], ids=["small", "long", "large batch"])
@pytest.mark.parametrize("config", [LLAMA_2_7B, LLAMA_3_8B], ids=["MHA", "GQA"])
def test_the_way_that_ends_first_is_the_one_recommended(workload: Workload, config: dict[str, Any]) -> None:
    advice = advise(config, workload, A100, OffloadConfig())
    totals = [one.total_s for one in advice.alternatives]
    assert totals == sorted(totals)
    assert advice.plan.recommendation.startswith("Offload") == (advice.best.way in ("offload", "drafts"))
    for one in advice.alternatives:
        assert one.total_s == pytest.approx(one.runs * (one.prefill_s + (workload.new_tokens - 1) * one.step_s))
        assert one.tokens_per_s == pytest.approx(workload.batch * workload.new_tokens / one.total_s)


def test_steps_on_average_and_at_full_length_are_told_apart() -> None:
    advice = advise(LLAMA_2_7B, LARGE_BATCH, A100, OffloadConfig())
    on_device, offload = advice.alternatives
    mean, last = duration(offload.step_s), duration(advice.plan.predicted_step_s)
    assert offload.step_s < advice.plan.predicted_step_s
    assert f"a step takes {mean} on average, {last} at full length" in advice.answer.details
    assert f"a step takes {duration(on_device.step_s)} on average" in advice.answer.details


def test_the_plan_is_the_planners_for_the_full_length() -> None:
    task = Task(model_shape(LLAMA_2_7B), LONG, A100, OffloadConfig())
    chosen = advised_plan(LLAMA_2_7B, LONG, A100, OffloadConfig())
    alone = planner.solve(task._replace(config=OffloadConfig(split="transfer")).inputs(LONG.cached_tokens))
    expected = planner.solve(task.inputs(LONG.cached_tokens))
    expected = dataclasses.replace(expected, full_transfer_step_s=alone.predicted_step_s)
    assert dataclasses.replace(chosen, recommendation="") == expected
    assert chosen.num_blocks * chosen.block_tokens == LONG.cached_tokens // chosen.block_tokens * chosen.block_tokens
    assert chosen.device_bytes <= A100.device_memory_bytes


def test_a_grouped_query_model_recomputes_nothing() -> None:
    chosen = advised_plan(LLAMA_3_8B, Workload(batch=1, prompt_tokens=400_000, new_tokens=100), A100, OffloadConfig())
    assert chosen.kv_blocks > 0
    assert chosen.activation_blocks == chosen.resident_activation_blocks == 0


def test_the_users_choices_are_kept() -> None:
    config = OffloadConfig(split="transfer", device_gib="min", block_tokens=16, chunk_blocks=4, slots=3)
    chosen = advised_plan(LLAMA_2_7B, LONG, A100, config)
    assert chosen.activation_blocks == chosen.resident_kv_blocks == chosen.resident_activation_blocks == 0
    assert (chosen.block_tokens, chosen.chunk_blocks) == (16, 4)
    capped = advised_plan(LLAMA_2_7B, LONG, A100, OffloadConfig(device_gib=6.0))
    assert capped.device_bytes <= 6 * GIB
    assert capped.resident_activation_blocks + capped.resident_kv_blocks > 0


def test_beams_multiply_the_rows_and_stay_together() -> None:
    beams = Workload(batch=2, prompt_tokens=4096, new_tokens=64, num_beams=4)
    rows = Workload(batch=8, prompt_tokens=4096, new_tokens=64)
    one, other = (advised_plan(LLAMA_2_7B, work, A100, OffloadConfig()) for work in (beams, rows))
    assert one.bytes_per_token["kv"] == other.bytes_per_token["kv"]
    advice = advise(LLAMA_2_7B, beams, A100, OffloadConfig())
    assert {alternative.batch for alternative in advice.alternatives} <= {1, 2}


def test_too_little_host_memory_says_what_would_work_instead() -> None:
    with pytest.raises(InfeasiblePlanError, match="host memory") as caught:
        advise(LLAMA_2_7B, LARGE_BATCH, A100, OffloadConfig(host_gib=1.0))
    assert re.search(r"Without offloading: on the device in \d+ runs of \d+", str(caught.value))
    with pytest.raises(InfeasiblePlanError) as caught:
        advise(LLAMA_2_7B, LONG, A100, OffloadConfig(host_gib=1.0))
    assert "Without offloading" not in str(caught.value)


def test_the_host_of_the_profile_limits_the_cache() -> None:
    small_host = dataclasses.replace(A100, extra=A100.extra | {"host_memory_bytes": 2 * 10**9})
    with pytest.raises(InfeasiblePlanError, match="host memory"):
        advised_plan(LLAMA_2_7B, LONG, small_host, OffloadConfig())


WHOLE = OffloadConfig(device_weights_gib="all")  # weights are not streamed


def test_weights_larger_than_the_device_are_a_clear_error() -> None:
    small = dataclasses.replace(A100, device_memory_bytes=8 * 10**9)
    with pytest.raises(InfeasiblePlanError, match=r"13\.48 GB.*8\.00 GB"):
        advised_plan(LLAMA_2_7B, SMALL, small, WHOLE)


@pytest.mark.parametrize(("memory_bytes", "batch"), [(8 * 10**9, 64), (13_490 * 10**6, 1), (13_490 * 10**6, 64)])
def test_a_smaller_batch_is_no_way_out_where_one_sequence_does_not_fit_either(memory_bytes: int, batch: int) -> None:
    small = dataclasses.replace(A100, device_memory_bytes=memory_bytes)
    with pytest.raises(InfeasiblePlanError, match=r": use a larger device or quantised weights\. What") as caught:
        advised_plan(LLAMA_2_7B, dataclasses.replace(SMALL, batch=batch), small, WHOLE)
    assert "this with weights in 4 bits" in str(caught.value)


def test_a_smaller_batch_is_a_way_out_where_one_sequence_fits() -> None:
    small = dataclasses.replace(A100, device_memory_bytes=14_500 * 10**6)
    with pytest.raises(InfeasiblePlanError, match="or a smaller batch"):
        advised_plan(LLAMA_2_7B, LARGE_BATCH, small, WHOLE)
    assert Task(model_shape(LLAMA_2_7B), SMALL, small, OffloadConfig()).free_bytes(1) > 0


def test_a_link_without_a_speed_cannot_be_planned_with() -> None:
    recorded = HardwareProfile.load(RECORDED)
    for split in ("auto", "transfer"):
        with pytest.raises(ProfileError, match="unpaced"):
            advised_plan(LLAMA_2_7B, SMALL, with_link(recorded, EmulatedLink()), OffloadConfig(split=split))
    paced = with_link(recorded, EmulatedLink(h2d_gb_per_s=2.0))
    advised_plan(LLAMA_2_7B, SMALL, dataclasses.replace(paced, device_memory_bytes=40 * 10**9), OffloadConfig())


def test_a_model_without_a_growing_cache_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to offload"):
        advised_plan(LLAMA_2_7B | {"sliding_window": 1024}, SMALL, A100, OffloadConfig())


def test_layers_with_a_window_take_device_memory_only_for_the_window() -> None:
    mixed = LLAMA_2_7B | {"layer_types": ["sliding_attention", "full_attention"] * 16, "sliding_window": 1000}
    task = Task(model_shape(mixed), LONG, A100, OffloadConfig())
    row = 2 * 4096 * 2
    assert task.resident_bytes(1) == 17 * LONG.cached_tokens * row + 16 * 1000 * row


def test_a_models_own_parameters_and_dtype_count() -> None:
    model = make_model("llama")
    model.lm_head = torch.nn.Linear(10, 1, bias=False)
    others = sum(parameter.numel() for parameter in model.model.parameters())
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        shape = model_shape(model.to(dtype))
        assert shape.weight_bytes == (others + 10) * itemsize
        assert shape.kv_itemsize_bytes == itemsize


def test_the_prediction_on_the_device_has_no_link_in_it() -> None:
    task = Task(model_shape(LLAMA_2_7B), SMALL, A100, OffloadConfig())
    one = task.on_device()
    assert one is not None
    inputs = task.inputs(SMALL.prompt_tokens + 63, 1)
    tail_tokens = SMALL.prompt_tokens + 63 - inputs.num_blocks * inputs.block_tokens
    assert tail_tokens > 0
    attended_s = 32 * tail_tokens * inputs.rates.attention_s_per_token
    assert one.step_s == max(closed_forms.device_s(inputs, 0, 0) + attended_s, closed_forms.host_s(inputs, 0, 0))


def test_advice_is_plain_data_with_the_plan_in_it() -> None:
    data = advise(LLAMA_2_7B, LARGE_BATCH, A100, OffloadConfig()).to_json()
    assert json.loads(json.dumps(data)) == data
    assert data["recommendation"]
    assert data["split_fraction"] >= 0
    assert data["alternatives"][0]["way"] == "sub_batches"
