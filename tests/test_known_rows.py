"""Only what is known to go by rows is cut into slices: arguments, results, and layers with nothing foreign in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from matrix import checking_backend
from modes import COMMON, given, prompt
from streaming import config, streamable
from test_row_slices import layers_of, sliced
from torch import nn

from kvoffload.hf.row_slices import through_in_slices
from kvoffload.session.session import Session


class _Scaled(nn.Module):
    """With something for each row elsewhere."""

    def __init__(self, inner: nn.Module, scale: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.scale = inner, (scale,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x) * self.scale[0][: x.shape[0], None, None]
        return found


def _of_a_class_of_its_own(layer: Any, scale: torch.Tensor) -> None:
    kind = type(layer)

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return [kind.forward(self, hidden_states, **kwargs) * scale[: hidden_states.shape[0], None, None]]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.__call__(self, *args, **kwargs)[0]

    layer.__class__ = type("Own", (kind,), {"forward": forward, "__call__": call, "__module__": __name__})


def _with_a_forward_of_its_own(layer: Any, scale: torch.Tensor) -> None:
    call = layer.mlp.forward
    layer.mlp.forward = lambda x: call(x) * scale[: x.shape[0], None, None]


def _with_a_module_of_its_own(layer: Any, scale: torch.Tensor) -> None:
    layer.mlp = _Scaled(layer.mlp, scale)


def _with_a_hook(layer: Any, scale: torch.Tensor) -> None:
    layer.mlp.register_forward_hook(lambda module, args, output: output * scale[: output.shape[0], None, None])


@pytest.mark.parametrize(
    "change", [_of_a_class_of_its_own, _with_a_forward_of_its_own, _with_a_module_of_its_own, _with_a_hook]
)
def test_layers_with_something_of_somebody_else_in_them_pass_whole(change: Callable[..., None]) -> None:
    model, scale = streamable("llama"), torch.linspace(0.5, 1.5, 5)
    for layer in layers_of(model):
        change(layer, scale)
    wanted = model.generate(prompt(5, 20), **{**COMMON, "max_new_tokens": 4})
    with Session(model, config(model, 1, split="transfer"), checking_backend()) as session:
        weights = vars(model)["_kvoffload_session"]._weights
        assert not weights.may_slice
        sliced(session, 2)
        found = model.generate(prompt(5, 20), **{**COMMON, "max_new_tokens": 4})
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.allclose(torch.stack(found.logits), torch.stack(wanted.logits), atol=1e-5)


def test_what_is_planned_for_is_what_the_layers_allow() -> None:
    model = streamable("lora")
    with Session(model, config(model, 1), checking_backend()):
        weights = vars(model)["_kvoffload_session"]._weights
        assert weights.may_slice
        weights.need_whole_rows(True)
        assert not weights.may_slice
        weights.need_whole_rows(False)
        handle = layers_of(model)[2].self_attn.register_forward_pre_hook(lambda *args: None)
        assert not weights.may_slice
        handle.remove()
        assert weights.may_slice


def test_adapters_of_a_mixed_batch_are_those_of_their_rows() -> None:
    from peft import LoraConfig, get_peft_model

    targets = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model: Any = get_peft_model(streamable("llama"), targets, adapter_name="one").eval()
    model.add_adapter("two", targets)
    model.eval()
    names = ["one", "two", "__base__", "two", "one"]
    call = {"input_ids": prompt(5, 12), "adapter_names": names, "max_new_tokens": 4}
    wanted = model.generate(**call)
    with Session(model, config(model.base_model.model, 1), checking_backend()) as session:
        sliced(session, 2)
        assert torch.equal(model.generate(**call), wanted)


class _Pair(NamedTuple):
    states: torch.Tensor
    other: Any


def test_results_that_have_no_rows_are_made_of_all_rows_at_once() -> None:
    model, seen = streamable("llama"), []
    hidden = torch.rand(5, 6, 48)
    with Session(model, config(model, 0), checking_backend()) as session:
        cache = session.new_cache()

        def given_by(result: Callable[[torch.Tensor], Any]) -> Any:
            seen.clear()

            def forward(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
                seen.append(len(hidden_states))
                return result(hidden_states)

            kwargs = {"hidden_states": hidden, **given(cache)}
            return through_in_slices(forward, ["hidden_states"], 0, 2, (), kwargs)

        for result in (lambda x: [x], lambda x: {"x": x}, lambda x: (x, x.mean()), lambda x: (x, x.flatten(0, 1))):
            found = given_by(result)
            assert seen == [2, 5]
            assert type(found) is type(result(hidden))
        pair = given_by(lambda x: _Pair(x, None))
        assert seen == [2, 2, 1]
        assert isinstance(pair, _Pair)
        assert torch.equal(pair.states, hidden)


def test_arguments_whose_rows_are_not_known_are_not_cut() -> None:
    model = streamable("llama")
    with Session(model, config(model, 0), checking_backend()) as session:
        cache, seen = session.new_cache(), []

        def forward(hidden_states: torch.Tensor, bias: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            seen.append((tuple(hidden_states.shape), tuple(bias.shape)))
            return hidden_states

        hidden = torch.zeros(4, 6, 48)
        for bias in (torch.zeros(8, 1, 6), torch.zeros(4, 1, 6, 6), torch.zeros(1, 1, 6, 6), torch.zeros(6)):
            kwargs = {"hidden_states": hidden, "bias": bias, **given(cache)}
            found = through_in_slices(forward, ["hidden_states", "bias"], 0, 2, (), kwargs)
            assert found.shape == hidden.shape
        square = {"hidden_states": torch.zeros(4, 4, 48), "attention_mask": torch.zeros(4, 4), **given(cache)}
        through_in_slices(forward, ["hidden_states"], 0, 2, (), {**square, "bias": torch.zeros(1)})
        axes = torch.zeros(4, 4, 6, 12)
        for odd in (
            {"bias": torch.zeros(4)},
            {"bias": torch.zeros(1), "scales": [0.1] * 4},
            {"bias": torch.zeros(1), "position_ids": axes[0]},
            {"bias": torch.zeros(1), "position_embeddings": (axes, axes)},
        ):
            through_in_slices(forward, ["hidden_states"], 0, 2, (), {"hidden_states": hidden, **odd, **given(cache)})
        known = {"position_embeddings": [axes[0]] * 4, "cache_position": torch.zeros(4), "bias": torch.zeros(1)}
        through_in_slices(forward, ["hidden_states"], 0, 2, (), {"hidden_states": hidden, **known, **given(cache)})
    assert seen == [
        ((4, 6, 48), (8, 1, 6)),  # rows and heads in one
        ((4, 6, 48), (4, 1, 6, 6)),  # rows or heads
        *[((2, 6, 48), (1, 1, 6, 6))] * 2,
        *[((2, 6, 48), (6,))] * 2,
        ((4, 4, 48), (1,)),  # a mask of rows or of tokens
        ((4, 6, 48), (4,)),  # one for each row
        *[((4, 6, 48), (1,))] * 3,  # a list for each row, positions along as many axes as rows
        *[((2, 6, 48), (1,))] * 2,
    ]
