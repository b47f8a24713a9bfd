"""A step reads weights in the bits they are stored in, for `plan` as for `roofline`, from the same matrices."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from configs import CONFIGS

from kvoffload.advise.advice import task_of
from kvoffload.advise.roofline import evaluate, setting_of
from kvoffload.advise.streaming import QUANTISED_BITS, quantised_way
from kvoffload.advise.task import Task
from kvoffload.advise.utilization import decode_mbu
from kvoffload.config import OffloadConfig
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.machine import find_machine
from kvoffload.model.stored_facts import facts_of
from kvoffload.planning import step_time
from kvoffload.planning.rates import rates_from_profile
from kvoffload.planning.workload import Workload

BASE: dict[str, Any] = json.loads((CONFIGS / "llama-3.1-8b.json").read_text())
METHODS: dict[str, dict[str, Any] | None] = {
    "16 bits": None,
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "fp8": {"quant_method": "fp8"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    name: BASE | ({} if method is None else {"quantization_config": method}) for name, method in METHODS.items()
} | {name: json.loads((CONFIGS / f"{name}.json").read_text()) for name in ("qwen2.5-32b-awq", "mixtral-8x7b")}
DEVICES = ("h100-80gb-sxm5", "l4-24gb-pcie4")


def task(config: Any, device: str, batch: int, **chosen: Any) -> Task:
    workload = Workload(batch=batch, prompt_tokens=1024, new_tokens=129)
    return task_of(config, workload, HardwareProfile.preset(device), OffloadConfig(), **chosen)


def step_s(one: Task) -> float:
    """On the device, whether it fits or not."""
    inputs = one.inputs(one.mean_tokens(), one.workload.batch)
    return step_time.predict(inputs, {"resident_kv": inputs.num_blocks}).device_s + one.tail_s(inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_step_and_a_prefill_of_plan_take_what_roofline_says(name: str, batch: int, device: str) -> None:
    """Roofline also counts norms and residuals, a hundredth of a step."""
    one = task(CONFIGURATIONS[name], device, batch)
    dims = facts_of(CONFIGURATIONS[name])

    def roofline(seq: int) -> Any:
        setting = setting_of(dims, bits=(None, None, None), convention="fused", batch=batch, seq=seq, new_tokens=2)
        return evaluate(dims, find_machine(device), setting)

    assert step_s(one) == pytest.approx(roofline(one.mean_tokens()).decode.seconds, rel=0.02)
    assert one.prefill_s(batch) >= roofline(1024).prefill.seconds * (1 - 1e-9)
    assert one.prefill_s(batch) == pytest.approx(roofline(1024).prefill.seconds, rel=0.05)


def test_fewer_bits_are_read_faster_until_computing_is_the_bound() -> None:
    few, many = (
        {name: step_s(task(CONFIGURATIONS[name], DEVICES[0], batch)) for name in METHODS} for batch in (1, 512)
    )
    assert few["16 bits"] / few["int8"] == pytest.approx(15.0 / 8.1, rel=0.02)  # GB of matrices, the head in 16 bits
    assert few["nf4"] < few["int8"] == pytest.approx(few["fp8"], rel=0.01)
    assert many["nf4"] > 0.8 * many["16 bits"]


def test_weights_in_bits_of_choice_are_those_of_a_checkpoint_that_has_them() -> None:
    stored = task(CONFIGURATIONS["awq"], DEVICES[1], 1)
    chosen = task(BASE, DEVICES[1], 1, w_bits=stored.shape.layer_bits)
    assert chosen.shape.weight_bytes == pytest.approx(stored.shape.weight_bytes, rel=1e-3)
    assert step_s(chosen) == pytest.approx(step_s(stored), rel=1e-3)
    assert chosen.facts is not None
    assert chosen.facts.weight_bytes == pytest.approx(chosen.shape.weight_bytes, rel=1e-3)
    assert decode_mbu(chosen, 1, step_s(chosen)) == pytest.approx(1.0, abs=0.02)


def test_weights_that_are_as_narrow_already_have_no_narrower_way() -> None:
    assert quantised_way(task(CONFIGURATIONS["awq"], DEVICES[1], 1)) is None
    found = quantised_way(task(CONFIGURATIONS["int8"], DEVICES[1], 1))
    assert found is not None
    direct = task(BASE, DEVICES[1], 1, w_bits=QUANTISED_BITS).on_device()
    assert direct is not None
    assert found.step_s == pytest.approx(direct.step_s, rel=1e-3)


def test_experts_that_no_token_is_sent_to_are_not_read() -> None:
    shape = task(CONFIGURATIONS["mixtral-8x7b"], DEVICES[0], 1).shape
    one, many = shape.layer_read_bytes(1), shape.layer_read_bytes(64)
    assert one == pytest.approx(2 * shape.layer_weights, rel=1e-3)
    assert many == pytest.approx(shape.layers_weight_bytes / shape.num_layers, rel=1e-3)


def test_a_measured_product_is_shortened_by_what_is_not_read() -> None:
    """Overhead of a measured product stays, and the bytes of 16-bit weights that are not there go."""
    profile = HardwareProfile.preset(DEVICES[1])
    slower = tuple(point._replace(seconds=point.seconds + 1e-4) for point in profile.gemm.points)
    measured = dataclasses.replace(profile, gemm=dataclasses.replace(profile.gemm, points=slower))
    sizes = {"batch": 1, "block_tokens": 64, "chunk_blocks": 4}
    wide, narrow = (task(CONFIGURATIONS[name], DEVICES[1], 1).shape for name in ("16 bits", "nf4"))
    spared_s = (wide.layer_read_bytes(1) - narrow.layer_read_bytes(1)) / profile.device_copy_bytes_per_s
    before, after = (rates_from_profile(measured, shape, **sizes).dense_s for shape in (wide, narrow))
    assert before - after == pytest.approx(spared_s, rel=1e-3)
