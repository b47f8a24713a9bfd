"""Tokens, rows, layers and turns that are not like the first ones, for which a decision was made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import config
from matrix import TOLERANCE, checking_backend
from models import make_model
from modes import COMMON, given, plain_cache, prompt
from transformers import PreTrainedModel

from kvoffload import UnsupportedModelError
from kvoffload.session.session import Session
from kvoffload.store.tail import KVShape, NewTokens
from kvoffload.store.verification import Probe, rows_are_alike, sampled

LATER = "K/V of some tokens cannot be recomputed"
CHANGED = "does not compute the K and V that it cached any more"
ATTENTION = ["auto", "whole_layer"]

Hook = Callable[[Any, Any, torch.Tensor], torch.Tensor]


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama", num_key_value_heads=4)


def steps(model: Any, cache: Any, tokens: torch.Tensor, count: int = 14) -> list[torch.Tensor]:
    """Logits of greedy steps, the first over `tokens`."""
    logits = []
    with torch.no_grad():
        for _ in range(count):
            logits.append(model(tokens, **given(cache)).logits[:, -1])
            tokens = logits[-1].argmax(-1, keepdim=True)
    return logits


def hooked(model: Any, hook: Hook, layer: int = 1) -> Any:
    return model.model.layers[layer].self_attn.k_proj.register_forward_hook(hook)


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert (ours - theirs).abs().max().item() <= TOLERANCE, f"step {step}"


def on_single_tokens(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 0.3 if output.shape[1] == 1 else output


def on_the_first_tokens(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 0.3 * (torch.arange(output.shape[1]) < 5).view(1, -1, 1) if output.shape[1] > 20 else output


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("hook", [on_single_tokens, on_the_first_tokens])
def test_tokens_unlike_those_that_were_compared_are_transferred(
    hook: Hook, attention: Any, model: PreTrainedModel
) -> None:
    hooked(model, hook)
    with Session(model, config("recompute", attention=attention), checking_backend()) as session:
        cache = session.new_cache()
        with pytest.warns(UserWarning, match=LATER):
            found = steps(model, cache, prompt(2, 41))
        forms = [{block.form for block in layer.blocks} for layer in cache.core.layers]
    assert_same(found, steps(model, plain_cache(model), prompt(2, 41)))
    assert "kv" in forms[1]
    assert forms[0] == forms[2] == {"activation"}


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_hook_added_between_two_turns_takes_part_in_the_second(attention: Any, model: PreTrainedModel) -> None:
    """The fast path keeps what it had for the blocks of the first, which it was right for."""

    def play(cache: Any) -> list[torch.Tensor]:
        logits = steps(model, cache, prompt(2, 21))
        handle = hooked(model, lambda module, args, output: output * 1.5)
        logits += steps(model, cache, prompt(2, 9, seed=2))
        handle.remove()
        return logits

    with (
        Session(model, config("recompute", attention=attention), checking_backend()) as session,
        pytest.warns(UserWarning, match=LATER),
    ):
        found = play(session.new_cache())
    assert_same(found, play(plain_cache(model)))


@pytest.mark.parametrize("first_tokens", [1, 6])
@pytest.mark.parametrize("layer", [0, 2])
def test_weights_that_change_between_two_turns_are_refused_or_transferred(
    layer: int, first_tokens: int, model: PreTrainedModel
) -> None:
    """Also where the second turn of `generate()` begins with a single token."""
    weight = model.model.layers[layer].self_attn.v_proj.weight

    def play(cache: Any) -> list[torch.Tensor]:
        logits = []
        with torch.no_grad():
            tokens = prompt(2, 21)
            for turn in range(2):
                output = model.generate(tokens, **given(cache), **COMMON)
                logits += output.logits
                tokens = torch.cat([output.sequences, prompt(2, first_tokens - 1, seed=3)], 1)
                weight.mul_(1.5 if turn == 0 else 1 / 1.5)
        return logits

    wanted = play(plain_cache(model))
    with Session(model, config("transfer"), checking_backend()) as session:
        assert_same(play(session.new_cache()), wanted)
    with (
        Session(model, config("recompute"), checking_backend()) as session,
        pytest.raises(UnsupportedModelError, match=CHANGED),
    ):
        play(session.new_cache())


@pytest.mark.parametrize("adapter", ["disabled", "another"])
def test_an_adapter_that_changes_between_two_turns_is_refused(adapter: str, model: PreTrainedModel) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["k_proj", "v_proj"], layers_to_transform=[1], init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    adapted.add_adapter("another", lora)
    adapted.eval()
    with Session(adapted, config("recompute"), checking_backend()) as session:
        cache = session.new_cache()
        steps(adapted, cache, prompt(2, 21))
        if adapter == "another":
            adapted.set_adapter("another")
            with pytest.raises(UnsupportedModelError, match=CHANGED):
                steps(adapted, cache, prompt(2, 9, seed=2))
        else:
            with adapted.disable_adapter(), pytest.raises(UnsupportedModelError, match=CHANGED):
                steps(adapted, cache, prompt(2, 9, seed=2))


def test_an_adapter_for_each_row_with_beams(model: PreTrainedModel) -> None:
    """It is named for rows as they are in a forward; the blocks of a prompt have fewer."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    adapted.add_adapter("another", lora)
    adapted.eval()

    def play() -> Any:
        names = ["default", "another"]
        with torch.no_grad():
            return adapted.generate(prompt(2), adapter_names=names, num_beams=3, **COMMON).logits

    with (
        Session(adapted, config("recompute"), checking_backend()),
        pytest.warns(UserWarning, match=LATER),
    ):
        found = play()
    assert_same(list(found), list(play()))


