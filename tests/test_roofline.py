"""Phases, bounds and remedies on machines made so that the answer is known."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys import MODELS, TOY, machine, model

from kvoffload.advise.roofline import OperationTime, Roofline, evaluate, setting_of
from kvoffload.advise.timing import RooflineSetting
from kvoffload.errors import ConfigError, UnsupportedModelError
from kvoffload.machine.machine import find_machine
from kvoffload.model.operations import Precision
from kvoffload.profiler.drawing.terminal_tables import si, summary

DATA = Path(__file__).parent / "data"


def rows(found: Roofline, phase: str) -> dict[str, OperationTime]:
    return {row.name: row for one in found.phases if one.name == phase for row in one.rows}


# ---- phases --------------------------------------------------------------------------------------------------------


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
    setting = RooflineSetting(batch=4, seq=100, new_tokens=40)
    found = evaluate(dims, device, setting)
    steps = [evaluate(dims, device, dataclasses.replace(setting, seq=100 + done)).decode for done in range(1, 40)]
    assert found.task.seconds == pytest.approx(found.prefill.seconds + sum(one.seconds for one in steps), rel=1e-3)
    for field in ("flops", "memory_bytes", "weight_bytes", "kv_bytes"):
        expected = found.prefill.total(field) + sum(one.total(field) for one in steps)
        assert found.task.total(field) == pytest.approx(expected, rel=1e-6)


def test_a_task_of_one_token_is_its_prefill() -> None:
    found = evaluate(model(TOY), machine(), RooflineSetting(seq=9, new_tokens=1))
    assert found.task.seconds == found.prefill.seconds
    assert found.task.rows == found.prefill.rows


def test_with_everything_on_the_device_a_phase_is_the_sum_of_its_operations() -> None:
    found = evaluate(model(TOY), machine(), RooflineSetting(batch=3, seq=9))
    for phase in found.phases:
        assert phase.seconds == pytest.approx(sum(row.seconds for row in phase.rows))
        assert phase.total("link_bytes") == phase.total("host_bytes") == 0


def test_a_cache_on_the_host_is_written_once_and_read_at_every_step() -> None:
    dims, setting = model(TOY), RooflineSetting(batch=3, seq=9, new_tokens=5, kv_on_host=0.5)
    found = evaluate(dims, machine(link_bytes_per_s=0.01), setting)
    row_bytes = 3 * 2 * 2 * 14 * 2  # layers, K and V, heads, head_dim, bytes
    assert found.prefill.total("link_bytes") == 0.5 * 3 * 9 * row_bytes
    assert found.decode.total("link_bytes") == 0.5 * 3 * (9 + 1) * row_bytes  # and the new token back
    assert rows(found, "decode")["attention"].link_bytes == 0.5 * 3 * 9 * row_bytes
    assert rows(found, "decode")["attention"].host_bytes == rows(found, "decode")["attention"].link_bytes
    assert found.decode.bound == "link"
    assert found.decode.seconds == found.decode.total("link_s")
    assert rows(found, "decode")["attention"].bound == "link"
    assert rows(found, "decode")["up_proj"].bound != "link"


def test_streamed_weights_cross_the_link_in_every_forward() -> None:
    found = evaluate(model(TOY), machine(), RooflineSetting(seq=9, weights_on_host=1.0))
    assert found.prefill.total("link_bytes") == found.decode.total("link_bytes") == found.decode.total("weight_bytes")
    assert found.device_bytes == found.kv_bytes


def test_what_the_device_must_hold_is_counted_to_the_byte() -> None:
    dims = model("llama-3.1-8b")
    found = evaluate(dims, find_machine("rtx4090-24gb-pcie4"), RooflineSetting(batch=2, seq=1000, new_tokens=25))
    assert found.weight_bytes == 2 * 8_030_261_248
    assert found.kv_bytes == 2 * 1024 * 32 * 2 * 8 * 128 * 2
    assert found.fits
    quantised = setting_of(dims, bits=(4, None, None), convention="fused")
    half = evaluate(dims, find_machine("rtx4090-24gb-pcie4"), quantised)
    matrices = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    assert half.weight_bytes == matrices // 2 + 2 * (128256 * 4096 + 65 * 4096)
    tied = model(TOY | {"tie_word_embeddings": True})
    narrow = setting_of(tied, bits=(4, None, None), convention="fused")
    assert evaluate(tied, machine(), narrow).weight_bytes == 3 * (2 * 24 * 112 + 3 * 24 * 50) // 2 + 2 * (
        101 * 24 + 7 * 24
    )
    shared = evaluate(dims, machine(), RooflineSetting(batch=2, seq=1000, new_tokens=25, kv_on_host=0.25))
    assert shared.device_bytes == found.weight_bytes + 0.75 * found.kv_bytes


def test_bits_are_the_models_own_where_none_are_given() -> None:
    wide = model(TOY | {"torch_dtype": "float32"})
    assert setting_of(wide, bits=(None, 8, None), convention="fused").precision == Precision(
        weight_bits=32, activation_bits=8, kv_bits=32
    )


# ---- bounds and remedies -------------------------------------------------------------------------------------------


def test_an_operation_is_bound_by_the_longer_of_computing_and_moving() -> None:
    dims, setting = model(TOY), RooflineSetting(batch=3, seq=9)
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
    found = evaluate(model("llama-2-7b"), find_machine("a100-40gb-pcie4"), RooflineSetting(seq=1024))
    row = rows(found, "decode")["up_proj"]
    narrower = evaluate(
        model("llama-2-7b"),
        find_machine("a100-40gb-pcie4"),
        RooflineSetting(seq=1024, precision=Precision(weight_bits=8)),
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
    one, two = (rows(evaluate(model("opt-6.7b"), device, RooflineSetting(batch=n)), "decode")["fc1"] for n in (1, 2))
    remedy = {one.change: one for one in one.remedies}["twice the batch"]
    assert remedy.gain == pytest.approx(2 * one.seconds / two.seconds)
    assert remedy.gain > 1.9


def test_reading_keys_and_values_is_moved_by_narrower_ones_and_not_by_the_batch() -> None:
    found = evaluate(model("llama-2-7b"), find_machine("a100-40gb-pcie4"), RooflineSetting(batch=8, seq=4096))
    attention = rows(found, "decode")["attention"]
    assert attention.bound == "memory"
    assert [remedy.change for remedy in attention.remedies] == ["K/V in 8 bits"]
    assert attention.remedies[0].gain == pytest.approx(2.0, rel=0.01)


def test_computing_is_moved_by_narrower_units_where_there_are_any() -> None:
    setting = RooflineSetting(batch=8, seq=1024)
    a100 = rows(evaluate(model("llama-2-7b"), find_machine("a100-40gb-pcie4"), setting), "prefill")["up_proj"]
    assert a100.remedies[0].change == "8-bit compute"
    assert a100.remedies[0].gain == pytest.approx(2.0, rel=0.01)
    bare = evaluate(model("llama-2-7b"), machine(peak_flops_per_s={16: 1e12}, memory_bytes_per_s=1e12), setting)
    assert rows(bare, "prefill")["up_proj"].remedies == ()


def test_weights_alone_narrower_compute_no_faster() -> None:
    device = find_machine("a100-40gb-pcie4")
    times = [
        rows(evaluate(model("llama-2-7b"), device, RooflineSetting(batch=8, precision=precision)), "prefill")[
            "up_proj"
        ].seconds
        for precision in (Precision(), Precision(weight_bits=4), Precision(weight_bits=8, activation_bits=8))
    ]
    assert times[1] == times[0]
    assert times[2] == pytest.approx(times[0] / 2)


def test_the_link_is_moved_by_narrower_keys_and_values_or_by_staying_on_the_device() -> None:
    setting = RooflineSetting(batch=8, seq=4096, kv_on_host=1.0)
    found = evaluate(model("llama-2-7b"), find_machine("a100-40gb-pcie4"), setting)
    attention = rows(found, "decode")["attention"]
    gains = {remedy.change: remedy for remedy in attention.remedies}
    assert gains["K/V in 8 bits"].gain == pytest.approx(2.0, rel=0.01)
    assert gains["its host share on the device"].gain == pytest.approx(attention.link_s / attention.seconds)
    assert gains["K/V in 8 bits"].phase_gain == pytest.approx(2.0, rel=0.01)
    assert attention.remedies[0].gain == max(remedy.gain for remedy in attention.remedies)


# ---- a measured machine --------------------------------------------------------------------------------------------


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
    datasheet = evaluate(model(TOY), find_machine("a100-40gb-pcie4"), RooflineSetting())
    assert all(phase.low_s == phase.seconds == phase.high_s for phase in datasheet.phases)


def test_layers_without_attention_over_a_cache_are_refused() -> None:
    linear = TOY | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    with pytest.raises(UnsupportedModelError, match="2 of 3 layers"):
        evaluate(model(linear), machine(), RooflineSetting())
    with pytest.raises(ConfigError, match="batch"):
        RooflineSetting(batch=True)


def test_an_unknown_model_type_is_told() -> None:
    found = evaluate(model(TOY | {"model_type": "brandnew"}), machine(), RooflineSetting())
    assert any("'brandnew' is not known" in line for line in summary(found))
    assert not found.to_json()["parameters_are_exact"]


def test_numbers_are_shown_with_three_digits_and_a_prefix() -> None:
    assert [si(value) for value in (0.0, 12.34, 999.4, 999.6, 13.48e9)] == ["0 ", "12.3 ", "999 ", "1 k", "13.5 G"]


def test_the_roofline_of_a_preset_loads_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; from kvoffload.advise import roofline; from kvoffload.machine import machine; "
        "from kvoffload.model import stored_facts; "
        "print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
