"""What an `OffloadedLayer` tells the cache it belongs to, and asks of it; `OffloadedHFCache` answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from kvoffload.cache.cache import CacheCore
from kvoffload.cache.layer import CacheLayer
from kvoffload.hf.masks import MaskReader

# Prepares the recomputation of that many tokens of all rows of a layer, to be timed.
Measure = Callable[[int], Callable[[], None]]


class FirstTokens(NamedTuple):
    """Sizes of what a layer was given first."""

    rows: int
    tokens: int
    kv_row_bytes: int
    activation_row_bytes: int

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, activation: torch.Tensor | None) -> FirstTokens:
        """Of keys [rows, heads, tokens, dim], values likewise, and activation [rows, tokens, hidden]."""
        kv_row_bytes = (keys[0, :, 0].numel() + values[0, :, 0].numel()) * keys.element_size()
        x_row_bytes = kv_row_bytes if activation is None else activation[0, 0].numel() * activation.element_size()
        return cls(keys.shape[0], keys.shape[2], kv_row_bytes, x_row_bytes)


class OwningCache(Protocol):
    """The cache of a layer: an `OffloadedHFCache`."""

    core: CacheCore
    masks: MaskReader
    layers: list[Any]
    is_closed: bool

    @property
    def num_forwards(self) -> int: ...
    @property
    def num_generations(self) -> int: ...
    @property
    def offers_segments(self) -> bool: ...

    def check_usable(self) -> None: ...
    def check_rows(self, rows: int) -> None: ...
    def use_whole_layers(self) -> None: ...
    def carries_positions(self, first: FirstTokens, *, row_bytes: int, token_bytes: int) -> bool: ...
    def cannot_recompute(self, first: FirstTokens) -> None: ...
    def before_first_append(self, layer: CacheLayer, first: FirstTokens, measure: Measure | None) -> None: ...
    def add_setup(self, seconds: float) -> None: ...
    def warn_not_recomputable(self, position: int, module: nn.Module | None) -> None: ...
    def warn_whole_layer(self, module: nn.Module) -> None: ...
