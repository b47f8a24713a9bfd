"""Modes of generation and ways to offload, and the cells of a sweep: which modes run in which ways.

Owns what is called with which options. Does not judge what comes of it (`sweep`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from campaign.model_types import FIRST_TOKEN, VOCABULARY
from kvoffload import hf
from kvoffload.config import EmulatedLink, OffloadConfig
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.quantities import Curve, Point

PROMPT_TOKENS, NEW_TOKENS, TURN_TOKENS = 37, 12, 6
LINK = EmulatedLink(h2d_gb_per_s=5.0, d2h_gb_per_s=5.0)
COMMON: dict[str, Any] = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}

# ---- modes -----------------------------------------------------------------------------------------------------------

Mode = Callable[[PreTrainedModel, Callable[[], Any] | None], list[Any]]


def prompt(rows: int = 2, tokens: int = PROMPT_TOKENS, seed: int = 1) -> torch.Tensor:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, VOCABULARY, (rows, tokens), generator=generator)


def call(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """`generate` with the options of all modes."""
    mask = torch.ones_like(ids) if mask is None else mask
    generate: Any = model.generate
    return generate(input_ids=ids, attention_mask=mask, **{**COMMON, **kwargs})


def _greedy(model: PreTrainedModel, new_cache: Any) -> list[Any]:
    return [call(model, prompt())]


def _beams(model: PreTrainedModel, new_cache: Any) -> list[Any]:
    return [call(model, prompt(), num_beams=3)]


def _lookup(model: PreTrainedModel, new_cache: Any) -> list[Any]:
    return [call(model, prompt(1, PROMPT_TOKENS // 3).repeat(1, 3), prompt_lookup_num_tokens=4)]


def _turns(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
    name = hf.generation_name()
    given = {} if new_cache is None else {name: new_cache()}
    first = call(model, prompt(), max_new_tokens=TURN_TOKENS, **given)
    tokens = torch.cat([first.sequences, prompt(tokens=TURN_TOKENS, seed=2)], dim=1)
    given = given or {name: hf.returned_cache(first)}
    return [first, call(model, tokens, max_new_tokens=TURN_TOKENS, **given)]


def _padding(model: PreTrainedModel, new_cache: Any) -> list[Any]:
    ids = prompt(3)
    mask = torch.ones_like(ids)
    for row, padding in ((1, 8), (2, 13)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return [call(model, ids, mask)]


MODES: dict[str, Mode] = {
    "greedy": _greedy,
    "beams": _beams,
    "lookup": _lookup,
    "turns": _turns,
    "padding": _padding,
}

# ---- ways ------------------------------------------------------------------------------------------------------------


def _profile() -> HardwareProfile:
    """A machine whose arithmetic takes almost no time, so that planning has something to gain."""
    assert LINK.h2d_gb_per_s is not None
    rate = LINK.h2d_gb_per_s * 1e9
    link = Curve(unit="bytes", points=tuple(Point((size,), size / rate, 0.0) for size in (1e3, 1e9)))
    gemm = Curve(unit="m,n,k", points=tuple(Point((m, 64.0, 64.0), m * 1e-13, 0.0) for m in (1.0, 1e3)))
    attention = Curve(unit="bytes", points=tuple(Point((size,), size * 1e-15, 0.0) for size in (1e3, 1e9)))
    return HardwareProfile(
        device_name="sweep",
        link_name="emulated",
        emulated_link=True,
        key="sweep",
        h2d=link,
        d2h=link,
        gemm=gemm,
        attention=attention,
        device_copy_bytes_per_s=1e12,
        device_memory_bytes=2**30,
        host_s_per_layer=0.0,
        host_s_per_chunk=0.0,
        gap_s=0.0,
    )


def _config(**values: Any) -> OffloadConfig:
    common: dict[str, Any] = {"device_gib": "min", "block_tokens": 8, "link": LINK, "profile": _profile()}
    return OffloadConfig(**{**common, **values})


WAYS: dict[str, OffloadConfig] = {
    "transfer": _config(split="transfer"),
    "recompute": _config(split="recompute"),
    "half": _config(split=0.5),
    "auto": _config(split="auto"),
    "whole_layer": _config(split=0.5, attention="whole_layer"),
    "unpaced": OffloadConfig(split="transfer", device_gib="min", block_tokens=8, link=EmulatedLink()),
}
SPLITS = ("transfer", "recompute", "half", "auto")
# One type of each kind, and cells that meet every mode and split once, for those who have less time.
QUICK = (
    *("llama", "gpt2", "bloom", "gemma2", "gpt_oss", "deepseek_v3", "deepseek_v32", "qwen3_next"),
    *("gemma4_text", "bart", "qwen2_vl", "doge", "mllama", "falcon_h1", "mamba"),
)
QUICK_CELLS = (
    ("greedy", "recompute"),
    ("beams", "transfer"),
    ("lookup", "half"),
    ("turns", "auto"),
    ("padding", "half"),
)
CELLS = (*((mode, way) for mode in MODES for way in SPLITS), ("greedy", "whole_layer"), ("greedy", "unpaced"))
