"""What an `OffloadedLayer` tells the cache it belongs to, and asks of it; `OffloadedHFCache` answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from kvoffload.cache.cache import CacheCore
from kvoffload.hf.first_tokens import FirstTokens
from kvoffload.hf.masks import MaskReader

Presence = Callable[[int], AbstractContextManager[None]]


@dataclass(slots=True)
class Progress:
    """How far a session is, as its caches and layers see it."""

    forwards: int = 0  # of the model that came to the first offloaded layer
    generations: int = 0  # calls of `generate()`
    setup_s: float = 0.0  # spent on memory and measurements within forwards


class OwningCache(Protocol):
    """The cache of a layer: an `OffloadedHFCache`."""

    core: CacheCore
    masks: MaskReader
    layers: list[Any]
    is_closed: bool
    progress: Progress
    presence: Presence  # a context in which the weights of a layer, by its position, can be read
    offers_segments: bool  # whether attention may take chunks one by one

    def claim(self, rows: int) -> None: ...
    def drop_ahead(self) -> None: ...
    def settle(self, position: int, first: FirstTokens) -> None: ...
    def use_whole_layers(self, module: nn.Module) -> None: ...
    def warn_whole_layer(self, module: nn.Module) -> None: ...
    def end_forward(self) -> None: ...
