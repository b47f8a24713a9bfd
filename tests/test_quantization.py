"""Bytes of quantised checkpoints, by the formula of what each method stores."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from configs import CONFIGS
from transformers import BitsAndBytesConfig, LlamaConfig

from kvoffload.advice import advise
from kvoffload.config import OffloadConfig
from kvoffload.errors import ConfigError
from kvoffload.hardware_profile import HardwareProfile
from kvoffload.model_shape import dimensions_from_config, shape_from_config
from kvoffload.profiler.hardware import find_machine
from kvoffload.profiler.report import summary
from kvoffload.profiler.roofline import evaluate, setting_of
from kvoffload.types import Workload

LLAMA: dict[str, Any] = json.loads((CONFIGS / "llama-2-7b.json").read_text())
MIXTRAL: dict[str, Any] = json.loads((CONFIGS / "mixtral-8x7b.json").read_text())
H, WIDTH, LAYERS, VOCAB = 4096, 11008, 32, 32000
LINEAR = LAYERS * (4 * H * H + 3 * H * WIDTH)  # four projections, gate, up and down
OTHERS = 2 * VOCAB * H + (2 * LAYERS + 1) * H  # embedding, head, norms


def weight_bytes(quantization: Any, base: dict[str, Any] = LLAMA) -> int:
    return shape_from_config(base | {"quantization_config": quantization}).weight_bytes


def test_plain_weights_are_counted_as_before() -> None:
    assert weight_bytes(None) == weight_bytes({}) == shape_from_config(LLAMA).weight_bytes == 2 * (LINEAR + OTHERS)


@pytest.mark.parametrize(
    ("quantization", "linear_bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 4 + 32 / 64),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 4 + 8 / 64 + 32 / 64 / 256),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + (16 + 4) / 128),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, 4 + (16 + 4) / 64),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128 / 128),
        ({"quant_method": "awq"}, 4 + (16 + 4) / 128),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}},
                "ignore": ["lm_head"],
            },
            4 + 16 / 128,
        ),
    ],
    ids=lambda value: str(value.get("quant_method", "bitsandbytes")) if isinstance(value, dict) else "",
)
def test_linear_layers_shrink_to_their_bits_and_the_rest_stays(quantization: Any, linear_bits: float) -> None:
    assert weight_bytes(quantization) == pytest.approx(LINEAR * linear_bits / 8 + 2 * OTHERS, abs=1)


def test_scales_per_row_and_an_index_per_input_follow_the_shape_of_each_matrix() -> None:
    square, tall, flat = LAYERS * 4 * H * H, LAYERS * 2 * H * WIDTH, LAYERS * WIDTH * H  # tall: gate and up
    per_row_bytes = 4 * (square / H + tall / H + flat / WIDTH)  # a float32 per output of each
    for one in ({"load_in_8bit": True}, {"quant_method": "fbgemm_fp8"}):
        assert weight_bytes(one) == pytest.approx(LINEAR + per_row_bytes + 2 * OTHERS, abs=1)
    index_bytes = 4 * (square / H + tall / WIDTH + flat / H)  # an int32 per input of each
    gptq = weight_bytes({"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert gptq == pytest.approx(LINEAR * (4 + 20 / 128) / 8 + index_bytes + 2 * OTHERS, abs=1)
    row_groups = weight_bytes({"quant_method": "gptq", "bits": 3, "group_size": -1})
    scales_bytes = 19 / 8 * (square / H + tall / H + flat / WIDTH)
    assert row_groups == pytest.approx(LINEAR * 3 / 8 + scales_bytes + index_bytes + 2 * OTHERS, abs=1)


def test_modules_that_are_left_out_stay_as_they_were() -> None:
    everything = weight_bytes({"quant_method": "awq", "bits": 4})
    saved_bits = 16 - (4 + 20 / 128)
    all_down = weight_bytes({"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["lm_head", "down_proj"]})
    assert all_down - everything == pytest.approx(LAYERS * H * WIDTH * saved_bits / 8, abs=1)
    some = [f"model.layers.{idx}.self_attn" for idx in (0, 31)]
    two_layers = weight_bytes({"quant_method": "awq", "bits": 4, "modules_to_not_convert": some})
    assert two_layers - everything == pytest.approx(2 * 4 * H * H * saved_bits / 8, abs=1)


SAVED_BITS = 16 - (4 + 20 / 128)  # by awq, of every weight
ATTENTION, MLP = 4 * H * H, 3 * H * WIDTH


@pytest.mark.parametrize("key", ["ignored_layers", "llm_int8_skip_modules", "modules_to_not_convert", "ignore"])
@pytest.mark.parametrize(
    ("names", "num_kept"),
    [
        (["model.layers.1"], ATTENTION + MLP),  # and not 10 to 19
        (["model.layers.0", "model.layers.0.mlp", "model\\.layers\\.31\\.self_attn"], 2 * ATTENTION + MLP),
        (["model.language_model.layers.3"], ATTENTION + MLP),
        (["self_attn"], LAYERS * ATTENTION),
        (["model.layers.4.mlp.down_proj"], H * WIDTH),
        (["model.layers.*.self_attn"], LAYERS * ATTENTION),
        (["re:.*self_attn.*"], LAYERS * ATTENTION),
        (["re:.*down_proj$"], LAYERS * H * WIDTH),
        (["re:model.layers.[0-4][.]mlp"], 5 * MLP),
        (["re:layers.0"], 0),  # from the start of the name
        (["lm_head", "re:.*lm_head", "re:.*embed_tokens", "proj", "norm"], 0),
        (["vision_tower.layers.0.self_attn.q_proj", "re:visual.*", "model.visual"], 0),
        (["model"], LINEAR),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_key_names_modules_by_what_they_are_in_or_by_a_pattern(key: str, names: list[str], num_kept: int) -> None:
    kept_bytes = weight_bytes({"quant_method": "awq", key: names}) - weight_bytes({"quant_method": "awq"})
    assert kept_bytes == pytest.approx(num_kept * SAVED_BITS / 8, abs=1)


@pytest.mark.parametrize(
    "name",
    ["gate", "model.layers.5.block_sparse_moe.gate", "re:.*block_sparse_moe.gate$", "re:.*mlp.gate$", "re:.*router"],
)
def test_a_router_that_is_ignored_stays_and_its_experts_do_not(name: str) -> None:
    router = 4096 * 8 * (1 if ".5." in name else 32)
    kept_bytes = weight_bytes({"quant_method": "awq", "ignore": [name]}, MIXTRAL)
    kept_bytes -= weight_bytes({"quant_method": "awq"}, MIXTRAL)
    assert kept_bytes == pytest.approx(router * SAVED_BITS / 8, abs=1)


def test_experts_that_are_ignored_stay() -> None:
    kept_bytes = weight_bytes({"quant_method": "awq", "ignore": [r"re:.*\.experts\..*"]}, MIXTRAL)
    kept_bytes -= weight_bytes({"quant_method": "awq"}, MIXTRAL)
    assert kept_bytes == pytest.approx(32 * 8 * 3 * 4096 * 14336 * SAVED_BITS / 8, abs=1)


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'re:\(' in the quantization_config is no pattern"):
        weight_bytes({"quant_method": "awq", "ignore": ["re:("]})


def test_compressed_tensors_without_numbers_are_eight_bits_with_a_scale_per_row() -> None:
    square, tall, flat = LAYERS * 4 * H * H, LAYERS * 2 * H * WIDTH, LAYERS * WIDTH * H
    scales_bytes = 2 * (square / H + tall / H + flat / WIDTH)
    for weights in ({}, {"num_bits": None, "group_size": None}, {"num_bits": 8, "group_size": -1}):
        one = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
        assert weight_bytes(one) == pytest.approx(LINEAR + scales_bytes + 2 * OTHERS, abs=1)


def test_mxfp4_shrinks_the_experts_alone() -> None:
    plain, quantized = weight_bytes(None, MIXTRAL), weight_bytes({"quant_method": "mxfp4"}, MIXTRAL)
    experts = 32 * 8 * 3 * 4096 * 14336
    assert plain - quantized == pytest.approx(experts * (16 - 4.25) / 8, abs=1)


def test_configuration_objects_and_multimodal_files_say_the_same() -> None:
    expected = weight_bytes({"load_in_4bit": True})
    config = LlamaConfig(**LLAMA)
    config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert shape_from_config(config).weight_bytes == expected
    nested = {"text_config": LLAMA, "quantization_config": {"load_in_4bit": True}}
    assert shape_from_config(nested).weight_bytes == expected
    config.quantization_config = SimpleNamespace(to_dict=lambda: {"quant_method": SimpleNamespace(value="gptq")})
    assert shape_from_config(config).weight_bytes == weight_bytes({"quant_method": "gptq"})


def test_an_unknown_method_is_told_once_and_counted_as_plain(caplog: pytest.LogCaptureFixture) -> None:
    config = LLAMA | {"quantization_config": {"quant_method": "vq2"}}
    assert shape_from_config(config).weight_bytes == shape_from_config(LLAMA).weight_bytes
    machine = HardwareProfile.preset("a100-40gb-pcie4")
    with caplog.at_level(logging.WARNING):
        advise(config, Workload(batch=1, prompt_tokens=100, new_tokens=10), machine, OffloadConfig())
    assert [record.getMessage() for record in caplog.records] == [
        "the quantization_config names 'vq2', which is not known here: weights are counted as not quantised"
    ]


@pytest.mark.parametrize("bits", ["four", 0, -1, True, 65])
def test_a_width_that_makes_no_sense_is_refused(bits: Any) -> None:
    with pytest.raises(ConfigError, match="bits in the quantization_config of llama is"):
        weight_bytes({"quant_method": "gptq", "bits": bits})


def test_roofline_reads_quantised_weights_and_a_plain_head() -> None:
    dims = dimensions_from_config(LLAMA | {"quantization_config": {"load_in_4bit": True}})
    setting = setting_of(dims, bits=(None, None, None), convention="fused")
    found = evaluate(dims, find_machine("a100-40gb-pcie4"), setting)
    rows = {row.name: row for row in found.decode.rows}
    assert rows["q_proj"].weight_bytes == LAYERS * H * H * 4.5 / 8
    assert rows["lm_head"].weight_bytes == 2 * H * VOCAB
    assert found.weight_bytes == dims.weight_bytes
    assert found.to_json()["w_bits"] == pytest.approx(4.5)
    assert "weights quantised by bitsandbytes: 4.5 bits in linear layers" in summary(found)
    asked = evaluate(dims, find_machine("a100-40gb-pcie4"), setting_of(dims, bits=(8, None, None), convention="fused"))
    assert asked.to_json()["w_bits"] == 8  # what a user asks for counts for every matrix
    unknown = dataclasses.replace(dims, quantization=dims.quantization._replace(method="vq2", scope="nothing"))
    lines = summary(evaluate(unknown, find_machine("a100-40gb-pcie4"), setting))
    assert "quantisation 'vq2' is not known: weights are counted as not quantised" in lines
