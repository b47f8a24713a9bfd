"""An attention module's call: what it asks for, and whether attention over segments knows all of it.

Owns the arguments that are known. Does not attend, nor decide what happens to a call that is not
known (`offloaded_layer` does).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import nn

from kvoffload.cache.attention import Question
from kvoffload.hf.masks import Padding

# What attention functions are called with. A window is in the mask; the others say nothing about the result.
KNOWN_ARGUMENTS = {
    *("scaling", "softcap", "s_aux", "dropout", "is_causal", "sliding_window"),
    *("position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    *("output_router_logits", "logits_to_keep", "tokenizer"),  # that of `stop_strings` comes along with them
}


def can_segment(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> bool:
    """Whether attention over segments knows these tensors, [rows, heads, tokens, head_dim], and arguments."""
    return (
        key.shape == value.shape
        and query.shape[-1] == key.shape[-1]
        and query.shape[1] % key.shape[1] == 0
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not asks_for_own_attention(module, kwargs, query.device)
        and not kwargs.get("dropout")
        and kwargs.get("is_causal") is not False
        and all(value is None for name, value in kwargs.items() if name not in KNOWN_ARGUMENTS)
    )


def asks_for_own_attention(module: nn.Module, kwargs: dict[str, Any], device: torch.device) -> bool:
    """Whether the caller's own wishes need the model's own attention: its weights, or the dtypes of autocast."""
    in_config = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(kwargs.get("output_attentions") or in_config) or torch.is_autocast_enabled(device.type)


def wants_contiguous(module: nn.Module) -> bool:
    """Whether attention in a module's own code views K and V as other shapes, which takes them in one piece each.

    Read from its source: some old models fold rows and heads together. Attention functions of transformers do not.
    """
    source = source_of(module)
    return "get_interface(" not in source and re.search(r"\b(key|value)\w*\.view\(\s*batch_size \*", source) is not None


def takes_names_for_meanings(module: nn.Module) -> bool:
    """Whether a module compares the name of its attention function with those that it knows; another's is then not one.

    Sparse attention does that to see whether its choice of tokens has to be put into the mask.
    """
    return re.search(r"_attn_implementation (in \(|== \"sdpa\")", source_of(module)) is not None


def source_of(module: nn.Module) -> str:
    """The source of a module's class, "" where there is none at hand."""
    return _source(cast(Hashable, type(module)))


@functools.cache
def _source(cls: Hashable) -> str:
    try:
        return inspect.getsource(cls)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""


def question(query: torch.Tensor, padding: Padding, kwargs: dict[str, Any]) -> Question:
    """What a known call asks of attention over segments.

    Args:
        query: [rows, heads, tokens, head_dim].
        padding: what its mask says.
        kwargs: its further arguments.
    """
    return Question(
        query=query.transpose(1, 2),
        scale=query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"],
        valid=padding.valid,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
