"""A transformers Cache of our layers: what `generate()` does with all of them at once."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
import weakref
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from kvoffload.cache.cache import CacheCore
from kvoffload.config import MOST_DRAFTS
from kvoffload.errors import ConfigError, KVOffloadError
from kvoffload.hf.first_tokens import FirstTokens
from kvoffload.hf.layer_beside import LayerBeside, offloaded
from kvoffload.hf.layer_owner import Presence, Progress
from kvoffload.hf.masks import MaskReader
from kvoffload.hf.offloaded_layer import OffloadedLayer
from kvoffload.units import counted


class CacheOwner(Protocol):
    """What a cache asks of the `Session` it belongs to."""

    def claim(self, cache: OffloadedHFCache) -> None: ...
    def settle(self, cache: OffloadedHFCache, position: int, first: FirstTokens) -> None: ...
    def use_whole_layers(self, cache: OffloadedHFCache) -> None: ...
    def end_forward(self, cache: OffloadedHFCache) -> None: ...
    def forget(self, cache: OffloadedHFCache) -> None: ...
    def copy_of(self, cache: OffloadedHFCache) -> OffloadedHFCache: ...


class OffloadedHFCache(DynamicCache):
    """A transformers cache whose growing layers are offloaded; sliding, linear and shared layers stay transformers'.

    Args:
        model: the model it is for.
        session: whom to ask before the first update.
        core: the offloaded layers.
        modules: by the index of each offloaded layer, in order, its self-attention module where that is known.
        progress: of the session.
        offers_segments: whether attention may take chunks one by one.
        is_compiled: whether the model's forward is; ours then runs between its graphs.
        presence: by the position of an offloaded layer, a context in which its weights can be read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        session: CacheOwner,
        core: CacheCore,
        modules: dict[int, nn.Module | None],
        progress: Progress,
        *,
        offers_segments: bool,
        is_compiled: bool = False,
        presence: Presence = lambda position: contextlib.nullcontext(),
    ) -> None:
        super().__init__(config=model.config.get_text_config(decoder=True))
        self.session = session
        self.presence = presence
        self.core = core
        self.progress = progress
        self.offers_segments = offers_segments
        self.is_closed = False
        self.is_torn = False  # a forward ended in the middle, so that layers may hold different tokens
        # While a round of drafts is open: the newest tokens, which whoever decodes has not asked for yet; with rows at
        # their own pace slots of the tail.
        self.tokens_ahead: int | None = None
        self.masks = MaskReader()
        self._warned: set[str] = set()
        reference = weakref.ref(self)  # the core must not keep the cache alive

        def on_disagreement(position: int) -> None:
            if (cache := reference()) is not None:
                cache.warn_later_not_recomputable(position)

        core.on_disagreement = on_disagreement
        for position, (layer_idx, module) in enumerate(modules.items()):
            layer = offloaded(self.layers[layer_idx], self, core.layers[position], module)
            if is_compiled:
                for name in ("update", "get_seq_length", "get_mask_sizes"):
                    vars(layer)[name] = torch.compiler.disable(getattr(layer, name))
            self.layers[layer_idx] = layer

    @property
    def _others(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, OffloadedLayer)]

    @property
    def _beside(self) -> list[Any]:
        """Layers of transformers that hold what of ours is neither K nor V."""
        return [layer.beside for layer in self.layers if isinstance(layer, LayerBeside)]

    @property
    def other_device_bytes(self) -> int:
        """Device memory of the layers that are not offloaded."""
        held = [t for layer in self._others for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))

    def warn_not_recomputable(self, position: int, module: nn.Module | None) -> None:
        """Say once that K/V of this model are transferred."""
        self._warn_once(
            f"K/V of {type(module).__name__} cannot be recomputed from its input (layer {position}); "
            "they are transferred instead"
        )

    def warn_later_not_recomputable(self, position: int) -> None:
        """Say once that some K/V of this model are transferred."""
        self._warn_once(
            f"K/V of some tokens cannot be recomputed from the input of their attention layer, unlike the first ones "
            f"(layer {position}; hooks, adapters or the precision changed?); they are transferred instead"
        )

    def warn_not_quantizable(self, module: nn.Module | None, kv_dtype: str, why: str) -> None:
        """Say once that K/V of some layers stay exact though a form with loss was asked for."""
        self._warn_once(f"K/V of {type(module).__name__} stay exact, kv_dtype={kv_dtype!r} does not apply: {why}")

    def warn_whole_layer(self, module: nn.Module) -> None:
        """Say once that attention cannot take chunks one by one here."""
        self._warn_once(
            f"{type(module).__name__} attends in a way that attention over segments does not know (K and V of other "
            "shapes, a bias, a mask that is more than causal): whole layers are put together on the device"
        )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)

    # ---- what its layers ask, and what the session answers ---------------------------------------------------------

    def check_rows(self, rows: int) -> None:
        """Refuse tokens for another number of rows than are cached.

        Raises:
            ConfigError: so it is.
        """
        if self.core.layers[0].num_tokens and rows != self.core.rows:
            raise ConfigError(
                f"this cache holds {counted(self.core.rows, 'row')} and is given tokens for {rows} (beams counted): "
                "take a session.new_cache(), or change its rows first (batch_repeat_interleave, batch_select_indices)"
            )

    def claim(self, rows: int) -> None:
        """The next tokens are for so many rows: the cache can take them, and the engine's buffers are made for it.

        Raises:
            ConfigError: it has another number of rows.
            KVOffloadError: the session cannot serve it now.
        """
        self.session.claim(self)
        self.check_rows(rows)

    def settle(self, position: int, first: FirstTokens) -> None:
        """A layer got its first tokens, and stores them next: settle how."""
        self.session.settle(self, position, first)

    def use_whole_layers(self, module: nn.Module) -> None:
        """A layer of a cache that was planned without layer buffers needs them."""
        self.session.use_whole_layers(self)
        self.warn_whole_layer(module)

    def end_forward(self) -> None:
        """All layers have cached this forward's tokens: a plan for the next may follow, and its first copies begin."""
        if self.core.is_drafting:
            return
        self.core.drop_stored_positions()
        self.session.end_forward(self)
        if not self.core.layers[-1].awaits_crop:
            self.core.engine.prefetch(self.core)

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedHFCache:
        """Another cache with the same tokens, as people reuse a prefix; both go on by themselves.

        Stored blocks are shared, and none of their bytes is copied; what each caches from now on is its own.

        Raises:
            KVOffloadError: in the middle of a forward, of a closed cache, or while another thread generates.
        """
        is_drafted = self.tokens_ahead is not None
        self.drop_ahead()
        copied = self.session.copy_of(self)
        if is_drafted:
            copied.record_past(False)
        return copied

    def check_copyable(self) -> None:
        """Refuse a copy in the middle of a forward.

        Raises:
            KVOffloadError: so it is.
        """
        ours = [layer for layer in self.layers if isinstance(layer, OffloadedLayer)]
        lengths = {layer.num_tokens for layer in self.core.layers}
        if any(layer.is_in_forward for layer in ours) or len(lengths) > 1:
            raise KVOffloadError(
                "an offloaded cache cannot be copied in the middle of a forward: copy it between two calls of the model"
            )

    def copy_from(self, other: OffloadedHFCache) -> None:
        """Become a copy of `other`, as its offloaded layers are copied already."""
        self._warned = set(other._warned)
        vars(self).update({name: value for name, value in vars(other).items() if name not in vars(self)})
        for idx, theirs in enumerate(other.layers):
            ours: Any = self.layers[idx]
            if isinstance(theirs, OffloadedLayer):
                ours.copy_from(theirs)
            else:
                self.layers[idx] = copy.deepcopy(theirs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached tokens of a layer, as far as they were asked for."""
        return super().get_seq_length(layer_idx) - (self.tokens_ahead or 0)

    def drop_ahead(self) -> None:
        """End an open round of drafts: what was cached before anybody asked for it goes."""
        if self.tokens_ahead is not None:
            self.crop(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: a positive number (the old meaning of a final length).
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 counts candidates in a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        self.session.claim(self)  # another cache may have had the engine's buffers
        if self.core.unused:
            layer = self.core.layers[0]
            asked = layer.num_tokens - layer.num_stored_tokens - (self.tokens_ahead or 0)
            self.core.keep([asked] * self.core.rows)
            self.tokens_ahead = None
        tokens_to_remove -= self.tokens_ahead or 0
        self.tokens_ahead = None
        removed = min(-tokens_to_remove, self.core.layers[0].num_tokens)
        for layer in (*self._others, *self._beside):
            layer.crop(tokens_to_remove)
        with torch.no_grad():
            self.core.crop(removed)

    def take_back_last(self, prompt_tokens: int) -> None:
        """Of a prompt that is cached to its end the last token is forgotten: its logits are needed again.

        transformers would cut nothing off the prompt then, and cache all of it once more.
        """
        others = (*self._others, *self._beside)
        if self.core.layers[0].num_tokens == prompt_tokens and all(layer.is_croppable for layer in others):
            self.crop(-1)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow a beam search: only the row table and the tails change."""
        self.drop_ahead()
        for layer in self._others:
            layer.reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.drop_ahead()
        for layer in self._others:
            layer.batch_repeat_interleave(repeats)
        self._select(torch.arange(self.core.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows (indices or a mask)."""
        self.drop_ahead()
        for layer in self._others:
            layer.batch_select_indices(indices)
        self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def _select(self, indices: torch.Tensor) -> None:
        for layer in self._beside:
            layer.reorder_cache(indices)
        with torch.no_grad():
            self.core.select_rows(indices)

    def activate_past_recording(self) -> None:
        """A crop will follow each forward: full blocks leave the device only then."""
        super().activate_past_recording()  # type: ignore[no-untyped-call]
        self.core.is_recording = True

    def record_past(self, is_wanted: bool) -> None:
        """Whether a crop will follow each forward from now on; between two forwards, after the crop of the last."""
        if is_wanted == self.core.is_recording:
            return
        if is_wanted:
            self.activate_past_recording()
        for layer in () if is_wanted else (*self.layers, *self._beside):
            if hasattr(layer, "record_past"):
                layer.record_past = False

    @property
    def can_go_by_rows(self) -> bool:
        """Whether rows may have different numbers of tokens for a while: no layer counts slots, nor positions."""
        placement = self.core.placement
        is_planned = placement.ahead_tokens > MOST_DRAFTS + 1
        return is_planned and not (self._others or self._beside or placement.keeps_activations)

    def why_not_croppable(self) -> str | None:
        """Why tokens cannot be taken back one by one; None if they can. Known once something is cached."""
        others = (*self._others, *self._beside)
        for layer in others:
            if not layer.is_croppable:
                return f"a {type(layer).__name__} of the model cannot take tokens back (a recurrent state?)"
        if any(isinstance(layer, DynamicSlidingWindowLayer) for layer in others) and not _forwards_may_follow():
            return "sliding layers of this release of transformers (5.17) take back the tokens of one forward alone"
        return None

    def reset(self) -> None:
        """Forget everything."""
        self.tokens_ahead = None
        for layer in self._others:
            layer.reset()
        self._renew()
        self.core.reset()
        self.session.forget(self)

    def _renew(self) -> None:
        """What layers keep beside K and V begins anew, perhaps with other rows."""
        for layer in self.layers:
            if isinstance(layer, LayerBeside):
                layer.renew()

    def close(self) -> None:
        """Give back all memory; any later use raises."""
        if not self.is_closed:
            self.is_closed = True
            self.tokens_ahead = None
            self.core.reset()
            for layer in self._others:
                layer.reset()
            self._renew()


@functools.cache
def _forwards_may_follow() -> bool:
    """Whether a sliding layer that records its past shows later forwards no more than its window, before a crop."""
    layer = DynamicSlidingWindowLayer(sliding_window=2)
    layer.record_past = True
    state = torch.zeros(1, 1, 1, 1)
    return [layer.update(state, state)[0].shape[2] for _ in range(4)][-1] == 2