@pytest.mark.parametrize("split", ["transfer", "recompute"])
def test_sequences_of_one_prompt_that_differ_from_a_later_layer_on_are_not_stored_once(
    split: Any, model: PreTrainedModel
) -> None:
    def steer(module: Any, args: Any, output: Any) -> Any:
        return output + 0.5 * torch.arange(output.shape[0]).view(-1, 1, 1)

    def play(**kwargs: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        kwargs |= COMMON | {"do_sample": True, "num_return_sequences": 2}
        with torch.no_grad():
            return list(model.generate(prompt(1), **kwargs).logits)

    model.model.layers[0].register_forward_hook(steer)
    wanted = play()
    with Session(model, config(split), checking_backend()) as session:
        with pytest.raises(UnsupportedModelError, match="new_cache"):
            play()
        assert_same(play(**given(session.new_cache())), wanted)


# ---- the parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "rows", "count"), [(1, 1, 2), (7, 3, 7), (300, 1, 256), (300, 64, 16), (20, 999, 16)]
)
def test_a_sample_spreads_from_the_first_token_to_the_last(tokens: int, rows: int, count: int) -> None:
    found = sampled(tokens, rows)
    assert len(found) == count
    assert (found[0], found[-1]) == (0, tokens - 1)
    assert list(found) == sorted(found)
    assert tokens == 1 or len(set(found)) == count


def test_a_probe_notices_what_computes_otherwise() -> None:
    x, kv = torch.randn(3, 5, 8), torch.randn(3, 2, 5, 4)
    keys, values = kv[:, :1], kv[:, 1:]
    probe, shape = Probe.of(x, (), keys, values), KVShape.of(keys, values)

    def way(activation: torch.Tensor, embeddings: Any, out: torch.Tensor) -> None:
        assert torch.equal(activation, x[:, -1].expand(2, -1, -1))
        out.copy_(kv[:, :, -1].flatten(1).expand(2, -1, -1) * factor)

    for factor in (1.0, 1.01):
        assert probe.agrees(way, shape, x.device) is (factor == 1.0)


def test_rows_that_differ_by_rounding_or_in_few_tokens_are_alike() -> None:
    keys = torch.randn(9, 2, 1, 4).repeat_interleave(2, 1)
    assert rows_are_alike(NewTokens(keys, keys), 2)
    near = keys.clone()
    near[:, 1] *= 1 + 1e-6
    near[3, 1] += 1.0
    assert rows_are_alike(NewTokens(near, keys), 2)
    far = keys.clone()
    far[:, 3] += 0.1
    assert not rows_are_alike(NewTokens(keys, far), 2)
