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

from kvoffload.advise.advice import advise
from kvoffload.advise.roofline import evaluate, setting_of
from kvoffload.config import OffloadConfig
from kvoffload.errors import ConfigError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.machine import find_machine
from kvoffload.model.facts import QuantizedWeights
from kvoffload.model.model_shape import model_shape
from kvoffload.model.stored_facts import facts_of
from kvoffload.planning.workload import Workload
from kvoffload.profiler.drawing.terminal_tables import summary

LLAMA: dict[str, Any] = json.loads((CONFIGS / "llama-2-7b.json").read_text())
MIXTRAL: dict[str, Any] = json.loads((CONFIGS / "mixtral-8x7b.json").read_text())
H, WIDTH, LAYERS, VOCAB = 4096, 11008, 32, 32000
LINEAR = LAYERS * (4 * H * H + 3 * H * WIDTH)  # four projections, gate, up and down
OTHERS = 2 * VOCAB * H + (2 * LAYERS + 1) * H  # embedding, head, norms


def weight_bytes(quantization: Any, base: dict[str, Any] = LLAMA) -> int:
    return model_shape(base | {"quantization_config": quantization}).weight_bytes


def test_plain_weights_are_counted_as_before() -> None:
    assert weight_bytes(None) == weight_bytes({}) == model_shape(LLAMA).weight_bytes == 2 * (LINEAR + OTHERS)


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
        (["*.mlp"], LAYERS * MLP),
        (["vision_tower.layers.0.self_attn.q_proj", "re:visual.*", "model.visual"], 0),
        (["model"], LINEAR),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_key_names_modules_by_what_they_are_in_or_by_a_pattern(key: str, names: list[str], num_kept: int) -> None:
    kept_bytes = weight_bytes({"quant_method": "awq", key: names}) - weight_bytes({"quant_method": "awq"})
    assert kept_bytes == pytest.approx(num_kept * SAVED_BITS / 8, abs=1)


EXPERTS = 8 * 3 * 4096 * 14336  # of one layer


@pytest.mark.parametrize(
    ("name", "num_kept"),
    [
        (r"re:.*\.experts\..*", 32 * EXPERTS),
        ("re:.*block_sparse_moe.*", 32 * EXPERTS),  # as the files call what the class calls mlp
        ("model.layers.5.block_sparse_moe.experts", EXPERTS),
        ("model.layers.5.mlp", EXPERTS),
        ("mlp.experts", 32 * EXPERTS),
        ("gate", 0),  # of the class, which is no linear layer, and stays in any case
    ],
)
def test_experts_that_are_ignored_stay_whatever_file_or_class_call_them(name: str, num_kept: int) -> None:
    kept_bytes = weight_bytes({"quant_method": "awq", "ignore": [name]}, MIXTRAL)
    kept_bytes -= weight_bytes({"quant_method": "awq"}, MIXTRAL)
    assert kept_bytes == pytest.approx(num_kept * SAVED_BITS / 8, abs=1)


@pytest.mark.parametrize("method", [{"load_in_4bit": True}, {"quant_method": "hqq"}, {"quant_method": "torchao"}])
def test_loaders_that_look_for_linear_layers_leave_experts_side_by_side_alone(method: dict[str, Any]) -> None:
    kind = {"quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}}}
    saved = weight_bytes(None, MIXTRAL) - weight_bytes(method | kind, MIXTRAL)
    attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert saved == pytest.approx(attention * (16 - 4.5) / 8, abs=1)


@pytest.mark.parametrize(
    ("quantization", "linear_bits"),
    [
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, 4.5),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 3, "group_size": 32}}}, 4.2),
        ({"quant_method": "hqq", "nbits": 8, "group_size": 128}, 8.25),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}}, 4.25),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {"group_size": 64}}},
            },
            8.25,
        ),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only", "quant_type_kwargs": {"group_size": 32}}, 5),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}, 4 + 20 / 128),
        ({"quant_method": "intel/auto-round", "bits": 2, "group_size": 32}, 2 + 18 / 32),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, 4.5),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head*"]}, 8),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "W4A16_AWQ", "group_size": 64}}, 4.25),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "NVFP4",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 4, "type": "float", "group_size": 16},
                        "targets": ["Linear"],
                    }
                },
            },
            4.5,
        ),
        ({"quant_method": "fp8"}, 8 + 32 / 128 / 128),  # the blocks that its loader takes where none are given
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, 8 + 8 / 128 / 128),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
                        "targets": ["Linear"],
                    }
                },
                "ignore": ["lm_head"],
            },
            8,
        ),
    ],
    ids=lambda value: str(value.get("quant_method")) if isinstance(value, dict) else "",
)
def test_further_methods_shrink_linear_layers_to_their_bits(quantization: Any, linear_bits: float) -> None:
    assert weight_bytes(quantization) == pytest.approx(LINEAR * linear_bits / 8 + 2 * OTHERS, abs=1)


