"""Which models can be offloaded, and which of their layers."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvoffload.errors import UnsupportedModelError
from kvoffload.hf.arguments import name_of_cache
from kvoffload.model.cache_layers import cache_layers
from kvoffload.model.self_attention import layers_of_other_attention


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside compiled and PEFT wrappers.

    Raises:
        UnsupportedModelError: an adapter that gives attention a prefix of K and V (prefix tuning).
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            kind = getattr(getattr(model, "active_peft_config", None), "peft_type", "")
            if getattr(kind, "value", kind) == "PREFIX_TUNING":
                raise UnsupportedModelError(
                    "prefix tuning gives every call a cache of its own that holds the trained prefix, in place of the "
                    "offloaded one: use plain generate(), or an adapter that is part of the weights (LoRA)"
                )
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
    inner = inner_generator(model)
    if inner is not None:
        raise UnsupportedModelError(
            f"generate() of {name} calls that of its {inner}, which holds the cache: offload that one, "
            f"kvoffload.offload(model.{inner}), and call model.generate() as before"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoder-only models can be offloaded")
    devices = {str(p.device) for p in model.parameters()}
    placed = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if len(devices) > 1 or len(placed) > 1:
        raise UnsupportedModelError(
            f"{name} is spread over {', '.join(sorted(devices | placed))}: load it on one device "
            "(device_map={'': 0}), or whole into host memory (no device_map, or kvoffload.load(name, config)) with "
            "OffloadConfig(device='cuda'), which streams what does not fit"
        )
    if not _has_dynamic_cache(model):
        raise UnsupportedModelError(
            f"{name} keeps no cache of transformers (none, or a state in a way of its own): use plain generate()"
        )
    if not offloadable_layers(model):
        if own := _layers_of_its_own(model):
            raise UnsupportedModelError(
                f"{name} caches in layers of its own kind ({', '.join(own)}), which hold something else than keys and "
                "values of every token: use plain generate()"
            )
        raise UnsupportedModelError(
            f"{name} has no attention layer with an unbounded cache (only sliding-window, linear or stateful layers); "
            "its cache does not grow, use plain generate()"
        )


def inner_generator(model: Any) -> str | None:
    """The attribute whose `generate()` a model's own one calls, as composite models of vision and text do."""
    own = type(model).generate
    if own is GenerationMixin.generate:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(own))))
    except (OSError, TypeError, SyntaxError):  # no source at hand
        return None
    called = [
        ast.unparse(node.func.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "generate"
    ]
    if any(name.startswith("super(") for name in called):
        return None  # which is the one that holds the cache
    for name in called:
        found: Any = model
        for part in name.removeprefix("self.").split("."):
            found = getattr(found, part, None)
        if isinstance(found, PreTrainedModel) and found is not model:
            return name.removeprefix("self.")
    return None


def offloadable_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the layers of self-attention whose cache grows without bound and is read by no other layer.

    A window that is at least as wide as the model has positions never closes: its layer grows as well.
    """
    if not _has_dynamic_cache(model):
        return []
    elsewhere = layers_of_other_attention(model)
    caches = cache_layers(model.config)
    return [idx for idx, cache in enumerate(caches) if cache.is_offloadable and idx not in elsewhere]


def _layers_of_its_own(model: PreTrainedModel) -> list[str]:
    """Kinds of cache layers that a model brings itself."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return sorted({type(one).__name__ for one in layers if type(one).__module__ != DynamicCache.__module__})


def _has_dynamic_cache(model: Any) -> bool:
    supports = getattr(model, "_supports_default_dynamic_cache", lambda: False)
    return bool(supports()) and name_of_cache(model.forward) is not None


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether the model, or a part of it, runs through torch.compile."""
    return any(
        "_orig_mod" in name
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for name, module in model.named_modules()
    )
