"""What an attention module's call asks for: known to attention over segments, or left to the model's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kvoffload.hf.attention_call import can_segment, question, takes_names_for_meanings, wants_contiguous
from kvoffload.hf.masks import Padding


@pytest.mark.parametrize(
    ("changes", "is_known"),
    [
        ({}, True),
        ({"scaling": 0.3, "softcap": 20.0, "sliding_window": 8, "dropout": 0.0, "is_causal": True}, True),
        ({"position_ids": torch.zeros(1), "cache_position": torch.zeros(1), "use_cache": True}, True),
        ({"anything_else": None}, True),
        ({"anything_else": 0}, False),
        ({"dropout": 0.1}, False),
        ({"is_causal": False}, False),
        ({"output_attentions": True}, False),
        ({"position_bias": torch.zeros(1)}, False),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_arguments_that_change_the_result_are_known_or_refused(changes: dict[str, Any], is_known: bool) -> None:
    query, key = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 1, 8)
    assert can_segment(nn.Linear(1, 1), query, key, key, changes) == is_known


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((2, 4, 1, 8), (2, 2, 1, 8), (2, 2, 1, 6)),
        ((2, 4, 1, 8), (2, 3, 1, 8), (2, 3, 1, 8)),
        ((2, 4, 1, 6), (2, 2, 1, 8), (2, 2, 1, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(query: Any, key: Any, value: Any) -> None:
    assert not can_segment(nn.Linear(1, 1), torch.zeros(query), torch.zeros(key), torch.zeros(value), {})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_dtypes_without_a_kernel_are_refused(dtype: torch.dtype) -> None:
    one = torch.zeros(2, 4, 1, 8, dtype=dtype)
    assert not can_segment(nn.Linear(1, 1), one, one, one, {})
    assert not can_segment(nn.Linear(1, 1), one.float(), one.half(), one.half(), {})


def test_weights_and_the_dtypes_of_autocast_are_left_to_the_models_own_attention() -> None:
    module, one = nn.Linear(1, 1), torch.zeros(2, 4, 1, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_segment(module, one, one, one, {})
    for asked in (True, False):
        module.config = SimpleNamespace(output_attentions=asked)
        assert can_segment(module, one, one, one, {}) != asked


def test_a_question_is_what_the_call_asks_for() -> None:
    query, sinks, valid = torch.randn(2, 4, 3, 16), torch.zeros(4), torch.zeros(2, 1, dtype=torch.int32)
    found = question(query, Padding(None), {})
    assert torch.equal(found.query, query.transpose(1, 2))
    assert (found.scale, found.valid, found.softcap, found.sinks) == (0.25, None, None, None)
    found = question(query, Padding(valid), {"scaling": 0.3, "softcap": 20.0, "s_aux": sinks})
    assert (found.scale, found.softcap) == (0.3, 20.0)
    assert found.valid is valid
    assert found.sinks is sinks


class Folding(nn.Module):
    """As old modules attend: rows and heads in one dimension."""

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        batch_size, heads, tokens, width = key.shape
        key = key.view(batch_size * heads, tokens, width)
        return query @ key.transpose(1, 2)


class Choosing(nn.Module):
    """As sparse attention decides whether its choice has to be in the mask."""

    def forward(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        config: Any = self.config
        if config._attn_implementation in ("eager", "sdpa"):
            return mask
        return None


def test_modules_that_fold_rows_and_heads_want_k_and_v_in_one_piece() -> None:
    from transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese import GPTNeoXJapaneseAttention
    from transformers.models.llama.modeling_llama import LlamaAttention

    def wants(cls: Any) -> bool:
        return wants_contiguous(cls.__new__(cls))

    assert wants(Folding)
    assert wants(GPTNeoXJapaneseAttention)
    assert not wants(LlamaAttention)
    assert not wants(type("Made", (nn.Module,), {}))  # no source


def test_modules_that_know_attention_functions_by_name_keep_theirs() -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    assert takes_names_for_meanings(Choosing())
    assert not takes_names_for_meanings(LlamaAttention.__new__(LlamaAttention))
