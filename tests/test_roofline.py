"""Operations counted by hand and by another tool, bounds and remedies on machines made so that the answer is known."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvoffload import cli
from kvoffload.errors import ConfigError, UnsupportedModelError
from kvoffload.model_shape import Dimensions, dimensions_from_config
from kvoffload.profiler.hardware import Machine, find_machine
from kvoffload.profiler.operations import Operation, Precision, forward
from kvoffload.profiler.report import si, summary
from kvoffload.profiler.roofline import Roofline, Row, evaluate, setting_of
from kvoffload.profiler.timing import Setting

DATA = Path(__file__).parent / "data"
MODELS = ("opt-6.7b", "llama-2-7b", "llama-3.1-8b", "mixtral-8x7b", "qwen3-8b")
LLAMA_2_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "vocab_size": 32000,
    "torch_dtype": "float16",
}
VIEWER = {  # case: model, hardware, batch, tokens
    "llama2-7b_A6000_b1_s2048_fp16": ("llama-2-7b", "a6000-48gb-pcie4", 1, 2048),
    "opt-6.7b_A100_b32_s1024_fp16": ("opt-6.7b", "a100-40gb-pcie4", 32, 1024),
    "llama2-13b_A100_b32_s1024_fp16": (LLAMA_2_13B, "a100-40gb-pcie4", 32, 1024),
}
TOY = {  # every size another prime or so, that no two can be taken for each other
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 50,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 5,
    "num_hidden_layers": 3,
    "vocab_size": 101,
    "torch_dtype": "bfloat16",
}


def model(name: str | dict[str, Any]) -> Dimensions:
    return dimensions_from_config(DATA / "configs" / f"{name}.json" if isinstance(name, str) else name)


def machine(**changes: Any) -> Machine:
    """One FLOP/s and byte/s for everything, but for what a test changes."""
    base = Machine(
        device_name="toy",
        link_name="toy",
        peak_flops_per_s={16: 1.0},
        memory_bytes=10**9,
        memory_bytes_per_s=1.0,
        link_bytes_per_s=1.0,
    )
    return dataclasses.replace(base, **changes)


def rows(found: Roofline, phase: str) -> dict[str, Row]:
    return {row.name: row for one in found.phases if one.name == phase for row in one.rows}


def operations(found: list[Operation]) -> dict[str, Operation]:
    return {one.name: one for one in found}


# ---- counted by others and by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VIEWER)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_totals_are_the_corrected_ones_of_llm_viewer(case: str, phase: str) -> None:
    name, hardware, batch, seq = VIEWER[case]
    expected = json.loads((DATA / "llmviewer" / "totals.json").read_text())[case]["corrected"][phase]
    setting = Setting(batch=batch, seq=seq, convention="unfused")
    totals = evaluate(model(name), find_machine(hardware), setting).to_json()[phase]
    for field in ("OPs", "memory_access", "load_weight", "load_kv_cache"):
        assert totals[field] == expected[field]
    assert totals["inference_time"] == pytest.approx(
        expected["inference_time"], rel=0.0005
    )  # its A6000 is 155, not 154.8


def test_every_operation_of_a_decode_step_by_hand() -> None:
    found = operations(forward(model(TOY), Precision(), batch=7, queries=1, context=11))
    assert found["q_proj"] == Operation("q_proj", "gemm", 3, 2 * 7 * 24 * 30, 16, 2 * 24 * 30, 2 * 7 * 24, 2 * 7 * 30)
    assert found["k_proj"] == Operation(
        "k_proj", "gemm", 3, 2 * 7 * 24 * 10, 16, 2 * 24 * 10, 2 * 7 * 24, 0.0, 0.0, 2 * 7 * 10
    )
    scores = 7 * 6 * 11
    assert found["attention"] == Operation(
        "attention",
        "attention",
        3,
        scores * (2 * 5 + 2 * 5 + 5),
        16,
        0.0,
        2 * 7 * 30,
        2 * 7 * 30,
        2 * 2 * 7 * 11 * 2 * 5,
    )
    assert found["mlp_act"][3:8] == (2 * 7 * 50, 16, 0.0, 2 * 2 * 7 * 50, 2 * 7 * 50)
    assert found["norm"][2:8] == (6, 7 * 7 * 24, 16, 0.0, 2 * 7 * 24, 2 * 7 * 24)
    assert found["add"][2:8] == (6, 7 * 24, 16, 0.0, 2 * 2 * 7 * 24, 2 * 7 * 24)
    assert found["lm_head"] == Operation(
        "lm_head", "gemm", 1, 2 * 7 * 24 * 101, 16, 2 * 24 * 101, 2 * 7 * 24, 2 * 7 * 101
    )


def test_a_prompt_attends_causally_and_only_its_last_token_meets_the_head() -> None:
    found = operations(forward(model(TOY), Precision(), batch=7, queries=11, context=11))
    assert found["attention"].flops == 7 * 6 * (11 * 12 / 2) * 25
    assert found["up_proj"].flops == 2 * 7 * 11 * 24 * 50
    assert found["lm_head"].flops == 2 * 7 * 24 * 101


def test_unfused_attention_writes_its_scores_and_attends_to_the_whole_prompt() -> None:
    found = operations(forward(model(TOY), Precision(), batch=7, queries=11, context=11, convention="unfused"))
    pairs = 7 * 6 * 11 * 11
    assert found["qk_matmul"].flops == 2 * pairs * 5
    assert found["qk_matmul"].written_bytes == found["softmax"].read_bytes == found["sv_matmul"].read_bytes == 2 * pairs
    assert found["softmax"].flops == 5 * pairs
    assert found["sv_matmul"].kv_read_bytes == 2 * 7 * 11 * 2 * 5
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
    assert prompt["attention (window)"].flops == 6 * (4 * 5 / 2 + 7 * 4) * 25
    whole = evaluate(dims, machine(), Setting(batch=2, seq=11, new_tokens=3))
    assert whole.kv_bytes == 2 * (13 + 2 * 4) * 2 * 2 * 5 * 2


def test_few_tokens_reach_few_experts_and_many_reach_all() -> None:
    dims = model("mixtral-8x7b")
    weights = 4096 * 14336 * 2

    def expert(tokens: int) -> Operation:
        return operations(forward(dims, Precision(), batch=tokens, queries=1, context=9))["expert_up_proj"]

    assert expert(1).weight_bytes == pytest.approx(2 * weights)
    assert 2 * weights < expert(2).weight_bytes < 4 * weights
    assert expert(200).weight_bytes == pytest.approx(8 * weights)
    assert expert(200).flops == 200 * 2 * 2 * 4096 * 14336


def test_layers_that_share_a_cache_read_it_and_store_nothing() -> None:
    sharing = model(TOY | {"num_kv_shared_layers": 1})
    found = operations(forward(sharing, Precision(), batch=1, queries=1, context=11))
    assert (found["k_proj"].layers, found["attention"].layers) == (2, 3)
    assert evaluate(sharing, machine(), Setting(seq=11, new_tokens=1)).kv_bytes == 2 * 11 * 2 * 2 * 5 * 2


def test_latent_attention_caches_little_and_expands_it_at_every_step() -> None:
    latent = TOY | {
        "model_type": "deepseek_v3",
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 3,
        "qk_nope_head_dim": 4,
        "v_head_dim": 5,
        "q_lora_rank": None,
    }
    dims = model(latent)
    found = operations(forward(dims, Precision(), batch=7, queries=1, context=11))
    assert found["kv_b_proj"].flops == 2 * 7 * 11 * 8 * 6 * (4 + 5)
    assert found["kv_b_proj"].kv_read_bytes == 2 * 7 * 11 * (8 + 3)
    assert found["kv_a_proj"].kv_written_bytes == 2 * 7 * (8 + 3)
    assert found["attention"].kv_read_bytes == 0.0
    assert found["attention"].read_bytes == 2 * 7 * 6 * 7 + 2 * 7 * 6 * 11 * (7 + 5)
    assert evaluate(dims, machine(), Setting(batch=7, seq=11, new_tokens=1)).kv_bytes == 3 * 7 * 11 * 11 * 2


# ---- phases ------------------------------------------------------------------------------------------------------


@pytest.mark.timing
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("convention", ["fused", "unfused"])
def test_an_evaluation_takes_less_than_a_millisecond(name: str, convention: str) -> None:
    dims, device = model(name), find_machine("h200-pcie5")
    setting = setting_of(dims, bits=(None, None, None), convention=convention, batch=32, seq=1024)
    took_s = []
    for _ in range(50):
        began = time.perf_counter()
        evaluate(dims, device, setting)
        took_s.append(time.perf_counter() - began)
    assert min(took_s) < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_task_is_the_prefill_and_every_step_at_its_own_context(name: str) -> None:
    dims, device = model(name), find_machine("a100-80gb-sxm4")
    setting = Setting(batch=4, seq=100, new_tokens=40)
    found = evaluate(dims, device, setting)
    steps = [evaluate(dims, device, dataclasses.replace(setting, seq=100 + done)).decode for done in range(1, 40)]
    assert found.task.seconds == pytest.approx(found.prefill.seconds + sum(one.seconds for one in steps), rel=1e-3)
    for field in ("flops", "memory_bytes", "weight_bytes", "kv_bytes"):
        expected = found.prefill.total(field) + sum(one.total(field) for one in steps)
        assert found.task.total(field) == pytest.approx(expected, rel=1e-6)


def test_a_task_of_one_token_is_its_prefill() -> None:
    found = evaluate(model(TOY), machine(), Setting(seq=9, new_tokens=1))
    assert found.task.seconds == found.prefill.seconds
    assert found.task.rows == found.prefill.rows


def test_with_everything_on_the_device_a_phase_is_the_sum_of_its_operations() -> None:
    found = evaluate(model(TOY), machine(), Setting(batch=3, seq=9))
    for phase in found.phases:
        assert phase.seconds == pytest.approx(sum(row.seconds for row in phase.rows))
        assert phase.total("link_bytes") == phase.total("host_bytes") == 0


def test_a_cache_on_the_host_is_written_once_and_read_at_every_step() -> None:
    dims, setting = model(TOY), Setting(batch=3, seq=9, new_tokens=5, kv_on_host=0.5)
    found = evaluate(dims, machine(link_bytes_per_s=0.01), setting)
    row_bytes = 3 * 2 * 2 * 5 * 2  # layers, K and V, heads, head_dim, bytes
    assert found.prefill.total("link_bytes") == 0.5 * 3 * 9 * row_bytes
    assert found.decode.total("link_bytes") == 0.5 * 3 * (9 + 1) * row_bytes  # and the new token back
    assert rows(found, "decode")["attention"].link_bytes == 0.5 * 3 * 9 * row_bytes
    assert rows(found, "decode")["attention"].host_bytes == rows(found, "decode")["attention"].link_bytes
    assert found.decode.bound == "link"
    assert found.decode.seconds == found.decode.total("link_s")
    assert rows(found, "decode")["attention"].bound == "link"
    assert rows(found, "decode")["up_proj"].bound != "link"


def test_streamed_weights_cross_the_link_in_every_forward() -> None:
    found = evaluate(model(TOY), machine(), Setting(seq=9, weights_on_host=1.0))
    assert found.prefill.total("link_bytes") == found.decode.total("link_bytes") == found.decode.total("weight_bytes")
    assert found.device_bytes == found.kv_bytes


def test_what_the_device_must_hold_is_counted_to_the_byte() -> None:
    dims = model("llama-3.1-8b")
    found = evaluate(dims, find_machine("rtx4090-24gb-pcie4"), Setting(batch=2, seq=1000, new_tokens=25))
    assert found.weight_bytes == 2 * 8_030_261_248
    assert found.kv_bytes == 2 * 1024 * 32 * 2 * 8 * 128 * 2
    assert found.fits
    quantised = setting_of(dims, bits=(4, None, None), convention="fused")
    half = evaluate(dims, find_machine("rtx4090-24gb-pcie4"), quantised)
    matrices = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    assert half.weight_bytes == matrices // 2 + 2 * (128256 * 4096 + 65 * 4096)
    tied = model(TOY | {"tie_word_embeddings": True})
    narrow = setting_of(tied, bits=(4, None, None), convention="fused")
    assert evaluate(tied, machine(), narrow).weight_bytes == 3 * (2 * 24 * 40 + 3 * 24 * 50) // 2 + 2 * (
        101 * 24 + 7 * 24
    )
    shared = evaluate(dims, machine(), Setting(batch=2, seq=1000, new_tokens=25, kv_on_host=0.25))
    assert shared.device_bytes == found.weight_bytes + 0.75 * found.kv_bytes


def test_bits_are_the_models_own_where_none_are_given() -> None:
    wide = model(TOY | {"torch_dtype": "float32"})
    assert setting_of(wide, bits=(None, 8, None), convention="fused").precision == Precision(
        weight_bits=32, activation_bits=8, kv_bits=32
    )


# ---- bounds and remedies -----------------------------------------------------------------------------------------


def test_an_operation_is_bound_by_the_longer_of_computing_and_moving() -> None:
    dims, setting = model(TOY), Setting(batch=3, seq=9)
    fast_memory = evaluate(dims, machine(memory_bytes_per_s=1e6), setting)
    fast_units = evaluate(dims, machine(peak_flops_per_s={16: 1e6}), setting)
    for phase in ("prefill", "decode"):
        for name, row in rows(fast_memory, phase).items():
            assert (row.bound, row.seconds) == ("compute", row.flops), name
        for name, row in rows(fast_units, phase).items():
            assert (row.bound, row.seconds) == ("memory", row.memory_bytes), name
            assert row.intensity == row.flops / row.memory_bytes
    assert fast_memory.decode.bound == "compute"
    assert fast_units.decode.bound == "memory"


def test_narrower_weights_move_the_bound_of_reading_them_by_what_they_save() -> None:
    found = evaluate(model("llama-2-7b"), find_machine("a100-40gb-pcie4"), Setting(seq=1024))
    row = rows(found, "decode")["up_proj"]
    narrower = evaluate(
        model("llama-2-7b"), find_machine("a100-40gb-pcie4"), Setting(seq=1024, precision=Precision(weight_bits=8))
    )
    by_change = {remedy.change: remedy for remedy in row.remedies}
    assert by_change["weights in 8 bits"].gain == pytest.approx(
        row.seconds / rows(narrower, "decode")["up_proj"].seconds
    )
    saved = row.seconds - rows(narrower, "decode")["up_proj"].seconds
    expected = found.decode.seconds / (found.decode.seconds - saved)
    assert by_change["weights in 8 bits"].phase_gain == pytest.approx(expected)


def test_a_larger_batch_shares_the_reading_of_weights() -> None:
    device = find_machine("a100-40gb-pcie4")
    one, two = (rows(evaluate(model("opt-6.7b"), device, Setting(batch=n)), "decode")["up_proj"] for n in (1, 2))
    remedy = {one.change: one for one in one.remedies}["twice the batch"]
    assert remedy.gain == pytest.approx(2 * one.seconds / two.seconds)
    assert remedy.gain > 1.9


def test_reading_keys_and_values_is_moved_by_narrower_ones_and_not_by_the_batch() -> None:
    found = evaluate(model("llama-2-7b"), find_machine("a100-40gb-pcie4"), Setting(batch=8, seq=4096))
    attention = rows(found, "decode")["attention"]
    assert attention.bound == "memory"
    assert [remedy.change for remedy in attention.remedies] == ["K/V in 8 bits"]
    assert attention.remedies[0].gain == pytest.approx(2.0, rel=0.01)


def test_computing_is_moved_by_narrower_units_where_there_are_any() -> None:
    setting = Setting(batch=8, seq=1024)
    a100 = rows(evaluate(model("llama-2-7b"), find_machine("a100-40gb-pcie4"), setting), "prefill")["up_proj"]
    assert a100.remedies[0].change == "8-bit compute"
    assert a100.remedies[0].gain == pytest.approx(2.0, rel=0.01)
    bare = evaluate(model("llama-2-7b"), machine(peak_flops_per_s={16: 1e12}, memory_bytes_per_s=1e12), setting)
    assert rows(bare, "prefill")["up_proj"].remedies == ()


def test_weights_alone_narrower_compute_no_faster() -> None:
    device = find_machine("a100-40gb-pcie4")
    times = [
        rows(evaluate(model("llama-2-7b"), device, Setting(batch=8, precision=precision)), "prefill")["up_proj"].seconds
        for precision in (Precision(), Precision(weight_bits=4), Precision(weight_bits=8, activation_bits=8))
    ]
    assert times[1] == times[0]
    assert times[2] == pytest.approx(times[0] / 2)


def test_the_link_is_moved_by_narrower_keys_and_values_or_by_staying_on_the_device() -> None:
    setting = Setting(batch=8, seq=4096, kv_on_host=1.0)
    found = evaluate(model("llama-2-7b"), find_machine("a100-40gb-pcie4"), setting)
    attention = rows(found, "decode")["attention"]
    gains = {remedy.change: remedy for remedy in attention.remedies}
    assert gains["K/V in 8 bits"].gain == pytest.approx(2.0, rel=0.01)
    assert gains["its host share on the device"].gain == pytest.approx(attention.link_s / attention.seconds)
    assert gains["K/V in 8 bits"].phase_gain == pytest.approx(2.0, rel=0.01)
    assert attention.remedies[0].gain == max(remedy.gain for remedy in attention.remedies)


# ---- a measured machine ------------------------------------------------------------------------------------------


def test_a_measured_machine_gives_predictions_with_intervals_and_sees_launches() -> None:
    measured = find_machine(DATA / "profile_emulated_2_threads.json")
    dims = model(TOY | {"torch_dtype": "float32"})
    found = evaluate(dims, measured, setting_of(dims, bits=(None, None, None), convention="fused", seq=9))
    assert found.to_json()["mode"] == "fitted"
    for phase in found.phases:
        assert phase.low_s < phase.seconds < phase.high_s
    row = rows(found, "decode")["up_proj"]
    assert row.bound == "launch"
    assert row.seconds >= 3 * measured.fits["gemm"].overhead_s
    assert row.remedies[0].change == "twice the batch"
    datasheet = evaluate(model(TOY), find_machine("a100-40gb-pcie4"), Setting())
    assert all(phase.low_s == phase.seconds == phase.high_s for phase in datasheet.phases)


# ---- the command -------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["roofline", *map(str, arguments)])


@pytest.mark.parametrize("name", MODELS)
def test_the_command_works_for_every_configuration(name: str) -> None:
    arguments = [
        "--config",
        DATA / "configs" / f"{name}.json",
        "--hardware",
        "h100-80gb-sxm5",
        "--batch",
        4,
        "--seq",
        512,
    ]
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    dims = model(name)
    assert data["parameters"] == dims.num_weights
    assert data["parameters_are_exact"]
    for phase in ("prefill", "decode", "task"):
        totals = data[phase]
        for field in ("OPs", "memory_access", "load_weight", "load_kv_cache", "inference_time"):
            assert totals[field] > 0
        assert totals["OPs"] == pytest.approx(sum(one["flops"] for one in totals["operations"]))
        assert sum(one["share"] for one in totals["operations"]) == pytest.approx(1.0)
    table = run(*arguments).output
    assert "decode: one token of 4 sequences at a context of 512" in table
    assert "weights in 8 bits" in table
    assert "of 80 GB device memory: " in table


def test_the_command_takes_bits_and_a_host_share(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_13B))
    arguments = ["--config", tmp_path, "--hardware", "a100-40gb-pcie4", "--batch", 32]
    table = run(*arguments).output
    assert "does not fit by" in table
    assert "try --kv-on-host 0.5" in table
    options = ("--w-bits", 8, "--a-bits", 8, "--kv-bits", 4, "--kv-on-host", 0.25, "--attention", "unfused", "--json")
    data = json.loads(run(*arguments, *options).output)
    assert (data["w_bits"], data["a_bits"], data["kv_bits"], data["attention"]) == (8, 8, 4, "unfused")
    assert data["decode"]["load_kv_cache"] == pytest.approx(26843545600 / 4)
    assert data["decode"]["link_bytes"] == pytest.approx(26843545600 / 16, rel=2e-3)
    assert "host memory" in run(*arguments, "--kv-on-host", 0.5).output


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
    base = ["--config", DATA / "configs" / "opt-6.7b.json", "--hardware", "t4-16gb-pcie3"]
    result = run(*base, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_configuration_without_a_needed_field_names_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value for name, value in LLAMA_2_13B.items() if name != "vocab_size"}))
    result = run("--config", path, "--hardware", "t4-16gb-pcie3")
    assert (result.exit_code, "lacks vocab_size" in result.stderr) == (2, True)


def test_layers_without_attention_over_a_cache_are_refused() -> None:
    linear = TOY | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    with pytest.raises(UnsupportedModelError, match="2 of 3 layers"):
        evaluate(model(linear), machine(), Setting())
    with pytest.raises(ConfigError, match="batch"):
        Setting(batch=True)


def test_an_unknown_model_type_is_told() -> None:
    found = evaluate(model(TOY | {"model_type": "brandnew"}), machine(), Setting())
    assert any("'brandnew' is not known" in line for line in summary(found))
    assert not found.to_json()["parameters_are_exact"]


def test_numbers_are_shown_with_three_digits_and_a_prefix() -> None:
    assert [si(value) for value in (0.0, 12.34, 999.4, 999.6, 13.48e9)] == ["0 ", "12.3 ", "999 ", "1 k", "13.5 G"]


def test_the_roofline_of_a_preset_loads_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; from kvoffload.profiler import roofline, hardware; from kvoffload import model_shape; "
        "print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
