"""How wide the keys and values are that each layer caches, from the model's own forward without memory.

Owns a forward of three tokens of a model on the `meta` device that ends as soon as every kind of layer has shown what
it hands to its cache, and the widths of projections where that forward fails. Does not own what a layer caches
(`cache_layers`).

Layers are of one kind where they cache the same and their attention modules have the same class, numbers and shapes of
weights; a model of equal layers is known after the first.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kvoffload.model.facts import KV, CacheTraits
from kvoffload.model.self_attention import attention_modules, decoder_of

logger = logging.getLogger(__name__)
_HAS_KV = ("grows", "window")


def kv_widths(model: Any, text_config: Any, caches: Sequence[CacheTraits]) -> list[KV | None]:
    """Keys and values of one token per layer; None for layers without, or where nothing tells.

    Args:
        model: of transformers, on the meta device, so that its forward takes neither memory nor time.
        text_config: of its decoder.
        caches: of its layers.
    """
    kinds = _kinds(model, caches)
    found: dict[Any, KV] = {}
    wanted = {kinds[idx] for idx, cache in enumerate(caches) if cache.kind in _HAS_KV}
    decoder = decoder_of(model)  # by itself where the whole model wants an image as well
    for run, passes_by_experts in ((model, False), (model, True), (decoder, True)):
        if wanted <= found.keys():
            break
        if passes_by_experts:
            _pass_by_experts(model)
        try:
            _forward(run, text_config, lambda idx, kv: _note(found, wanted, kinds[idx], kv))
        except _AllKnown:
            break
        except Exception as error:  # whatever a model's code meets on a device without values
            logger.debug("a forward of %s without memory failed: %r", type(model).__name__, error)
    widths = [found.get(kinds[idx]) if cache.kind in _HAS_KV else None for idx, cache in enumerate(caches)]
    return _completed(model, text_config, caches, widths)


def projected_widths(model: Any, text_config: Any, caches: Sequence[CacheTraits]) -> list[KV | None]:
    """The same by the shapes of projections alone, of a model on any device; nothing is run."""
    return _completed(model, text_config, caches, [None] * len(caches))


def _completed(model: Any, text_config: Any, caches: Sequence[CacheTraits], found: list[KV | None]) -> list[KV | None]:
    """What is still missing from the projections, and what layers read that cache nothing."""
    modules = attention_modules(model) if None in found else {}
    widths = list(found)
    for idx, cache in enumerate(caches):
        if widths[idx] is None and cache.kind in _HAS_KV:
            widths[idx] = projected_kv(modules.get(idx), text_config)
        elif cache.kind == "shared":  # the nearest earlier layer of the same window is read
            same = [
                one for one in range(idx) if caches[one].is_lent and caches[one].window_tokens == cache.window_tokens
            ]
            widths[idx] = widths[same[-1]] if same else None
    return widths


def projected_kv(module: nn.Module | None, text_config: Any) -> KV | None:
    """What the shapes of the projections say, else the configuration; None without attention heads."""
    heads = getattr(text_config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        return None
    kv_heads = getattr(text_config, "num_key_value_heads", None)
    kv_heads = kv_heads if isinstance(kv_heads, int) and kv_heads > 0 else heads
    head_dim = getattr(module, "head_dim", None) or getattr(text_config, "head_dim", None)
    if not isinstance(head_dim, int) or head_dim < 1:
        head_dim = max(1, int(text_config.hidden_size) // heads)
    widths = {}
    for name in ("k_proj", "v_proj"):
        outputs = getattr(getattr(module, name, None), "out_features", None)
        widths[name] = outputs // kv_heads if isinstance(outputs, int) and outputs % kv_heads == 0 else head_dim
    return KV(kv_heads, widths["k_proj"], widths["v_proj"])


class _AllKnown(Exception):
    """Ends a forward from within."""


def _note(found: dict[Any, KV], wanted: set[Any], kind: Any, kv: KV) -> None:
    found[kind] = kv
    if wanted <= found.keys():
        raise _AllKnown


def _kinds(model: nn.Module, caches: Sequence[CacheTraits]) -> list[Any]:
    """What tells each layer's kind; a layer without a known module is one of its own."""
    modules = attention_modules(model)
    kinds: list[Any] = []
    for idx, cache in enumerate(caches):
        module = modules.get(idx)
        if module is None:
            kinds.append(idx)
            continue
        numbers = tuple(sorted((k, v) for k, v in vars(module).items() if type(v) is int and k != "layer_idx"))
        shapes = tuple((name, tuple(one.shape)) for name, one in module.named_parameters())
        kinds.append((cache.kind, type(module), numbers, shapes))
    return kinds


def _forward(model: Any, text_config: Any, note: Callable[[int, KV], None]) -> None:
    """Three tokens, with a cache that tells what it is handed."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=text_config)
    update = cache.update

    def telling(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        note(layer_idx, KV(keys.shape[1], keys.shape[-1], values.shape[-1]))
        return update(keys, values, layer_idx, *args, **kwargs)

    vars(cache)["update"] = telling
    takes = argument_names(model)
    name = next((one for one in ("past_key_values", "cache", "cache_params") if one in takes), "past_key_values")
    model.config.pad_token_id = None  # some look for it among the tokens, which have no values
    ids = torch.zeros(1, 3, dtype=torch.long, device="meta")
    with torch.no_grad():
        model.eval()(input_ids=ids, use_cache=True, **{name: cache})


def argument_names(model: nn.Module) -> Sequence[str]:
    """What its forward takes."""
    return tuple(inspect.signature(model.forward).parameters)


def _pass_by_experts(model: nn.Module) -> None:
    """Which expert a token goes to depends on its values: without these, experts give back what they get."""
    for path, module in model.named_modules():
        if "expert" in f"{path} {type(module).__name__}".lower() and not isinstance(module, nn.ModuleList):
            vars(module)["forward"] = lambda hidden, *args, **kwargs: hidden
