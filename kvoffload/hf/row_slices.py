"""A prefill's rows through one decoder layer in slices, while its weights are on the device.

Owns what of a layer's arguments is cut by rows, and how its results are put together again. Does not own how a layer of
the cache collects the slices (`offloaded_layer`) nor how many rows a slice has (`kvoffload/planning/memory.py`).

Each slice passes the whole layer, so that what the layer computes besides its input and output is there for one slice
at a time, and the weights cross the link once for all of them: the column-by-column schedule of FlexGen (arXiv
2303.06865, section 4.1) and KVPR (arXiv 2411.17089, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvoffload.hf.arguments import given_cache
from kvoffload.hf.offloaded_cache import OffloadedHFCache
from kvoffload.hf.offloaded_layer import OffloadedLayer

# whose first dimension is rows, unless it has one element; others, such as ALiBi, may have heads there
_BY_ROWS = ("hidden_states", "attention_mask", "causal_mask", "position_ids", "position_embeddings")


class _NotByRows(Exception):
    """An argument whose rows are not known."""


def through_in_slices(
    forward: Callable[..., Any],
    names: Sequence[str],
    layer_idx: int,
    rows_per_slice: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What `forward` gives for these arguments: by slices of rows where that is possible, else as it is.

    Possible is the first forward of a cache whose layer is ours, over several tokens of more rows than a slice has.

    Args:
        forward: of a decoder layer, with its weights on the device.
        names: of its parameters.
        layer_idx: of the layer.
        rows_per_slice: the most rows that pass at once.
        args: of the call; `kwargs` likewise.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or hidden.shape[1] == 1:
        return forward(*args, **kwargs)
    rows, tokens = hidden.shape[:2]
    layer = _empty_layer(given_cache(args, kwargs, list(names)), layer_idx)
    if rows <= rows_per_slice or layer is None:
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
            whole = _joined(whole, forward(*some_args, **some_kwargs), start, rows)
    finally:
        layer.end_slices()
    return whole


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
        if value.dim() < 2 or value.shape[0] == 1:
            return value
        if name not in _BY_ROWS or value.shape[0] != rows or (value.dim() == 2 and rows == tokens):
            raise _NotByRows
        return value[part]
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(name, one, part, rows, tokens) for one in value)
    if isinstance(value, dict):
        return {key: _cut(name, one, part, rows, tokens) for key, one in value.items()}
    if name in _BY_ROWS and value is not None:  # a mask of another kind
        raise _NotByRows
    return value


def _joined(whole: Any, found: Any, start: int, rows: int) -> Any:
    """The results so far with those of the slice that begins with that row."""
    if isinstance(found, tuple):
        before = whole if whole is not None else (None,) * len(found)
        return tuple(_joined(one, part, start, rows) for one, part in zip(before, found, strict=True))
    if not isinstance(found, torch.Tensor):
        return found
    if whole is None:
        whole = found.new_empty(rows, *found.shape[1:])
    whole[start : start + found.shape[0]] = found
    return whole