@pytest.mark.parametrize(
    ("quantization", "linear_bits", "num_kept"),
    [
        ({"quant_method": "hqq", "nbits": 4, "group_size": 64, "skip_modules": ["lm_head", "down_proj"]}, 4.5, "down"),
        (
            {
                "quant_method": "hqq",
                "quant_config": {
                    name: {"weight_quant_params": {"nbits": 4, "group_size": 64}}
                    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
                }
                | {"mlp.gate_proj": {"nbits": 4, "group_size": 64}, "mlp.up_proj": {"nbits": 4, "group_size": 64}},
            },
            4.5,
            "down",
        ),
        (
            {"quant_method": "auto-round", "bits": 4, "extra_config": {"model.layers.3.mlp": {"bits": 16}}},
            4 + 20 / 128,
            "one mlp",
        ),
        (
            {"quant_method": "auto-round", "bits": 4, "block_name_to_quantize": "model.layers"},
            4 + 20 / 128,
            "",
        ),
        ({"quant_method": "auto-round", "bits": 4, "block_name_to_quantize": "visual.blocks"}, 4 + 20 / 128, "all"),
        ({"quant_method": "gptq", "dynamic": {r"-:.*\.down_proj": {}}}, None, "down"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*down_proj", "lm_head"]}, 4.5, "down"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["model.layers.3.mlp*"]}, 4.5, "one mlp"),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"*_proj": {"quant_algo": "FP8"}, "lm_head": {"quant_algo": "FP8"}},
            },
            8,
            "",
        ),
        (
            {
                "quant_method": "torchao",
                "quant_type": {
                    "default": {
                        "_type": "FqnToConfig",
                        "_data": {
                            "fqn_to_config": {
                                "model.layers.3.mlp": None,
                                "_default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}},
                            }
                        },
                    }
                },
            },
            4.5,
            "one mlp",
        ),
    ],
    ids=lambda value: str(value.get("quant_method")) if isinstance(value, dict) else "",
)
def test_exceptions_of_each_method_stay_as_they_were(
    quantization: Any, linear_bits: float | None, num_kept: str
) -> None:
    kept = {"down": LAYERS * H * WIDTH, "one mlp": MLP, "all": LINEAR, "": 0}[num_kept]
    if linear_bits is None:
        plain = {name: value for name, value in quantization.items() if name != "dynamic"}
        index_bits = 32 / H  # of each down projection
        saved = kept * (16 - (4 + 20 / 128) - index_bits) / 8
        assert weight_bytes(quantization) - weight_bytes(plain) == pytest.approx(saved, abs=1)
        return
    expected = ((LINEAR - kept) * linear_bits + kept * 16) / 8 + 2 * OTHERS
    assert weight_bytes(quantization) == pytest.approx(expected, abs=1)


def test_the_head_is_left_alone_where_nobody_says_what_to_leave() -> None:
    head = VOCAB * H
    for method in ({"load_in_4bit": True}, {"quant_method": "fp8", "weight_block_size": [128, 128]}):
        by_default = weight_bytes(method)
        assert weight_bytes(method | {"modules_to_not_convert": ["lm_head"]}) == by_default
        bits = 4.5 if "load_in_4bit" in method else 8 + 32 / 128 / 128
        without = weight_bytes(method | {"modules_to_not_convert": ["nothing"]})
        assert by_default - without == pytest.approx(head * (16 - bits) / 8, abs=1)
    everything = {"quant_method": "torchao", "include_input_output_embeddings": True}
    everything |= {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {"group_size": 64}}}}
    expected = (LINEAR + 2 * head) * 8.25 / 8 + 2 * (OTHERS - 2 * head)
    assert weight_bytes(everything) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_what_is_made_plain_as_it_is_loaded_counts_as_plain(method: str) -> None:
    assert weight_bytes({"quant_method": method, "dequantize": True}, MIXTRAL) == weight_bytes(None, MIXTRAL)


def test_towers_are_quantised_like_the_rest() -> None:
    published = json.loads((CONFIGS.parent / "models.json").read_text())
    config = published["gemma-3-4b-it"]["config"]
    plain = facts_of(config)
    found = facts_of(config | {"quantization_config": {"load_in_4bit": True}})
    assert found.num_weights == plain.num_weights
    assert found.quantized is not None
    decoder = sum(one.num_values for one in found.matrices if one.part != "head")
    assert found.quantized.num_weights > decoder + 300_000_000
    spared = facts_of(
        config | {"quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": ["vision_tower"]}}
    )
    assert spared.quantized is not None
    assert spared.quantized.num_weights == decoder


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
    assert model_shape(config).weight_bytes == expected
    nested = {"text_config": LLAMA, "quantization_config": {"load_in_4bit": True}}
    assert model_shape(nested).weight_bytes == expected
    config.quantization_config = SimpleNamespace(to_dict=lambda: {"quant_method": SimpleNamespace(value="gptq")})
    assert model_shape(config).weight_bytes == weight_bytes({"quant_method": "gptq"})


def test_an_unknown_method_is_told_once_and_counted_as_plain(caplog: pytest.LogCaptureFixture) -> None:
    config = LLAMA | {"quantization_config": {"quant_method": "vq2"}}
    assert model_shape(config).weight_bytes == model_shape(LLAMA).weight_bytes
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
    dims = facts_of(LLAMA | {"quantization_config": {"load_in_4bit": True}})
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
    unknown = dataclasses.replace(dims, quantized=QuantizedWeights("vq2", False))
    lines = summary(evaluate(unknown, find_machine("a100-40gb-pcie4"), setting))
    assert "quantisation 'vq2' is not known: weights are counted as not quantised" in lines
