"""Models that are wrapped, hooked, quantised or compiled, and calls inside of torch's contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import SPLITS, compare, config
from matrix import TOLERANCE, FixedRates, checking_backend, distance, row_bytes
from models import make_model
from modes import MODES, outcome
from streaming import Int8Linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvoffload.session.session import Session
from kvoffload.store.recompute import FastRecompute


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama", num_key_value_heads=4)  # activations are half of K and V: "auto" recomputes


# ---- what a model may be wrapped in or made of -----------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", ["left_padding", "padded_beams", "prompt_lookup"])
def test_an_unmerged_lora_adapter_takes_part_in_recomputation(split: Any, mode: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = make_model("llama", num_key_value_heads=4)
    without = outcome(MODES[mode].run(model, None))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at first, which would change nothing
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    compare(model, lambda: MODES[mode].run(adapted, None)[0], split, wraps=adapted)
    assert distance(outcome(MODES[mode].run(adapted, None)), without) > 1e-2


@pytest.mark.parametrize("split", SPLITS)
def test_int8_linears_take_the_generic_path(split: Any, model: PreTrainedModel) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(module, name, Int8Linear(child))
    compare(model, lambda: MODES["left_padding"].run(model, None)[0], split)


@pytest.mark.parametrize("split", SPLITS)
def test_a_model_loaded_with_a_device_map(split: Any, model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, dtype=torch.float32).eval()
    compare(placed, lambda: MODES["padded_beams"].run(placed, None)[0], split)


@pytest.mark.parametrize("split", SPLITS)
def test_hooks_of_accelerate_on_every_module(split: Any, model: PreTrainedModel) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    compare(model, lambda: MODES["left_padding"].run(model, None)[0], split)


def test_hooks_of_accelerate_on_a_projection_switch_the_fast_path_off(model: PreTrainedModel) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    attention = model.model.layers[0].self_attn
    assert FastRecompute.applies_to(attention, torch.float32)
    add_hook_to_module(attention.k_proj, AlignDevicesHook())
    assert not FastRecompute.applies_to(attention, torch.float32)
    compare(model, lambda: MODES["left_padding"].run(model, None)[0], "recompute")


def test_a_forward_hook_on_a_projection_takes_part_in_recomputation(model: PreTrainedModel) -> None:
    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, args, output: output * 1.5)
    compare(model, lambda: MODES["left_padding"].run(model, None)[0], "recompute")
    handle.remove()


def test_an_adapter_added_between_two_calls_takes_part_in_the_second(model: PreTrainedModel) -> None:
    """What the fast path was checked against at one call may have changed at the next."""
    with Session(model, config("recompute"), checking_backend()):
        MODES["left_padding"].run(model, None)
        handle = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda m, args, output: output * 1.5)
        found = outcome(MODES["left_padding"].run(model, None))
    wanted = outcome(MODES["left_padding"].run(model, None))
    handle.remove()
    assert distance(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("how", ["wrapper", "module", "forward"])
def test_a_compiled_model_warns_once_and_generates_the_same(how: str, model: PreTrainedModel) -> None:
    wanted = outcome(MODES["left_padding"].run(model, None))
    if how == "wrapper":  # whose generate() runs the model inside it, which is not compiled
        compiled = torch.compile(model, backend="eager")
        with Session(compiled, config("recompute"), checking_backend()) as session:
            found = outcome(MODES["left_padding"].run(compiled, None))
    else:
        if how == "module":
            model.compile(backend="eager")
        else:
            model.forward = torch.compile(model.forward, backend="eager")
        with pytest.warns(UserWarning, match="LlamaForCausalLM is compiled") as caught:
            session = Session(model, config("recompute"), checking_backend())
        assert len(caught) == 1
        with session:
            found = outcome(MODES["left_padding"].run(model, None))
    assert session.stats is not None
    assert session.stats.recomputed_tokens > 0
    assert distance(found, wanted) <= TOLERANCE


# ---- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", ["left_padding", "padded_beams", "prompt_lookup", "chunked_prefill"])
def test_inside_inference_mode(split: Any, mode: str, model: PreTrainedModel) -> None:
    wanted = outcome(MODES[mode].run(model, None))
    with Session(model, config(split), checking_backend()) as session:
        if split == "auto":
            session.planner.measured = FixedRates(*row_bytes(model))
        with torch.inference_mode():
            found = outcome(MODES[mode].run(model, None))
        again = outcome(MODES[mode].run(model, None))  # buffers made in inference mode serve outside of it
        with torch.inference_mode():
            once_more = outcome(MODES[mode].run(model, None))
    for run in (found, again, once_more):
        assert distance(run, wanted) <= TOLERANCE


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", ["left_padding", "padded_beams"])
def test_inside_autocast(split: Any, mode: str, model: PreTrainedModel) -> None:
    """K/V are bfloat16 then: transferred bit for bit, recomputed to the last bits of bfloat16."""

    def run() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return MODES[mode].run(model, None)[0]

    wanted = run()
    with Session(model, config(split), checking_backend()) as session:
        if split == "auto":
            session.planner.measured = FixedRates(*row_bytes(model))
        found = run()
    stats = session.stats
    assert stats is not None
    assert stats.h2d_bytes > 0
    if split == "transfer":
        assert stats.exact
        assert distance(outcome([found]), outcome([wanted])) <= TOLERANCE
    else:
        # The first decode step is the first to read the cache; later ones may have taken another token by then.
        assert not stats.exact or stats.recomputed_tokens == 0
        step = (found.logits[1] - wanted.logits[1]).abs().max().item()
        assert step <= 2**-6 * wanted.logits[1].abs().max().item()


def test_full_precision_keys_from_half_precision_products_are_not_called_exact(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.register_forward_hook(lambda module, args, output: output.float())
    with Session(model, config("recompute"), checking_backend()) as session:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            MODES["left_padding"].run(model, None)
        assert session.stats is not None
        assert session.stats.recomputed_tokens > 0
        assert not session.stats.exact
        MODES["left_padding"].run(model, None)
        assert session.stats.exact
