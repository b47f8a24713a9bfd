"""Shapes of models that are loaded: their own bytes, nothing of theirs is run, and a way out for exotic ones."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from models import OTHERS, RECOMPUTABLE, TRANSFERRED, make_model
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import kvoffload
from kvoffload.model import live
from kvoffload.model.live import facts_of_live, shape_of_model


@pytest.mark.parametrize("name", [*RECOMPUTABLE, *TRANSFERRED, *OTHERS])
def test_weights_are_the_models_own_and_the_rest_is_that_of_its_configuration(name: str) -> None:
    model = make_model(name)
    shape = shape_of_model(model)
    assert shape.weight_bytes == sum(one.numel() * one.element_size() for one in model.parameters())
    described = kvoffload.model_shape(model.config)
    assert shape == described


def test_neither_the_models_modules_nor_its_hooks_run_and_nothing_of_it_changes() -> None:
    model = make_model("llama")
    before, config = dict(model.state_dict()), model.config.to_json_string()
    attention = model.config._attn_implementation

    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("it was run")

    for module in model.modules():
        module.register_forward_pre_hook(fail)
    live._of_twin.cache_clear()
    assert shape_of_model(model).kv_row_bytes == 2 * 2 * 12 * 4
    assert model.config.to_json_string() == config
    assert model.config._attn_implementation == attention
    assert all(
        model.state_dict()[name] is not None and torch.equal(model.state_dict()[name], before[name]) for name in before
    )


def test_a_configuration_is_looked_at_once() -> None:
    live._of_twin.cache_clear()
    for seed in range(3):
        shape_of_model(make_model("qwen3", seed=seed))
    assert (live._of_twin.cache_info().misses, live._of_twin.cache_info().hits) == (1, 2)
    changed = make_model("qwen3", num_hidden_layers=2)
    assert shape_of_model(changed).num_layers == 2


def test_weights_that_differ_from_the_configurations_dtype_count_as_they_are() -> None:
    model = make_model("llama").to(torch.bfloat16)
    model.lm_head.to(torch.float32)
    others = sum(one.numel() for one in model.model.parameters())
    shape = shape_of_model(model)
    assert shape.weight_bytes == 2 * others + 4 * model.lm_head.weight.numel()
    assert shape.kv_itemsize_bytes == 2


def test_adapters_count_as_weights_of_the_model_inside() -> None:
    model = make_model("llama")
    plain = shape_of_model(model)
    adapted = shape_of_model(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])))
    assert adapted.weight_bytes > plain.weight_bytes
    assert adapted.kv_row_bytes == plain.kv_row_bytes


class Theirs(LlamaForCausalLM):
    """A class of a user, which is never made a second time."""

    made = 0

    def __init__(self, config: Any) -> None:
        type(self).made += 1
        super().__init__(config)


def test_a_users_class_is_read_by_its_modules_and_never_made_again() -> None:
    model = make_model("llama")
    theirs = Theirs(model.config)
    assert shape_of_model(theirs) == shape_of_model(model)
    assert Theirs.made == 1


def test_a_model_that_cannot_be_looked_at_is_read_by_its_configuration_and_still_offloads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama")
    known = shape_of_model(model)

    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("no way in")

    live._of_twin.cache_clear()
    monkeypatch.setattr(live, "facts_of_model", fail)
    with caplog.at_level(logging.DEBUG, logger="kvoffload.model.live"):
        found = facts_of_live(model)
    assert not found.is_exact
    assert shape_of_model(model).kv_row_bytes == known.kv_row_bytes
    assert len(caplog.records) == 2
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(kvoffload.generate(model, ids, max_new_tokens=3, do_sample=False), expected)
    live._of_twin.cache_clear()


@pytest.mark.timing
def test_a_tiny_model_takes_milliseconds_and_one_met_before_almost_nothing() -> None:
    model = make_model("llama")
    shape_of_model(model)
    first, again = [], []
    for _ in range(10):
        live._of_twin.cache_clear()
        for took in (first, again):
            began = time.perf_counter()
            shape_of_model(model)
            took.append(time.perf_counter() - began)
    live._of_twin.cache_clear()
    assert min(first) < 0.03
    assert min(again) < 0.003


def test_an_encoder_decoder_is_refused_as_its_configuration_is() -> None:
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    for given in (config, T5ForConditionalGeneration(config)):
        with pytest.raises(kvoffload.UnsupportedModelError, match="encoder-decoder; only decoder-only"):
            kvoffload.model_shape(given)


def test_a_model_type_that_is_no_name_is_told() -> None:
    with pytest.raises(kvoffload.ConfigError, match=r"model_type must be a name such as 'llama', got \['llama'\]"):
        kvoffload.model_shape({"model_type": ["llama"], "hidden_size": 16})
