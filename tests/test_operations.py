"""Operations of a forward pass, counted by hand and by another tool."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from configs import LLAMA_2_13B
from toys import TOY, machine, model

from kvoffload.advise.roofline import evaluate
from kvoffload.advise.timing import RooflineSetting
from kvoffload.machine.machine import find_machine
from kvoffload.model.operations import SOFTMAX_FLOPS, Operation, Precision, forward
from kvoffload.model.shape import shape_of

DATA = Path(__file__).parent / "data"
VIEWER = {  # case: model, hardware, batch, tokens
    "llama2-7b_A6000_b1_s2048_fp16": ("llama-2-7b", "a6000-48gb-pcie4", 1, 2048),
    "opt-6.7b_A100_b32_s1024_fp16": ("opt-6.7b", "a100-40gb-pcie4", 32, 1024),
    "llama2-13b_A100_b32_s1024_fp16": (LLAMA_2_13B, "a100-40gb-pcie4", 32, 1024),
}


def operations(found: list[Operation]) -> dict[str, Operation]:
    return {one.name: one for one in found}


@pytest.mark.parametrize("case", VIEWER)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_totals_are_the_corrected_ones_of_llm_viewer(case: str, phase: str) -> None:
    name, hardware, batch, seq = VIEWER[case]
    expected = json.loads((DATA / "llmviewer" / "totals.json").read_text())[case]["corrected"][phase]
    setting = RooflineSetting(batch=batch, seq=seq, convention="unfused")
    totals = evaluate(model(name), find_machine(hardware), setting).to_json()[phase]
    for field in ("OPs", "memory_access", "load_weight", "load_kv_cache"):
        assert totals[field] == expected[field]
    assert totals["inference_time"] == pytest.approx(
        expected["inference_time"], rel=0.0005
    )  # its A6000 is 155, not 154.8


def test_every_operation_of_a_decode_step_by_hand() -> None:
    found = operations(forward(model(TOY), Precision(), batch=7, queries=1, context=11))
    assert found["q_proj"] == Operation("q_proj", "gemm", 3, 2 * 7 * 24 * 84, 16, 2 * 24 * 84, 2 * 7 * 24, 2 * 7 * 84)
    assert found["k_proj"] == Operation(
        "k_proj", "gemm", 3, 2 * 7 * 24 * 28, 16, 2 * 24 * 28, 2 * 7 * 24, 0.0, 0.0, 2 * 7 * 28
    )
    scores = 7 * 6 * 11
    assert found["attention"] == Operation(
        "attention",
        "attention",
        3,
        scores * (2 * 14 + 2 * 14 + 5),
        16,
        0.0,
        2 * 7 * 84,
        2 * 7 * 84,
        2 * 2 * 7 * 11 * 2 * 14,
    )
    assert found["mlp_act"][3:8] == (2 * 7 * 50, 16, 0.0, 2 * 2 * 7 * 50, 2 * 7 * 50)
    assert found["norm"][2:8] == (6, 7 * 7 * 24, 16, 0.0, 2 * 7 * 24, 2 * 7 * 24)
    assert found["add"][2:8] == (6, 7 * 24, 16, 0.0, 2 * 2 * 7 * 24, 2 * 7 * 24)
    assert found["lm_head"] == Operation(
        "lm_head", "gemm", 1, 2 * 7 * 24 * 101, 16, 2 * 24 * 101, 2 * 7 * 24, 2 * 7 * 101
    )


def test_a_prompt_attends_causally_and_only_its_last_token_meets_the_head() -> None:
    found = operations(forward(model(TOY), Precision(), batch=7, queries=11, context=11))
    assert found["attention"].flops == 7 * 6 * (11 * 12 / 2) * 61
    assert found["up_proj"].flops == 2 * 7 * 11 * 24 * 50
    assert found["lm_head"].flops == 2 * 7 * 24 * 101


def test_unfused_attention_writes_its_scores_and_attends_to_the_whole_prompt() -> None:
    found = operations(forward(model(TOY), Precision(), batch=7, queries=11, context=11, convention="unfused"))
    pairs = 7 * 6 * 11 * 11
    assert found["qk_matmul"].flops == 2 * pairs * 14
    assert found["qk_matmul"].written_bytes == found["softmax"].read_bytes == found["sv_matmul"].read_bytes == 2 * pairs
    assert found["softmax"].flops == 5 * pairs
    assert found["sv_matmul"].kv_read_bytes == 2 * 7 * 11 * 2 * 14
    assert "attention" not in found


def test_bits_scale_what_they_are_the_width_of() -> None:
    precision = Precision(weight_bits=4.5, activation_bits=8, kv_bits=2)
    wide, narrow = (
        operations(forward(model(TOY), one, batch=7, queries=1, context=11)) for one in (Precision(), precision)
    )
    assert narrow["q_proj"].weight_bytes == wide["q_proj"].weight_bytes * 4.5 / 16
    assert narrow["q_proj"].read_bytes == wide["q_proj"].read_bytes / 2
    assert narrow["k_proj"].kv_written_bytes == wide["k_proj"].kv_written_bytes / 8
    assert narrow["attention"].kv_read_bytes == wide["attention"].kv_read_bytes / 8
    assert (narrow["q_proj"].bits, narrow["attention"].bits) == (8, 8)


def test_a_window_bounds_what_its_layers_attend_to() -> None:
    mixed = TOY | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}
    dims = model(mixed)
    found = operations(forward(dims, Precision(), batch=1, queries=1, context=11))
    assert (found["attention"].layers, found["attention (window)"].layers) == (1, 2)
    assert found["attention (window)"].kv_read_bytes == found["attention"].kv_read_bytes / 11 * 4
    prompt = operations(forward(dims, Precision(), batch=1, queries=11, context=11))
    assert prompt["attention (window)"].flops == 6 * (4 * 5 / 2 + 7 * 4) * 61
    whole = evaluate(dims, machine(), RooflineSetting(batch=2, seq=11, new_tokens=3))
    assert whole.kv_bytes == 2 * (13 + 2 * 4) * 2 * 2 * 14 * 2


def test_few_tokens_reach_few_experts_and_many_reach_all() -> None:
    dims = model("mixtral-8x7b")
    weights = 4096 * 2 * 14336 * 2

    def expert(tokens: int) -> Operation:
        return operations(forward(dims, Precision(), batch=tokens, queries=1, context=9))["experts.gate_up_proj"]

    assert expert(1).weight_bytes == pytest.approx(2 * weights)
    assert 2 * weights < expert(2).weight_bytes < 4 * weights
    assert expert(200).weight_bytes == pytest.approx(8 * weights)
    assert expert(200).flops == 200 * 2 * 2 * 4096 * 2 * 14336


def test_layers_that_share_a_cache_read_it_and_store_nothing() -> None:
    kinds = {"layer_types": ["full_attention"] * 3, "hidden_size_per_layer_input": 0}
    sharing = model(TOY | kinds | {"model_type": "gemma4_text", "global_head_dim": 14, "num_kv_shared_layers": 1})
    found = operations(forward(sharing, Precision(), batch=1, queries=1, context=11))
    assert (found["k_proj"].layers, found["attention"].layers) == (2, 3)
    assert evaluate(sharing, machine(), RooflineSetting(seq=11, new_tokens=1)).kv_bytes == 2 * 11 * 2 * 2 * 14 * 2


def test_latent_attention_caches_little_and_expands_it_at_every_step() -> None:
    latent = TOY | {
        "model_type": "deepseek_v3",
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 6,
        "qk_nope_head_dim": 4,
        "v_head_dim": 5,
        "q_lora_rank": None,
        "num_key_value_heads": 6,
        "first_k_dense_replace": 3,
    }
    del latent["head_dim"]
    dims = model(latent)
    found = operations(forward(dims, Precision(), batch=7, queries=1, context=11))
    assert found["kv_b_proj"].flops == 2 * 7 * 11 * 8 * 6 * (4 + 5)
    assert found["kv_b_proj"].kv_read_bytes == 2 * 7 * 11 * (8 + 6)
    assert found["kv_a_proj_with_mqa"].kv_written_bytes == 2 * 7 * (8 + 6)
    assert found["attention"].kv_read_bytes == 0.0
    assert found["attention"].read_bytes == 2 * 7 * 6 * 10 + 2 * 7 * 6 * 11 * (10 + 5)
    assert evaluate(dims, machine(), RooflineSetting(batch=7, seq=11, new_tokens=1)).kv_bytes == 3 * 7 * 11 * 14 * 2


@pytest.mark.parametrize("name", ["opt-6.7b", "llama-2-7b", "llama-3.1-8b", "qwen3-8b", "mixtral-8x7b"])
@pytest.mark.parametrize("queries", [1, 1000])
def test_what_plans_count_is_the_sum_of_the_operations(name: str, queries: int) -> None:
    """Products alone: a plan leaves out softmax, norms and activations, and counts the head apart in a prefill."""
    dims, batch, context = model(name), 3, 1000
    shape = shape_of(dims)
    found = forward(dims, Precision(), batch=batch, queries=queries, context=context)
    products = sum(one.layers * one.flops for one in found if one.kind == "gemm" and one.name != "lm_head")
    attended = next(one for one in found if one.kind == "attention")
    pairs = attended.layers * attended.flops / (4 * shape.head_dim + SOFTMAX_FLOPS)
    expected = products + 4 * shape.head_dim * pairs
    head = 2 * batch * shape.head_weights
    counted = shape.step_flops(batch, context) - head if queries == 1 else shape.prefill_flops(batch, context)
    assert counted == pytest.approx(expected, rel=2e-3)
    if queries == 1 and name != "mixtral-8x7b":  # several tokens meet more experts than one does
        cached = sum(one.layers * one.kv_read_bytes for one in found)
        weights = sum(one.layers * one.weight_bytes for one in found)
        assert shape.step_bytes(batch, context) == pytest.approx(weights + cached, rel=2e-3)
