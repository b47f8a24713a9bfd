"""Weights that somebody changes or puts in the place of others while they are streamed are those that are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import checking_backend
from modes import prompt
from streaming import LAYERS, config, streamable
from torch import nn

from kvoffload import UnsupportedModelError
from kvoffload.session.session import Session


def _queries(model: Any) -> list[torch.Tensor]:
    return [layer.self_attn.q_proj.weight for layer in model.model.layers]


def _negated(model: Any) -> None:
    for weight in _queries(model):
        weight.data = -weight.data


def _swapped(model: Any) -> None:
    weights = _queries(model)
    for one, other in ((weights[1], weights[2]), (weights[0], weights[4])):
        one.data, other.data = other.data, one.data


def _rotated(model: Any) -> None:
    weights = _queries(model)
    values = [weight.data for weight in weights]
    for weight, value in zip(weights, values[1:] + values[:1], strict=True):
        weight.data = value


def _transposed(model: Any) -> None:
    for weight in _queries(model):
        weight.data = weight.data.t()


def _tied(model: Any) -> None:
    weights = _queries(model)
    weights[3].data = weights[1].data


CHANGES = [_negated, _swapped, _rotated, _transposed, _tied]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ["model", "decoder", "forward", "generate"])
def test_weights_in_the_place_of_others_are_read(way: str, change: Callable[[Any], None]) -> None:
    ids = prompt(2, 9)
    calls: dict[str, Callable[[Any], torch.Tensor]] = {
        "model": lambda model: model(ids, use_cache=False).logits,
        "decoder": lambda model: model.lm_head(model.model(ids, use_cache=False).last_hidden_state),
        "forward": lambda model: model.forward(ids, use_cache=False).logits,
        "generate": lambda model: model.generate(ids, max_new_tokens=3),
    }
    plain, model = streamable("llama"), streamable("llama")
    change(plain)
    with torch.no_grad():
        wanted = calls[way](plain)
        with Session(model, config(model, 2), checking_backend()):
            calls[way](model)
            change(model)
            assert torch.equal(calls[way](model), wanted)
            assert torch.equal(calls[way](model), wanted)
    for name, value in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name


@pytest.mark.parametrize("change", CHANGES)
def test_weights_in_the_place_of_others_stay_when_the_session_ends(change: Callable[[Any], None]) -> None:
    plain, model = streamable("llama"), streamable("llama")
    change(plain)
    with Session(model, config(model, 2), checking_backend()):
        change(model)
    for name, value in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name


def test_a_loop_over_layers_may_change_each_before_it_is_called() -> None:
    def loop(model: Any) -> torch.Tensor:
        hidden = model.model.embed_tokens(prompt(2, 9))
        cos_sin = model.model.rotary_emb(hidden, torch.arange(9)[None])
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data.neg_()
            hidden = layer(hidden, position_embeddings=cos_sin)
        return hidden  # type: ignore[no-any-return]

    model = streamable("llama")
    with torch.no_grad():
        wanted = loop(streamable("llama"))
        with Session(model, config(model, 0), checking_backend()):
            assert torch.equal(loop(model), wanted)


def test_a_layer_alone_reads_nothing_that_a_forward_that_failed_brought_ahead() -> None:
    def fail(*args: Any) -> None:
        raise ValueError("in the middle")

    model, hidden = streamable("llama"), torch.randn(1, 2, 48)
    cos_sin, layer = model.model.rotary_emb(hidden, torch.arange(2)[None]), model.model.layers[1]
    with torch.no_grad():
        with Session(model, config(model, 0), checking_backend()):
            handle = model.model.layers[0].mlp.register_forward_pre_hook(fail)
            with pytest.raises(ValueError, match="in the middle"):
                model(prompt(1, 3))  # the second layer is on its way by then
            handle.remove()
            layer.self_attn.q_proj.weight.neg_()
            found = layer(hidden, position_embeddings=cos_sin)
        assert torch.equal(found, layer(hidden, position_embeddings=cos_sin))


def test_weights_come_ahead_within_a_forward_of_the_model_alone() -> None:
    model = streamable("llama")
    backend, lanes = checking_backend(), []
    copy = backend.inner.copy_to_device

    def noted(*args: Any, lane: Any = "h2d") -> Any:
        lanes.append(lane)
        return copy(*args, lane=lane)

    backend.inner.copy_to_device = noted  # type: ignore[method-assign]
    seen: list[int] = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda *args: seen.append(lanes.count("weights")))
    with torch.no_grad(), Session(model, config(model, 0), backend):
        for call in (model, model.model):
            lanes.clear()
            call(prompt(1, 3), use_cache=False)
            assert lanes.count("weights") == LAYERS
    assert seen == [4, 3]


# ---- models that are out of the ordinary -----------------------------------------------------------------------------


def test_parameters_over_one_memory_stay_over_one_memory() -> None:
    model = streamable("llama")
    one, other = (layer.mlp.up_proj.weight for layer in model.model.layers[:2])
    other.data = one.data
    ids = prompt(2, 9)
    with Session(model, config(model, 0), checking_backend()):
        with torch.no_grad():
            one.neg_()
        found = model.generate(ids, max_new_tokens=3)
        assert one.data_ptr() == other.data_ptr()
    assert one.data_ptr() == other.data_ptr()
    assert torch.equal(found, model.generate(ids, max_new_tokens=3))


def test_a_buffer_without_elements_keeps_no_layer_from_being_streamed() -> None:
    model = streamable("llama")
    for layer in model.model.layers:
        layer.register_buffer("empty", torch.empty(0))
    wanted = model.generate(prompt(2, 9), max_new_tokens=3)
    with Session(model, config(model, 1), checking_backend()) as session:
        assert torch.equal(model.generate(prompt(2, 9), max_new_tokens=3), wanted)
        assert session.stats is not None
        assert session.stats.weight_bytes > 0


def test_a_model_made_under_inference_mode_is_refused_with_the_way_out() -> None:
    with torch.inference_mode():
        model = streamable("llama")
    with pytest.raises(UnsupportedModelError, match=r"inference_mode\(\).* outside of it"):
        Session(model, config(model, 1), checking_backend())
    assert model.generate(prompt(1, 4), max_new_tokens=2).shape == (1, 6)


def test_layers_that_were_compiled_in_place_stream_between_their_graphs() -> None:
    model = streamable("llama", 4)
    wanted = model.generate(prompt(2, 9), max_new_tokens=3)
    layer: nn.Module
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with pytest.warns(UserWarning, match="is compiled"):
        session = Session(model, config(model, 1), checking_backend())
    with session:
        assert torch.equal(model.generate(prompt(2, 9), max_new_tokens=3), wanted)
        assert session.stats is not None
        assert session.stats.weight_bytes == 3 * session.stats.plan.weight_bytes_per_step
