"""Where a decoder's self-attention is.

Owns the search for the decoder in a model and for the attention module of each of its layers. Towers, perceivers,
linear attention and attention to an encoder or an image carry a layer's index as well, and are something else.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Parts of the path of attention over something else than the tokens before: an encoder's states, an image's.
OTHER_ATTENTION = ("cross", "encoder_attn", "encdec", "perceiver", "resampler")


def decoder_of(model: Any) -> Any:
    """The module that its decoder layers are in; some call another thing their decoder."""
    found = model.get_decoder()
    return found if any(isinstance(one, nn.ModuleList) for one in found.modules()) else model.base_model


def attention_modules(model: Any) -> dict[int, nn.Module]:
    """The self-attention module of each layer of the decoder, by layer index; innermost where they are nested."""
    return {idx: module for idx, (_, module) in _attention(model, is_self=True).items()}


def layers_of_other_attention(model: Any) -> set[int]:
    """Layers that attend only to something else than the tokens before them."""
    return set(_attention(model, is_self=False)) - set(_attention(model, is_self=True))


def _attention(model: Any, *, is_self: bool) -> dict[int, tuple[str, nn.Module]]:
    """Path and module of one attention of each layer: to the tokens before, or to something else."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in decoder_of(model).named_modules():
        idx, kind = vars(module).get("layer_idx"), type(module).__name__.lower()
        if not isinstance(idx, int) or "attention" not in kind:
            continue
        if any(word in part for part in (*path.lower().split("."), kind) for word in OTHER_ATTENTION) == is_self:
            continue
        if idx not in found or path.startswith(f"{found[idx][0]}."):  # inner modules come after outer ones
            found[idx] = (path, module)
    return found
