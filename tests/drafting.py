"""Verified drafts in tests: drafts made worse on purpose, and cells of a matrix.

Not a test module.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from matrix import (
    FAST_LINK,
    checking_backend,
    distance,
    leaves_no_trace,
    model_for,
    noted_statistics,
    profile,
    row_bytes,
)
from models import OTHERS, RECOMPUTABLE, WIDE, make_model
from modes import COMMON, KINDS, Mode, Outcome, Shape, outcome, plain_cache
from transformers import PreTrainedModel

from kvoffload import OffloadConfig
from kvoffload.config import GIB
from kvoffload.draft.rounds import Rounds
from kvoffload.session.session import Session
from kvoffload.session.stats import GenerationStats

ARCHITECTURES = (
    *("llama", "opt", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "cohere2"),
    *("starcoder2", "granite", "mixtral", "gpt_oss", "exaone4", "gpt2", "lfm2", "gemma3n_text"),
)
MODES = (
    *("greedy", "sampling", "left_padding", "chunked_prefill", "multi_turn", "returned_cache", "early_ends"),
    "return_sequences",
)
BATCHES = (1, 3, 8)
NUMBERS = (1, 4, 15)
QUALITIES = (1.0, 0.7, 0.0)  # share of the drafts that are left as they are
# What is on the device: the newest tokens, some blocks, some and copies of 4 bits of the others, everything.
DEVICES = ("tail", "window", "shadow", "all")
SPLITS = ("transfer", "recompute", 0.5)
BLOCK_TOKENS = 4
NEW_TOKENS = 24
OPTIONS: dict[str, Any] = {**COMMON, "max_new_tokens": NEW_TOKENS}


class Cell(NamedTuple):
    """One point of the matrix."""

    architecture: str
    mode: str
    rows: int
    number: int
    quality: float
    device: str
    split: Any

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @property
    def shape(self) -> Shape:
        return Shape(rows=self.rows, new_tokens=24)


FACTORS = (ARCHITECTURES, MODES, BATCHES, NUMBERS, QUALITIES, DEVICES, SPLITS)


def full_product() -> Iterator[Cell]:
    """Every architecture, mode, batch and device; the rest goes in rotation, with periods of no common divisor."""
    numbers, qualities = itertools.cycle(NUMBERS), itertools.cycle((*QUALITIES, *QUALITIES[:2]))
    splits = itertools.cycle((*SPLITS, *SPLITS[::-1], SPLITS[0]))
    for architecture, mode, rows, device in itertools.product(ARCHITECTURES, MODES, BATCHES, DEVICES):
        yield Cell(architecture, mode, rows, next(numbers), next(qualities), device, next(splits))


@contextmanager
def drafts_worse(monkeypatch: pytest.MonkeyPatch, quality: float) -> Iterator[None]:
    """Of the tokens drafted only so many are what the model said; the others are any."""
    original, generator = Rounds._choose, torch.Generator().manual_seed(5)

    def choose(self: Rounds, ids: Any, logits: torch.Tensor) -> torch.Tensor:
        token = original(self, ids, logits)
        other = torch.randint(3, logits.shape[-1], token.shape, generator=generator)
        return torch.where(torch.rand(token.shape, generator=generator) < quality, token, other)

    with monkeypatch.context() as patched:
        patched.setattr(Rounds, "_choose", choose)
        yield


class Drafted(NamedTuple):
    """What generations with drafts gave."""

    outcome: Outcome
    stats: list[GenerationStats]


def run_drafted(model: PreTrainedModel, mode: Mode, config: OffloadConfig, backend: Any = None) -> Drafted:
    """Generate with a session of its own; afterwards nothing of it may be left."""
    with leaves_no_trace(model):
        session = Session(model, config, backend or checking_backend())
        with session, noted_statistics(model, session) as stats:
            outputs = mode.run(model, session.new_cache)
            result = outcome(outputs)
            del outputs
    assert session.pool.used_bytes == session.pool.slab_bytes == 0
    return Drafted(result, stats)


def window_gib(model: PreTrainedModel, rows: int, tokens: int, block_tokens: int, share: float) -> float:
    """Device memory for the buffers of a pass and that share of the cache."""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    token_bytes = num_layers * rows * row_bytes(model).kv
    return token_bytes * (tokens * share + 18 * block_tokens) / GIB


def model_of(cell: Cell) -> PreTrainedModel:
    """The tiny model of a cell."""
    if cell.device == "shadow":
        return make_model(cell.architecture, **WIDE)
    return model_for(cell.architecture, False)


def config_of(cell: Cell, mode: Mode) -> OffloadConfig:
    """The options of a cell."""
    gib: Any = "min"
    if cell.device != "tail":
        model = model_of(cell)
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        cached = num_layers * mode.rows * mode.max_tokens * row_bytes(model).kv
        ring = 40 * BLOCK_TOKENS * mode.rows * num_layers * row_bytes(model).kv
        gib = (ring + cached * {"window": 0.3, "shadow": 0.5, "all": 2.0}[cell.device]) / GIB
    return OffloadConfig(
        split=cell.split,
        speculate=cell.number,
        draft_cache="int4" if cell.device == "shadow" else "auto",
        device_gib=gib,
        block_tokens=BLOCK_TOKENS,
        chunk_blocks=2,
        slots=2,
        link=FAST_LINK,
        profile=profile(),
    )


def check_cell(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> Drafted:
    """Run a cell beside plain `generate()` and compare tokens and logits."""
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    if release < (5, 23) and {**RECOMPUTABLE, **OTHERS}[cell.architecture].get("sliding_window"):
        pytest.skip("sliding layers of transformers 5.17 take back the tokens of one forward alone")
    model, mode = model_of(cell), KINDS[cell.mode](cell.shape)
    wanted = outcome(mode.run(model, lambda: plain_cache(model)))
    with drafts_worse(monkeypatch, cell.quality):
        run = run_drafted(model, mode, config_of(cell, mode))
    assert distance(run.outcome, wanted) <= 1e-5
    return run


def config(number: Any = 4, **options: Any) -> OffloadConfig:
    """With the whole cache on the device, so that every draft is right unless it is made wrong on purpose."""
    values: dict[str, Any] = {"device_gib": 0.01, "block_tokens": 4, "chunk_blocks": 2, **options}
    return OffloadConfig(speculate=number, link=FAST_LINK, profile=profile(), **values)


def session_of(model: PreTrainedModel, number: Any = 4, **options: Any) -> Session:
    return Session(model, config(number, **options), checking_backend())
