"""Streamed weights in tests: models of several kinds, how much of them stays on the device, and what is left after.

Not a test module.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from matrix import FAST_LINK, checking_backend, distance, leaves_no_trace, noted_statistics, profile
from models import make_model
from modes import KINDS, Mode, Outcome, Shape, outcome, plain_cache
from torch import nn
from transformers import PreTrainedModel

from kvoffload import OffloadConfig
from kvoffload.backend import CheckingBackend
from kvoffload.config import GIB
from kvoffload.model.decoder_layers import decoder_layers, own_tensors
from kvoffload.planning.weights import WeightSizes
from kvoffload.session.session import Session
from kvoffload.session.stats import GenerationStats

LAYERS = 6
KINDS_OF_MODEL = (
    *("llama", "opt", "qwen3", "mixtral", "gemma3_text", "gpt_oss", "phi3"),
    *("lora", "int8", "tied", "lfm2", "gpt2"),
)
MODES = ("greedy", "beams", "prompt_lookup", "chunked_prefill", "multi_turn")
KEPT = ("slabs", "some", "all but three")
SPLITS = ("transfer", "recompute", 0.5)
PIPELINES: dict[str, dict[str, Any]] = {
    "pipelined": {},
    "whole_layer": {"attention": "whole_layer"},
    "kvpr": {"schedule": "kvpr"},
    "sequential": {"overlap": False},
    "drafts": {"speculate": 3},
}


class Int8Linear(nn.Module):
    """Weight-only int8: one scale per output, dequantised when it is used."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def streamable(kind: str, num_layers: int = LAYERS, **overrides: Any) -> PreTrainedModel:
    """A tiny model of so many layers, or one that is wrapped, quantised or tied."""
    layers: dict[str, Any] = {"num_hidden_layers": num_layers, **overrides}
    if kind in ("gemma3_text", "gpt_oss"):
        layers["layer_types"] = (["sliding_attention", "full_attention"] * num_layers)[:num_layers]
    if kind == "lfm2":
        layers["layer_types"] = (["conv", "full_attention"] * num_layers)[:num_layers]
    if kind == "gpt2":
        layers["n_layer"] = num_layers
    if kind == "tied":
        return make_model("llama", tie_word_embeddings=True, **layers)
    model = make_model(kind if kind not in ("lora", "int8") else "llama", **layers)
    if kind == "int8":
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if name.endswith("_proj"):
                    setattr(module, name, Int8Linear(child))
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:  # zero at first, which would change nothing
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def sizes_of(model: PreTrainedModel) -> WeightSizes:
    """Worked out from its tensors alone, each aligned as a slab has it."""
    layers = own_tensors(model, decoder_layers(model))
    inside = {id(tensor) for own in layers for tensor in own}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    outside = sum(one.numel() * one.element_size() for number, one in tensors.items() if number not in inside)
    return WeightSizes(
        outside=outside,
        layers=tuple(sum(-(-one.numel() * one.element_size() // 256) * 256 for one in own) for own in layers),
    )


def kept_gib(model: PreTrainedModel, num_resident: int) -> float:
    """`device_weights_gib` with which exactly so many layers stay."""
    return sizes_of(model).device_bytes(num_resident) / GIB


class Cell(NamedTuple):
    """One point of the matrix."""

    kind: str
    mode: str
    kept: str
    split: Any
    pipeline: str

    def __str__(self) -> str:
        return "-".join(map(str, self)).replace(" ", "_")

    @property
    def num_resident(self) -> int:
        return {"slabs": 0, "some": 2, "all but three": LAYERS - 3}[self.kept]


FACTORS = (KINDS_OF_MODEL, MODES, KEPT, SPLITS, tuple(PIPELINES))


def full_product() -> Iterator[Cell]:
    """Every model, mode and share; splits and pipelines in rotation, with periods of no common divisor."""
    splits, pipelines = itertools.cycle((*SPLITS, SPLITS[0])), itertools.cycle(PIPELINES)
    for kind, mode, kept in itertools.product(*FACTORS[:3]):
        yield Cell(kind, mode, kept, next(splits), next(pipelines))


@contextmanager
def weights_as_before(model: PreTrainedModel) -> Iterator[None]:
    """Afterwards every parameter and buffer is the same object with the same values, where and as it lay."""

    def found() -> dict[str, Any]:
        named = [*model.named_parameters(), *model.named_buffers()]
        return {
            name: (id(one), one.device, one.dtype, one.shape, one.stride(), one.requires_grad) for name, one in named
        }

    before, values = found(), {name: one.clone() for name, one in [*model.named_parameters(), *model.named_buffers()]}
    forwards = [layer.forward for layer in decoder_layers(model)]
    yield
    assert found() == before, "parameters are not what they were"
    for name, one in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(one, values[name]), f"{name} has other values"
    assert [layer.forward for layer in decoder_layers(model)] == forwards, "layers have a forward of ours"


class Streamed(NamedTuple):
    """What generations with streamed weights gave."""

    outcome: Outcome
    stats: list[GenerationStats]
    forwards: int
    sizes: WeightSizes


def config(model: PreTrainedModel, num_resident: int, **options: Any) -> OffloadConfig:
    """With so many layers on the device."""
    values: dict[str, Any] = {
        "block_tokens": 4,
        "chunk_blocks": 2,
        "slots": 2,
        "speculate": "off",
        "link": FAST_LINK,
        "profile": profile(),
        **options,
    }
    return OffloadConfig(device_weights_gib=kept_gib(model, num_resident), **values)


def run_streamed(
    model: PreTrainedModel, mode: Mode, options: OffloadConfig, backend: CheckingBackend | None = None
) -> Streamed:
    """Generate with a session of its own; afterwards nothing of it may be left."""
    sizes, forwards = sizes_of(model), 0

    def count(*args: Any) -> None:
        nonlocal forwards
        forwards += 1

    handle = model.register_forward_pre_hook(count)
    with leaves_no_trace(model), weights_as_before(model):
        session = Session(model, options, backend or checking_backend())
        with session, noted_statistics(model, session) as stats:
            result = outcome(mode.run(model, session.new_cache))
    handle.remove()
    return Streamed(result, stats, forwards, sizes)


def check_cell(cell: Cell) -> Streamed:
    """Run a cell beside plain `generate()` and compare tokens and logits."""
    model, mode = streamable(cell.kind), KINDS[cell.mode](Shape(rows=2, prompt_tokens=36))
    wanted = outcome(mode.run(model, lambda: plain_cache(model)))
    options = config(model, cell.num_resident, split=cell.split, **PIPELINES[cell.pipeline])
    if cell.mode in ("beams", "prompt_lookup"):
        options = replace(options, speculate="off")
    run = run_streamed(model, mode, options)
    assert distance(run.outcome, wanted) <= 1e-5
    return run
