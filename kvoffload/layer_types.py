"""In which way the layers of a decoder attend, and which of them have a cache of their own.

Owns `layer_types` and what stands for it where a file lacks it: patterns, windows, caches that layers share. Does not
own what the layers consist of (`matrices`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvoffload.errors import ConfigError
from kvoffload.model_config import Get, first_whole, model_type, reader

# Every n-th layer attends to everything, where the file gives neither `layer_types` nor a pattern.
_SLIDING_PATTERN = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4}


def sliding_window_tokens(config: Any) -> int:
    """Tokens each layer with a bounded cache holds per sequence; 0 where no layer is bounded."""
    return window_tokens(reader(config))


def window_tokens(get: Get) -> int:
    """The same, of a configuration that is being read."""
    if get("use_sliding_window") is False:
        return 0
    return first_whole(get, "sliding_window", "attention_chunk_size") or 0


class LayerCounts(NamedTuple):
    """How many layers attend in which way, and how many of them have a cache of their own."""

    full: int  # attend to everything, with a cache that grows and no other layer reads
    lending: int  # the same, but later layers read it
    full_attention: int  # attend to everything
    windowed: int
    windowed_attention: int


def count_layers(get: Get, num_layers: int, shared: int) -> LayerCounts:
    """Counts of the layers that a configuration describes.

    Args:
        get: the configuration's fields.
        num_layers: all of them.
        shared: how many of the last ones read the cache of earlier ones.

    Raises:
        ConfigError: `layer_types` names another number of layers.
    """
    types: list[str] = get("layer_types") or []
    if not types:
        types = ["full_attention"] * num_layers
        if get("use_sliding_window") is not False and (get("sliding_window") or get("attention_chunk_size")):
            pattern = get("sliding_window_pattern") or _SLIDING_PATTERN.get(get("model_type"))
            types = [
                "full_attention" if isinstance(pattern, int) and (idx + 1) % pattern == 0 else "sliding_attention"
                for idx in range(num_layers)
            ]
    if len(types) != num_layers:
        raise ConfigError(f"layer_types of {model_type(get)} names {len(types)} layers of {num_layers}")
    is_full = [kind == "full_attention" for kind in types]
    is_windowed = [kind in ("sliding_attention", "chunked_attention") for kind in types]
    own = num_layers - shared  # the last layers read the cache of earlier ones
    lent = 1 if shared and any(is_full[:own]) else 0  # the last of each type lends its cache, and stays resident
    return LayerCounts(sum(is_full[:own]) - lent, lent, sum(is_full), sum(is_windowed[:own]), sum(is_windowed))
