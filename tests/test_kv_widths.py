"""Widths of keys and values without memory, against a real small forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import OTHERS, RECOMPUTABLE, TRANSFERRED, make_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvoffload.model import kv_widths as module
from kvoffload.model.cache_layers import cache_layers
from kvoffload.model.facts import KV
from kvoffload.model.kv_widths import kv_widths, projected_widths
from kvoffload.model.learn import without_memory


def widths_of(model: PreTrainedModel, layers: Any = None) -> list[KV | None]:
    text = model.config.get_text_config(decoder=True)
    twin = without_memory(type(model), copy.deepcopy(model.config))
    return kv_widths(twin, text, layers or cache_layers(text))


def real_widths(model: PreTrainedModel) -> list[KV | None]:
    cache = DynamicCache(config=model.config)
    name = "cache" if "cache" in module.argument_names(model) else "past_key_values"
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True, **{name: cache})
    tensors = [(getattr(one, "keys", None), getattr(one, "values", None)) for one in cache.layers]
    return [None if k is None else KV(k.shape[1], k.shape[-1], v.shape[-1]) for k, v in tensors]


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that showed what they cache; the projections say nothing."""
    found: list[int] = []
    note = module._note
    monkeypatch.setattr(module, "projected_kv", lambda *_: None)
    monkeypatch.setattr(
        module, "_note", lambda known, wanted, kind, kv: (found.append(1), note(known, wanted, kind, kv))
    )
    return found


@pytest.mark.parametrize("name", [*RECOMPUTABLE, *TRANSFERRED, *OTHERS])
def test_they_are_those_of_a_real_forward(name: str, notes: list[int]) -> None:
    model = make_model(name)
    real = real_widths(model)
    found = widths_of(model)[: len(real)]
    assert [kv for kv, other in zip(found, real, strict=True) if other] == [other for other in real if other]


def test_a_model_of_equal_layers_is_known_after_the_first(notes: list[int]) -> None:
    assert widths_of(make_model("llama", num_hidden_layers=20)) == [KV(2, 12, 12)] * 20
    assert len(notes) == 1


def test_layers_of_two_kinds_are_both_seen(notes: list[int]) -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 6
    config = AutoConfig.for_model(
        "gemma4_text", hidden_size=64, intermediate_size=96, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, num_global_key_value_heads=1, head_dim=16, global_head_dim=48, attention_k_eq_v=True,
        layer_types=kinds, sliding_window=32, vocab_size=100, hidden_size_per_layer_input=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    found = widths_of(model)
    assert found == real_widths(model)
    assert set(found) == {KV(2, 16, 16), KV(1, 48, 48)}
    assert len(notes) == 6


def test_experts_that_choose_by_values_give_back_what_they_get(notes: list[int]) -> None:
    model = make_model("mixtral")
    layers, real = cache_layers(model.config), real_widths(model)
    # each layer of a kind of its own: the forward has to pass experts, which cannot run without values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_kinds", lambda _model, caches: list(range(len(caches))))
        experts = type(model.model.layers[0].mlp.experts)
        patch.setattr(experts, "forward", lambda *_args, **_kwargs: torch.zeros(1, device="meta").item())
        assert widths_of(model, layers) == real


def test_projections_say_it_where_no_forward_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    text = model.config

    def fail(*_args: object) -> None:
        raise RuntimeError("no forward")

    monkeypatch.setattr(module, "_forward", fail)
    assert widths_of(model) == [KV(2, 12, 12)] * 3
    assert projected_widths(model, text, cache_layers(text)) == [KV(2, 12, 12)] * 3
    model.model.layers[1].self_attn.v_proj = torch.nn.Linear(48, 2 * 5)
    assert projected_widths(model, text, cache_layers(text))[1] == KV(2, 12, 5)


def test_neither_random_numbers_nor_the_default_dtype_change() -> None:
    model = make_model("qwen2")
    state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    widths_of(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_default_dtype() == dtype
