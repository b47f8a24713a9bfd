"""Calls and models that drafts cannot serve: an error where a number was asked for, plain decoding under "auto"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drafting import NEW_TOKENS, OPTIONS, session_of
from matrix import distance, leaves_no_trace
from models import make_model
from modes import Shape as Inputs
from modes import assistant_of, once, outcome, plain_cache, prompt
from transformers import PreTrainedModel

import kvoffload
from kvoffload import ConfigError, OffloadConfig
from kvoffload.hf import offloaded_cache


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama")


# ---- what cannot be served -------------------------------------------------------------------------------------------


CANNOT: dict[str, tuple[Callable[[PreTrainedModel], dict[str, Any]], str]] = {
    "beams": (lambda model: {"num_beams": 2}, "beam search"),
    "an assistant": (lambda model: {"assistant_model": assistant_of(model)}, "assisted generation"),
    "prompt lookup": (lambda model: {"prompt_lookup_num_tokens": 3}, "assisted generation"),
    "hidden states": (lambda model: {"output_hidden_states": True}, "output_hidden_states"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_a_number_of_drafts_that_cannot_be_served_is_an_error(case: str, model: PreTrainedModel) -> None:
    options, reason = CANNOT[case]
    call = {**OPTIONS, **options(model)}
    wanted = model.generate(prompt(1), **call)
    with leaves_no_trace(model), session_of(model) as session:
        with pytest.raises(ConfigError, match=rf"speculate=4 cannot serve this generate\(\): .*{reason}.*'off'"):
            model.generate(prompt(1), **call)
        assert session.pool.used_bytes == 0
    with session_of(model, "auto"):
        assert torch.equal(model.generate(prompt(1), **call).sequences, wanted.sequences)


def test_a_model_that_cannot_take_tokens_back_is_an_error() -> None:
    model = make_model("bamba")
    with session_of(model) as session:
        with pytest.raises(ConfigError, match="speculate=4 cannot serve.*cannot take tokens back"):
            model.generate(prompt(1), **OPTIONS)
        assert session.pool.used_bytes == 0


def test_sliding_layers_that_show_too_much_before_a_crop_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of transformers 5.17 do; a model without such layers is served there as well."""
    monkeypatch.setattr(offloaded_cache, "_forwards_may_follow", lambda: False)
    model = make_model("gemma3_text")
    wanted = model.generate(prompt(1), **OPTIONS)
    with session_of(model) as session:
        with pytest.raises(ConfigError, match=r"sliding layers of this release of transformers \(5.17\)"):
            model.generate(prompt(1), **OPTIONS)
        assert session.pool.used_bytes == 0
    with session_of(model, "auto"):
        assert torch.equal(model.generate(prompt(1), **OPTIONS).sequences, wanted.sequences)
    llama = make_model("llama")
    with session_of(llama) as session:
        llama.generate(prompt(1), **OPTIONS)
    assert session.stats is not None
    assert session.stats.drafted_tokens > 0


def test_a_model_whose_attention_is_not_known_is_an_error() -> None:
    model = make_model("bloom")
    with session_of(model), pytest.raises(ConfigError, match="speculate=4 cannot serve.*whole layers"):
        model.generate(prompt(1), **OPTIONS)


def test_whole_layers_asked_for_are_an_error(model: PreTrainedModel) -> None:
    with session_of(model, attention="whole_layer"), pytest.raises(ConfigError, match=r"speculate=4.*whole_layer"):
        model.generate(prompt(1), **OPTIONS)


@pytest.mark.parametrize("number", [16, -1, 2.0, True, "on", None])
def test_a_number_out_of_range_is_an_error(number: Any) -> None:
    with pytest.raises(ConfigError, match="speculate must be 'auto', 'off' or a whole number of drafts from 1 to 15"):
        OffloadConfig(speculate=number)


def test_no_drafts_can_be_said_as_a_number() -> None:
    assert OffloadConfig(speculate=0).fixed_drafts == OffloadConfig(speculate="off").fixed_drafts == 0


def test_an_unpaced_link_drafts_if_asked_to(model: PreTrainedModel) -> None:
    wanted = model.generate(prompt(2), **OPTIONS)
    with kvoffload.offload(model, OffloadConfig(speculate=4, block_tokens=4)) as session:
        found = model.generate(prompt(2), **OPTIONS)
    assert torch.equal(found.sequences, wanted.sequences)
    assert session.stats is not None
    assert session.stats.draft_acceptance is not None


# ---- rotations that change with the length ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("tokens", [30, 45])
def test_no_pass_crosses_the_length_at_which_rotations_change(kind: str, tokens: int) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    architecture, sizes = "llama", {}
    if kind == "longrope":
        architecture, sizes = "phi3", {"original_max_position_embeddings": 40}
        half = [1.0 + 0.3 * idx for idx in range(6)]
        rope |= {"short_factor": half, "long_factor": [2 * one for one in half]}
        rope["original_max_position_embeddings"] = 40
        del rope["factor"]
    limit = 160 if kind == "longrope" else 40
    # Beyond the length the frequencies of `dynamic` stay where the last generation left them: a model for each.
    model, another = (
        make_model(architecture, max_position_embeddings=limit, rope_parameters=rope, **sizes) for _ in range(2)
    )
    mode = once(Inputs(rows=2, prompt_tokens=tokens, new_tokens=NEW_TOKENS), padded=True)
    wanted = outcome(mode.run(another, lambda: plain_cache(another)))
    with session_of(model, 15) as session:
        found = outcome(mode.run(model, None))
    assert distance(found, wanted) <= 1e-5
    assert session.stats is not None
    assert session.stats.tokens_per_pass is not None
    assert (session.stats.tokens_per_pass > 1) == (kind == "longrope" or tokens < 40)
