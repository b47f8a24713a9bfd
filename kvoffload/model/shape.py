"""The dimensions of a model that the planner needs, from everything that is known of it.

Owns the choice where layers differ, and the public `model_shape`. Does not own the facts (`facts`).
"""

from __future__ import annotations

from typing import Any

from kvoffload.model.facts import KV, Facts
from kvoffload.model.stored_facts import facts_of
from kvoffload.types import ModelShape


def model_shape(model_or_config: Any) -> ModelShape:
    """The dimensions of a decoder as planning sees them.

    Args:
        model_or_config: a transformers model, a configuration object, a dict, or the path of a `config.json` or of the
            folder it is in.

    Returns:
        Counts of layers; `kv_row_bytes` and `activation_row_bytes`, bytes of one token of one sequence in one layer (of
        the offloaded layers, the largest where they differ); `weight_bytes`, bytes of all parameters as they are
        stored (a model's own, or what its configuration describes, vision and audio towers included). `is_exact` is
        False where the installed transformers does not know the model type and the keys of its configuration had to
        do.

    Raises:
        ConfigError: there is no such file, or transformers refuses the configuration; with its message.
        UnsupportedModelError: no decoder with a cache.
    """
    if is_model(model_or_config):
        from kvoffload.model.live import shape_of_model

        return shape_of_model(model_or_config)
    return shape_of(facts_of(model_or_config))


def is_model(model_or_config: Any) -> bool:
    """Whether it is a model, which has parameters of its own."""
    return hasattr(model_or_config, "config") and hasattr(model_or_config, "parameters")


def shape_of(facts: Facts) -> ModelShape:
    """That of a model with these facts."""
    own = [layer for layer in facts.layers if layer.cache.is_offloadable]
    caching = own or [layer for layer in facts.layers if layer.cache.kind in ("grows", "window")]
    kv = max((layer.kv for layer in caching if layer.kv), key=lambda one: one.values, default=KV(0, 0, 0))
    heads, head_dim = (kv.num_heads, kv.key_dim) if not facts.latent_width else (facts.num_heads, facts.head_dim)
    others = [layer for layer in facts.layers if not layer.cache.is_offloadable]
    windows = [layer for layer in others if layer.cache.kind == "window"]
    num_layers = max(1, facts.num_layers)
    return ModelShape(
        num_layers=facts.num_layers,
        num_offloaded_layers=facts.num_offloaded_layers,
        hidden_size=facts.hidden_size,
        intermediate_size=facts.active_width,
        num_heads=facts.num_heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        vocab_size=facts.vocab_size,
        kv_itemsize_bytes=facts.itemsize_bytes,
        activation_itemsize_bytes=facts.itemsize_bytes,
        weight_bytes=facts.weight_bytes,
        mlp_matrices=facts.mlp_matrices,
        cached_values=0 if kv.values == 2 * heads * head_dim else kv.values,
        active_layer_weights=facts.active_layer_weights // num_layers,
        window_tokens=facts.window_tokens,
        window_row_bytes=sum(layer.cached_values for layer in windows) * facts.itemsize_bytes,
        held_row_bytes=sum(layer.cached_values for layer in others if layer.cache.kind == "grows")
        * facts.itemsize_bytes,
        is_exact=facts.is_exact,
    )
