"""Tiny random models of any text model type that the installed transformers knows.

Owns how a configuration class is shrunk: every field is judged by its name and its default, nested configurations too,
and lists with one entry per layer keep one layer of each kind. The rules, and what single types need beside them, are
in `model_types`. Does not judge what such a model generates (`sweep`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from campaign.model_types import (
    FIRST_TOKEN,
    HEAD_DIM,
    HEADS,
    KEPT,
    KV_HEADS,
    KV_HEADS_OF,
    LAYERS,
    LOUDNESS,
    OVERRIDES,
    POSITIONS,
    RULES,
    TOKEN,
)

SOURCES = ("causal", "image-text", "multimodal")


@functools.cache
def model_types() -> dict[str, str]:
    """Every text model type of the installed transformers, and which of its lists it is made by.

    Of a composite type (gemma3) that is the whole model, not its decoder, which has a type of its own.
    """
    found: dict[str, str] = {}
    for source, names in zip(SOURCES, ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"), strict=True):
        for kind in getattr(modeling_auto, f"MODEL_FOR_{names}_MAPPING_NAMES"):
            if kind not in found or "text_config" in CONFIG_MAPPING[kind].sub_configs:
                found[kind] = source
    return dict(sorted(found.items()))


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a model type, shrunk."""
    changes = _merged(OVERRIDES.get(model_type, {}), overrides)
    return _shrunk(CONFIG_MAPPING[model_type], changes, _Tokens())


def tiny_model(model_type: str, *, seed: int = 0, loudness: float = LOUDNESS, **overrides: Any) -> PreTrainedModel:
    """A tiny model in float32, in eval mode, with weights large enough to tell tokens apart."""
    config = tiny_config(model_type, **overrides)
    torch.manual_seed(seed)
    auto = {"causal": AutoModelForCausalLM, "image-text": AutoModelForImageTextToText}
    model = (
        auto.get(model_types()[model_type], AutoModelForMultimodalLM).from_config(config, dtype=torch.float32).eval()
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        for parameter in model.parameters():
            if id(parameter) in embeddings:
                continue  # else a model whose head is tied to them repeats its last token
            if parameter.is_floating_point() and not parameter.any():  # gates that start closed, biases
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif parameter.dim() > 1:
                parameter.mul_(loudness)
    assert isinstance(model, PreTrainedModel)
    return model


class _Tokens:
    """Numbers of special tokens, each name with one of its own."""

    def __init__(self) -> None:
        self._known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def __getitem__(self, name: str) -> int:
        return self._known.setdefault(name, 3 + (len(self._known) - 3) % (FIRST_TOKEN - 3))


def _shrunk(kind: type[PreTrainedConfig], changes: Mapping[str, Any], tokens: _Tokens) -> PreTrainedConfig:
    """A configuration of a class with every field shrunk, but for what `changes` says."""
    default = kind(**changes["_default"]) if "_default" in changes else kind()
    values: dict[str, Any] = {}
    layers = _layers(default, changes)
    for name in (field.name for field in dataclasses.fields(kind) if field.init):
        value = _get(default, name)
        if name in ("transformers_version", "dtype", "architectures", "model_type"):
            continue
        if isinstance(value, PreTrainedConfig):
            values[name] = _shrunk(type(value), changes.get(name, {}), tokens)
        elif layers and isinstance(value, (list, tuple)) and len(value) == layers[0]:
            values[name] = [_number(name, value[idx], tokens) for idx in layers[1]]
        elif name in ("rope_parameters", "rope_scaling") and value:
            values[name] = _rope(value, _get(default, "head_dim") or 128)
        elif name in KV_HEADS_OF and isinstance(value, int):
            heads = _get(default, KV_HEADS_OF[name])
            values[name] = HEADS if value == heads else min(value, KV_HEADS)
        elif isinstance(value, (int, list, tuple)):
            values[name] = _number(name, value, tokens)
    window, positions = _get(default, "sliding_window"), _get(default, "max_position_embeddings")
    if isinstance(window, int) and isinstance(positions, int) and window >= positions:
        values["sliding_window"] = POSITIONS  # as there, it never closes
    if "is_decoder" in values and not default.is_encoder_decoder:
        values["is_decoder"] = True
    if layers:
        values[_layer_field(default)] = len(layers[1])
    plain = {name: value for name, value in changes.items() if name != "_default" and not _is_nested(default, name)}
    values |= plain
    aliases = kind.attribute_map
    values = {
        name: value for name, value in values.items() if aliases.get(name, name) == name or aliases[name] not in values
    }
    return kind(**values)


def _get(config: PreTrainedConfig, name: str) -> Any:
    """A field of a configuration, whatever it is stored as; configurations that differ by layer refuse some reads."""
    return vars(config).get(config.attribute_map.get(name, name))


def _is_nested(default: PreTrainedConfig, name: str) -> bool:
    return isinstance(getattr(default, name, None), PreTrainedConfig)


def _layer_field(config: PreTrainedConfig) -> str:
    name = "num_hidden_layers"
    return config.attribute_map.get(name, name)


def _layers(default: PreTrainedConfig, changes: Mapping[str, Any]) -> tuple[int, list[int]] | None:
    """The number of layers, and which of them are kept: one of each kind, in their order, four at least."""
    total = _get(default, "num_hidden_layers")
    if not isinstance(total, int) or isinstance(total, bool) or total <= LAYERS:
        return None
    lists = [v for k, v in vars(default).items() if isinstance(v, (list, tuple)) and len(v) == total]
    kinds = [repr([one[idx] for one in lists]) for idx in range(total)]
    kept = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))[: 2 * LAYERS] if lists else []
    wanted = max(changes.get("_layers", LAYERS), len(kept))
    rest = [idx for idx in range(total) if idx not in kept]
    return total, sorted([*kept, *rest[: wanted - len(kept)]])


def _number(name: str, value: Any, tokens: _Tokens) -> Any:
    """A whole number, or a list of them, shrunk by the name of its field."""
    if isinstance(value, (list, tuple)):
        if name.endswith("_layers") and all(isinstance(one, int) for one in value):  # their indices
            return [one for one in value if one < LAYERS]
        return type(value)(_number(name, one, tokens) for one in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if TOKEN.fullmatch(name):
        return tokens[name] if value >= 0 else value
    if KEPT.fullmatch(name):
        return value
    for pattern, size in RULES:
        if re.fullmatch(pattern, name):
            return min(value, size)
    return value


def _rope(parameters: Any, head_dim: int) -> Any:
    """Position embeddings' parameters for narrow heads, instead of `head_dim` wide ones."""
    if not isinstance(parameters, dict):
        return parameters
    found = {name: _rope(value, head_dim) for name, value in parameters.items()}
    if sections := found.get("mrope_section"):
        total = sum(sections) * HEAD_DIM // head_dim
        found["mrope_section"] = [total - 2 * (total // 4), total // 4, total // 4]
    for name in ("short_factor", "long_factor"):
        if name in found:
            found[name] = found[name][: HEAD_DIM // 2]
    return found


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    nested = {k: _merged(base.get(k, {}), v) for k, v in more.items() if isinstance(v, dict)}
    return {**base, **more, **nested}
