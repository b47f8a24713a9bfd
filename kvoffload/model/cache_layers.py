"""What each decoder layer caches, as transformers' own `DynamicCache` says for a configuration.

Owns the translation of transformers' cache layers into our words. Does not own the widths of keys and values
(`kv_widths`) nor whether a model can be offloaded (`hf/models.py`).
"""

from __future__ import annotations

from typing import Any

from kvoffload.model.facts import CacheTraits

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def cache_layers(config: Any, positions: int | None = None) -> tuple[CacheTraits, ...]:
    """What each layer of the decoder caches.

    Args:
        config: a transformers configuration object, of the decoder or of a model that has one.
        positions: tokens the model has positions for; by default what the configuration object says.

    Returns:
        One entry per decoder layer, those without a cache included. A window at least as wide as the configuration's
        positions is none: that layer grows. Layers whose K/V later ones read say so (`is_lent`).
    """
    from transformers.cache_utils import DynamicCache

    text = config.get_text_config(decoder=True)
    found = [_translated(layer) for layer in DynamicCache(config=text).layers]
    num_layers = max(len(found), int(getattr(text, "num_hidden_layers", 0) or 0))
    modes = _sharing_modes(text, num_layers)
    is_shared = "reuse" in modes  # else nobody reads what is stored for others
    kinds = list(getattr(text, "layer_types", None) or [])
    limit = positions or positions_of(text)
    result = []
    for idx in range(num_layers):
        # transformers before 5.19 leaves layers that read another's cache out of its own
        cache = found[idx] if idx < len(found) else CacheTraits("none")
        if modes[idx] == "reuse":
            is_bounded = idx < len(kinds) and "sliding" in kinds[idx]
            cache = CacheTraits("shared", int(getattr(text, "sliding_window", 0) or 0) if is_bounded else 0)
        elif modes[idx] == "store":
            cache = cache._replace(is_lent=is_shared)
        if limit and cache.window_tokens >= limit and not cache.has_state:
            cache = cache._replace(kind="grows" if cache.kind == "window" else cache.kind, window_tokens=0)
        result.append(cache)
    return tuple(result)


def positions_of(text: Any) -> int | None:
    """Tokens the decoder has positions for, as its configuration says; None where it does not say."""
    values = (getattr(text, name, None) for name in _POSITIONS)
    return next((one for one in values if isinstance(one, int) and not isinstance(one, bool) and one > 0), None)


def _translated(layer: Any) -> CacheTraits:
    """One layer of a `DynamicCache`. What is derived from a layer of transformers keeps more than that."""
    from transformers import cache_utils

    found = CacheTraits("state" if isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin) else "none")
    if isinstance(layer, cache_utils.DynamicSlidingWindowLayer):
        has_state = type(layer) is not cache_utils.DynamicSlidingWindowLayer
        found = CacheTraits("window", int(layer.sliding_window), has_state=has_state)
    elif isinstance(layer, cache_utils.DynamicLayer):
        found = CacheTraits("grows", has_state=type(layer) is not cache_utils.DynamicLayer)
    return found._replace(is_own_kind=type(layer).__module__ != cache_utils.__name__)


def _sharing_modes(text: Any, num_layers: int) -> list[str | None]:
    """Per layer "store" where later layers read its cache, "reuse" where it reads an earlier one's."""
    modes = getattr(text, "kv_sharing_modes", None)
    if modes is not None and len(modes) == num_layers:
        # transformers 5.24 says "store" also where no layer of the model reads it
        return list(modes) if "reuse" in modes else [None] * num_layers
    found: list[str | None] = [None] * num_layers
    num_shared = int(getattr(text, "num_kv_shared_layers", 0) or 0)
    if not 0 < num_shared < num_layers:
        return found
    own = num_layers - num_shared
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * num_layers)
    for kind in set(kinds[:own]):  # the last layer of each kind lends its cache
        found[max(idx for idx in range(own) if kinds[idx] == kind)] = "store"
    return found[:own] + ["reuse"] * num_shared
