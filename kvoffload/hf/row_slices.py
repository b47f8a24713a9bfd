"""A prefill's rows through one decoder layer in slices, while its weights are on the device.

Owns what of a layer's arguments is cut by rows, and how its results are put together again. Does not own how a layer of
the cache collects the slices (`offloaded_layer`) nor how many rows a slice has (`kvoffload/planning/memory.py`).

Each slice passes the whole layer, so that what the layer computes besides its input and output is there for one slice
at a time, and the weights cross the link once for all of them: the column-by-column schedule of FlexGen (arXiv
2303.06865, section 4.1) and KVPR (arXiv 2411.17089, section 3.2).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kvoffload.hf.arguments import given_cache
from kvoffload.hf.offloaded_cache import OffloadedHFCache
from kvoffload.hf.offloaded_layer import OffloadedLayer

logger = logging.getLogger(__name__)
# whose first dimension is rows, or one, and how many dimensions they have; others, such as ALiBi, may have heads there,
# and positions along several axes have these
_BY_ROWS = {
    "hidden_states": (3,),
    "attention_mask": (2, 4),
    "causal_mask": (2, 4),
    "position_ids": (2,),
    "position_embeddings": (3,),
}
_BY_TOKENS = ("cache_position",)  # has no rows, also where it is as long
# whose modules treat each row by itself: transformers' own layers, adapters in them, and linears of libraries
_KNOWN = (
    *("torch", "transformers", "peft", "bitsandbytes", "torchao", "hqq", "optimum", "gptqmodel", "awq", "auto_round"),
    *("auto_gptq", "compressed_tensors", "aqlm", "vptq", "eetq"),
)
_KNOWN_LAYERS = "transformers.models."
_OUR_HOOKS = ("kvoffload", "transformers")


def goes_by_rows(layer: nn.Module, stand_in: Callable[..., Any]) -> bool:
    """Whether a decoder layer is known to give for some rows what it gives for them among others.

    So are those of transformers, with nothing of anybody else's in them: modules, functions in the place of forwards,
    or hooks, each of which may have something for each row elsewhere (as PEFT has adapters of a mixed batch).

    Args:
        layer: now.
        stand_in: ours, in the place of its forward.
    """
    return type(layer).__module__.startswith(_KNOWN_LAYERS) and all(
        _package(type(module)) in _KNOWN
        and vars(module).get("forward", stand_in) is stand_in
        and all(_package(hook) in _OUR_HOOKS for hook in _hooks(module))
        for module in layer.modules()
    )


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()


def _package(of: Any) -> str:
    return str(getattr(of, "__module__", "")).split(".")[0]


class _NotByRows(Exception):
    """An argument, or a result, whose rows are not known."""


def through_in_slices(
    forward: Callable[..., Any],
    names: Sequence[str],
    layer_idx: int,
    rows_per_slice: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    may: Callable[[], bool] = lambda: True,
) -> Any:
    """What `forward` gives for these arguments: by slices of rows where that is possible, else as it is.

    Possible is the first forward of a cache whose layer is ours, over several tokens of more rows than a slice has.

    Args:
        forward: of a decoder layer, with its weights on the device.
        names: of its parameters.
        layer_idx: of the layer.
        rows_per_slice: the most rows that pass at once.
        args: of the call; `kwargs` likewise.
        may: whether the layer goes by rows, asked where the rest allows slices.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or hidden.shape[1] == 1:
        return forward(*args, **kwargs)
    rows, tokens = hidden.shape[:2]
    layer = _empty_layer(given_cache(args, kwargs, list(names)), layer_idx)
    if rows <= rows_per_slice or layer is None or not may():
        return forward(*args, **kwargs)
    starts = range(0, rows, rows_per_slice)
    try:
        parts = [slice(start, start + rows_per_slice) for start in starts]
        calls = [_cut_call(names, args, kwargs, part, rows, tokens) for part in parts]
    except _NotByRows:
        return forward(*args, **kwargs)
    whole: Any = None
    layer.begin_slices(rows)
    try:
        for start, (some_args, some_kwargs) in zip(starts, calls, strict=True):
            whole = _joined(whole, forward(*some_args, **some_kwargs), start, rows, min(rows - start, rows_per_slice))
        return whole
    except _NotByRows:
        logger.info("layer %d gives something else than rows: all pass at once", layer_idx)
    finally:
        layer.end_slices()
    return forward(*args, **kwargs)


def _empty_layer(cache: Any, layer_idx: int) -> OffloadedLayer | None:
    """The layer of a cache of ours that takes slices: it caches K and V alone, and nothing yet."""
    if not isinstance(cache, OffloadedHFCache) or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    return layer if type(layer) is OffloadedLayer and not layer.core.num_tokens else None


def _cut_call(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], part: slice, rows: int, tokens: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call for some rows alone."""
    if len(args) > len(names):
        raise _NotByRows
    some = tuple(_cut(name, value, part, rows, tokens) for name, value in zip(names, args, strict=False))
    return some, {name: _cut(name, value, part, rows, tokens) for name, value in kwargs.items()}


def _cut(name: str, value: Any, part: slice, rows: int, tokens: int) -> Any:
    """An argument for some rows alone; only of those in `_BY_ROWS` it is known which dimension has the rows."""
    if isinstance(value, torch.Tensor):
        if name in _BY_ROWS:
            if value.dim() not in _BY_ROWS[name]:
                raise _NotByRows
        elif value.dim() == 1 and value.shape[0] == rows and name not in _BY_TOKENS:
            raise _NotByRows
        if value.dim() < 2 or value.shape[0] == 1:
            return value
        if name not in _BY_ROWS or value.shape[0] != rows or (value.dim() == 2 and rows == tokens):
            raise _NotByRows
        return value[part]
    if isinstance(value, (tuple, list)):
        if name not in _BY_ROWS and len(value) == rows:
            raise _NotByRows
        return _like(value, [_cut(name, one, part, rows, tokens) for one in value])
    if isinstance(value, dict):
        return {key: _cut(name, one, part, rows, tokens) for key, one in value.items()}
    if name in _BY_ROWS and value is not None:  # a mask of another kind
        raise _NotByRows
    return value


def _joined(whole: Any, found: Any, start: int, rows: int, some: int) -> Any:
    """The results so far with those of the slice of `some` rows that begins with that row."""
    if isinstance(found, tuple):
        before = whole if whole is not None else (None,) * len(found)
        return _like(found, [_joined(one, two, start, rows, some) for one, two in zip(before, found, strict=True)])
    if found is None:
        return None
    if not isinstance(found, torch.Tensor) or not found.dim() or found.shape[0] != some:
        raise _NotByRows
    if whole is None:
        whole = found.new_empty(rows, *found.shape[1:])
    whole[start : start + some] = found
    return whole


def _like(value: Any, parts: list[Any]) -> Any:
    """A sequence of these parts of the kind that `value` is."""
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
