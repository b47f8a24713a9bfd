"""A layer that holds attention and a state (Falcon-H1, Zamba2): its K and V are offloaded, its state stays.

Owns where the two meet in one object, as transformers expects. The state is of a fixed size, and transformers' own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from kvoffload.hf.layer import OffloadedLayer
from kvoffload.layer import CacheLayer

if TYPE_CHECKING:
    from kvoffload.hf.cache import OffloadedHFCache


class State:
    """What of a hybrid layer is not offloaded, with the methods that a cache calls on its layers."""

    def __init__(self, layer: OffloadedHybridLayer) -> None:
        self._layer = layer

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """The rows of a beam search."""
        LinearAttentionLayer.reorder_cache(self._layer, beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.reorder_cache(torch.arange(self._rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows (indices or a mask)."""
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def crop(self, tokens_to_remove: int) -> None:
        """As far as a state can be cropped."""
        LinearAttentionLayer.crop(self._layer, tokens_to_remove)

    def reset(self) -> None:
        """Forget it."""
        LinearAttentionLayer.reset(self._layer)

    @property
    def _rows(self) -> int:
        layer = self._layer
        states = (*layer.conv_states.values(), *layer.recurrent_states.values())
        return next((state.shape[0] for state in states if state is not None), 0)


class OffloadedHybridLayer(OffloadedLayer, LinearAttentionAndFullAttentionLayer):
    """As `OffloadedLayer`, with the state of transformers' layer beside it."""

    is_compileable = False
    is_croppable = LinearAttentionLayer.is_croppable

    def __init__(
        self, owner: OffloadedHFCache, core: CacheLayer, module: nn.Module | None, number_of_states: int
    ) -> None:
        OffloadedLayer.__init__(self, owner, core, module)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    @property
    def state(self) -> State:
        """What is not offloaded."""
        return State(self)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of the state; the shapes of K and V are learnt from the first ones."""
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)


def offloaded(theirs: Any, owner: OffloadedHFCache, core: CacheLayer, module: nn.Module | None) -> OffloadedLayer:
    """Ours in the place of a layer of transformers that grows."""
    if isinstance(theirs, LinearAttentionAndFullAttentionLayer):
        return OffloadedHybridLayer(owner, core, module, theirs.number_of_states)
    return OffloadedLayer(owner, core, module)
