"""The public `model_shape`: the dimensions of a model or of a configuration, from wherever they are known best."""

from __future__ import annotations

from typing import Any

from kvoffload.model.shape import ModelShape, shape_of
from kvoffload.model.stored_facts import facts_of


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
        from kvoffload.model.live import shape_of_model  # with torch, which a configuration does without

        return shape_of_model(model_or_config)
    return shape_of(facts_of(model_or_config))


def is_model(model_or_config: Any) -> bool:
    """Whether it is a model, which has parameters of its own."""
    return hasattr(model_or_config, "config") and hasattr(model_or_config, "parameters")
