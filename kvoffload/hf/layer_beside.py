"""Layers that hold more than K and V: these are offloaded, what else there is stays with transformers' own layer.

Owns where ours and theirs meet in one object: the state of layers with attention and a recurrence (Falcon-H1, Zamba2),
the index keys of sparse attention (DeepSeek-V3.2, GLM-5). Theirs never sees K or V, so that its methods for rows, crops
and resets change the rest alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    DynamicIndexedLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from kvoffload.cache.layer import CacheLayer
from kvoffload.hf.layer_owner import OwningCache
from kvoffload.hf.offloaded_layer import OffloadedLayer


class LayerBeside(OffloadedLayer):
    """An offloaded layer with one of transformers for the rest.

    Args:
        theirs: an unused layer of transformers; whatever ours lacks is looked up there.
    """

    def __init__(self, owner: OwningCache, core: CacheLayer, module: nn.Module | None, theirs: Any) -> None:
        self.beside = theirs
        self._unused = copy.deepcopy(theirs)
        super().__init__(owner, core, module)

    def copy_from(self, other: OffloadedLayer) -> None:
        super().copy_from(other)
        assert isinstance(other, LayerBeside)
        self.beside = copy.deepcopy(other.beside)

    def renew(self) -> None:
        """Forget the rest; their own reset keeps the number of rows."""
        self.beside = copy.deepcopy(self._unused)

    def __getattr__(self, name: str) -> Any:
        if name in ("beside", "_unused"):  # not made yet
            raise AttributeError(name)
        return getattr(self.beside, name)


class HybridLayer(LayerBeside, LinearAttentionCacheLayerMixin):
    """A layer with attention and a recurrent state."""

    is_compileable = False

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Where the state can be put back as it was."""
        return bool(self.beside.is_croppable)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: shapes are learnt from the first tokens."""

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Of the state."""
        state: torch.Tensor = self.beside.update_conv_state(*args, **kwargs)
        return state

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Of the state."""
        state: torch.Tensor = self.beside.update_recurrent_state(*args, **kwargs)
        return state

    def activate_past_recording(self) -> None:
        """A crop will follow each forward."""
        self.beside.activate_past_recording()
        self.record_past = True


def offloaded(theirs: Any, owner: OwningCache, core: CacheLayer, module: nn.Module | None) -> OffloadedLayer:
    """Ours in the place of a layer of transformers that grows."""
    if isinstance(theirs, LinearAttentionAndFullAttentionLayer):
        return HybridLayer(owner, core, module, theirs)
    if isinstance(theirs, DynamicIndexedLayer):
        return LayerBeside(owner, core, module, theirs)
    return OffloadedLayer(owner, core, module)
