"""Which models can be offloaded, and where their attention is."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvoffload.errors import UnsupportedModelError


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside compiled and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            inner: PreTrainedModel = model
            return inner


def check_supported(model: Any) -> None:
    """Refuse what cannot be offloaded correctly.

    Raises:
        UnsupportedModelError: not a generative decoder, encoder-decoder, attention-free, or on several devices.
    """
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "_prepare_cache_for_generation"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model with generate(); pass an AutoModelForCausalLM"
        )
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoder-only models can be offloaded")
    devices = {str(p.device) for p in model.parameters()}
    placed = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if len(devices) > 1 or len(placed) > 1:
        raise UnsupportedModelError(
            f"{name} is spread over {', '.join(sorted(devices | placed))}; load it on one device, "
            "for example with device_map={'': 0}"
        )
    if not offloadable_layers(model):
        raise UnsupportedModelError(
            f"{name} has no attention layer with an unbounded cache (only sliding-window, linear or stateful layers); "
            "its cache does not grow, use plain generate()"
        )


def offloadable_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the layers whose cache grows without bound and is read by no other layer."""
    supports: Any = model._supports_default_dynamic_cache
    if not supports():
        return []
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    shared = _kv_producers(config, len(layers))
    return [idx for idx, layer in enumerate(layers) if type(layer) is DynamicLayer and idx not in shared]


def _kv_producers(config: Any, num_layers: int) -> set[int]:
    """Layers whose K/V later layers use (gemma3n): they keep a cache of their own on the device."""
    num_shared = getattr(config, "num_kv_shared_layers", 0) or 0
    if not num_shared:
        return set()
    first_shared = config.num_hidden_layers - num_shared
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return {max(idx for idx in range(first_shared) if types[idx] == kind) for kind in set(types[:first_shared])}


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention module of each layer index."""
    found: dict[int, nn.Module] = {}
    for _, module in model.named_modules():
        idx = getattr(module, "layer_idx", None)
        if isinstance(idx, int) and "attention" in type(module).__name__.lower():
            found[idx] = module  # inner modules come after outer ones
    return found


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether the model, or a part of it, runs through torch.compile."""
    return getattr(model, "_compiled_call_impl", None) is not None or any(
        "_orig_mod" in name or hasattr(module.forward, "_torchdynamo_orig_callable")
        for name, module in model.named_modules()
    )
