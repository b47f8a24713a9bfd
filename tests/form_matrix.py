"""Cells of forms with loss, each against a plain cache that went through the same forms, block by block.

Not a test module.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from matrix import FAST_LINK, Outcome, checking_backend, distance, leaves_no_trace, noted_statistics, profile
from models import WIDE, make_model
from modes import MODES, SHAPES, end_tokens, outcome
from quantizing import generating_with, quantizing_cache
from transformers import PreTrainedModel

from kvoffload import EmulatedLink, OffloadConfig
from kvoffload.config import GIB
from kvoffload.hf import OffloadedHFCache, given_cache
from kvoffload.session.session import Session
from kvoffload.session.stats import GenerationStats

TOLERANCE = 1e-5
# Where K or V differ in their last bit, a scale may be rounded the other way: then float64, where they do not.
ROUNDED, TOLERANCE_FLOAT64 = 1e-2, 1e-6
SLOW_LINK = EmulatedLink(h2d_gb_per_s=0.02)  # planned with: next to it nothing else takes time, so bytes decide
MODELS: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": WIDE,
    "gemma2": {**WIDE, "query_pre_attn_scalar": 32},
    "phi": {**WIDE, "num_key_value_heads": 4},
    "gpt2": {"hidden_size": 160, "n_embd": 160},  # heads of 40: rotated in blocks of 32 and 8
    "gpt_oss": WIDE,
    "mixtral": {**WIDE, "head_dim": 80},
}
FORMS = ("int8", "int4", "int2")
BLOCKS: dict[str, dict[str, Any]] = {
    "8x2": {"block_tokens": 8, "chunk_blocks": 2},
    "5x1": {"block_tokens": 5, "chunk_blocks": 1},
    "12x9": {"block_tokens": 12, "chunk_blocks": 9},
}
DEVICES = ("min", "some")
SPLITS: tuple[Any, ...] = ("transfer", 0.5, "auto")
PIPELINES: dict[str, dict[str, Any]] = {
    "pipelined": {},
    "whole_layer": {"attention": "whole_layer"},
    "sequential": {"overlap": False},
}


class Cell(NamedTuple):
    """One point of the matrix."""

    form: str
    mode: str
    architecture: str
    blocks: str
    device: str
    split: Any
    pipeline: str

    def __str__(self) -> str:
        return "-".join(map(str, self))


FACTORS = (FORMS, list(MODES), list(MODELS), list(BLOCKS), DEVICES, SPLITS, list(PIPELINES))


def full_product() -> Iterator[Cell]:
    """All of it, but for splits and pipelines, which go in rotation."""
    others = itertools.cycle(itertools.product(SPLITS, PIPELINES))
    for values in itertools.product(*FACTORS[:5]):
        yield Cell(*values, *next(others))


@functools.lru_cache(maxsize=8)
def model_of(architecture: str, *, is_double: bool = False) -> PreTrainedModel:
    """A tiny model with heads that can be encoded."""
    model = make_model(architecture, **MODELS[architecture])
    if is_double:
        model = model.double()
        if hasattr(model, "set_experts_implementation"):  # a grouped product is for shorter numbers
            model.set_experts_implementation("eager")
    end_tokens(model, SHAPES["early_ends"])  # as plain decoding gives them
    return model


class Seen(NamedTuple):
    """What an offloaded run did."""

    outcome: Outcome
    forms: dict[tuple[int, int], str]  # by layer and block, when last read
    stats: list[GenerationStats]


def config_of(cell: Cell, device_gib: Any) -> OffloadConfig:
    """Its options."""
    options: dict[str, Any] = {**BLOCKS[cell.blocks], **PIPELINES[cell.pipeline], "slots": 2, "speculate": "off"}
    options["deterministic"] = True  # planned for a slow link, run over a fast one
    return OffloadConfig(
        kv_dtype=cell.form,
        split=cell.split,
        link=FAST_LINK,
        profile=profile(SLOW_LINK.h2d_gb_per_s),
        device_gib=device_gib,
        **options,
    )


def device_gib(cell: Cell, *, is_double: bool) -> Any:
    """The cap of a cell; "some" has room for a third of the cache in its form."""
    if cell.device == "min":
        return "min"
    turns = run(cell._replace(device="min"), is_double=is_double).stats
    plan = max((stats.plan for stats in turns), key=lambda plan: plan.device_bytes)
    cache_bytes = plan.num_offloaded_layers * plan.num_blocks * plan.block_tokens * plan.bytes_per_token[cell.form]
    return (plan.device_bytes + cache_bytes / 3) / GIB


def run(cell: Cell, *, is_double: bool = False, damage: Callable[[OffloadedHFCache], None] | None = None) -> Seen:
    """The offloaded run of a cell, every access to buffers checked; `damage` is done before the first decode step."""
    model, mode = model_of(cell.architecture, is_double=is_double), MODES[cell.mode]
    forms, config = dict[tuple[int, int], str](), config_of(cell, device_gib(cell, is_double=is_double))

    damages = [] if damage is None else [damage]

    def before(module: Any, args: Any, kwargs: Any) -> None:
        cache = given_cache(args, kwargs)
        if isinstance(cache, OffloadedHFCache) and cache.core.layers[0].num_tokens:
            if damages:
                session.backend.synchronize()
                session.engine.drop()  # what was prefetched is still right
                damages.pop()(cache)
            for layer in cache.core.layers:
                forms.update({(layer.position, idx): block.form for idx, block in enumerate(layer.blocks)})

    with leaves_no_trace(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = Session(model, config, backend=checking_backend())
        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            with session, noted_statistics(model, session) as stats:
                found = outcome(mode.run(model, session.new_cache))
        finally:
            handle.remove()
    return Seen(found, forms, stats)


@contextmanager
def plain_with_forms(model: PreTrainedModel, cell: Cell, forms: dict[tuple[int, int], str]) -> Iterator[Any]:
    """A factory of plain caches whose blocks go through the same forms, and a model that takes one by default."""
    block_tokens = BLOCKS[cell.blocks]["block_tokens"]

    def new_cache() -> Any:
        return quantizing_cache(model, lambda layer, block: forms.get((layer, block), "kv"), block_tokens)

    own = vars(model).get("generate")
    vars(model)["generate"] = generating_with(model, new_cache)
    try:
        yield new_cache
    finally:
        del vars(model)["generate"]
        if own is not None:
            vars(model)["generate"] = own


def error_of(cell: Cell, seen: Seen, *, is_double: bool = False) -> float:
    """Distance to the plain run with the same forms."""
    model = model_of(cell.architecture, is_double=is_double)
    with plain_with_forms(model, cell, seen.forms) as new_cache:
        wanted = outcome(MODES[cell.mode].run(model, new_cache))
    return distance(seen.outcome, wanted)


def check(cell: Cell) -> None:
    """Logits and tokens are those of the plain run, and what was stored is what was asked for."""
    seen = run(cell)
    stored, stats = set(seen.forms.values()), seen.stats[-1]
    assert stored <= {"kv", "activation", *FORMS[: FORMS.index(cell.form) + 1]}
    assert not stats.exact
    assert stats.lossy_form in FORMS[: FORMS.index(cell.form) + 1]  # perhaps of the last block, which nobody read
    error = error_of(cell, seen)
    if TOLERANCE < error <= ROUNDED:
        error = error_of(cell, run(cell, is_double=True), is_double=True) / TOLERANCE_FLOAT64 * TOLERANCE
    assert error <= TOLERANCE
