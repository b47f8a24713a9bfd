"""A transformers Cache of our layers: what `generate()` does with all of them at once."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvoffload.cache.cache import CacheCore
from kvoffload.cache.layer import CacheLayer
from kvoffload.errors import ConfigError, KVOffloadError
from kvoffload.hf.layer_beside import LayerBeside, offloaded
from kvoffload.hf.layer_owner import FirstTokens, Measure
from kvoffload.hf.masks import MaskReader
from kvoffload.hf.offloaded_layer import OffloadedLayer
from kvoffload.units import counted


class CacheOwner(Protocol):
    """What a cache asks of the `Session` it belongs to."""

    def check_usable(self, cache: OffloadedHFCache) -> None: ...
    def forget(self, cache: OffloadedHFCache) -> None: ...
    def use_whole_layers(self, cache: OffloadedHFCache) -> None: ...
    def carries_positions(
        self, cache: OffloadedHFCache, first: FirstTokens, *, row_bytes: int, token_bytes: int
    ) -> bool: ...
    def cannot_recompute(self, cache: OffloadedHFCache, first: FirstTokens) -> None: ...
    def before_first_append(
        self,
        cache: OffloadedHFCache,
        layer: CacheLayer,
        first: FirstTokens,
        measure: Measure | None,
    ) -> None: ...
    def add_setup(self, seconds: float) -> None: ...
    @property
    def num_forwards(self) -> int: ...
    @property
    def num_generations(self) -> int: ...
    @property
    def offers_segments(self) -> bool: ...


class OffloadedHFCache(DynamicCache):
    """A transformers cache whose growing layers are offloaded; sliding, linear and shared layers stay transformers'.

    Args:
        model: the model it is for.
        session: whom to ask before the first update.
        core: the offloaded layers.
        modules: by the index of each offloaded layer, in order, its self-attention module where that is known.
        is_compiled: whether the model's forward is; ours then runs between its graphs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        session: CacheOwner,
        core: CacheCore,
        modules: dict[int, nn.Module | None],
        *,
        is_compiled: bool = False,
    ) -> None:
        super().__init__(config=model.config.get_text_config(decoder=True))
        self.session = session
        self.core = core
        self.is_closed = False
        self.masks = MaskReader()
        self._warned: set[str] = set()
        reference = weakref.ref(self)  # the core must not keep the cache alive

        def not_recomputable(position: int) -> None:
            if (cache := reference()) is not None:
                cache.warn_later_not_recomputable(position)

        core.not_recomputable = not_recomputable
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

    # ---- what its layers ask, which is for the session to answer ---------------------------------------------------

    @property
    def num_forwards(self) -> int:
        """Forwards of the model that came to the first offloaded layer."""
        return self.session.num_forwards

    @property
    def num_generations(self) -> int:
        """Calls of `generate()`."""
        return self.session.num_generations

    @property
    def offers_segments(self) -> bool:
        """Whether attention may take chunks one by one."""
        return self.session.offers_segments

    def check_usable(self) -> None:
        """Refuse what the session cannot serve now."""
        self.session.check_usable(self)

    def use_whole_layers(self) -> None:
        """A layer of a cache that was planned without layer buffers needs them."""
        self.session.use_whole_layers(self)

    def carries_positions(self, first: FirstTokens, *, row_bytes: int, token_bytes: int) -> bool:
        """Whether blocks carry their position embeddings."""
        return self.session.carries_positions(self, first, row_bytes=row_bytes, token_bytes=token_bytes)

    def cannot_recompute(self, first: FirstTokens) -> None:
        """K and V of the first layer do not follow from its activation."""
        self.session.cannot_recompute(self, first)

    def before_first_append(self, layer: CacheLayer, first: FirstTokens, measure: Measure | None) -> None:
        """A layer got its first tokens, and stores them next."""
        self.session.before_first_append(self, layer, first, measure)

    def add_setup(self, seconds: float) -> None:
        """Time spent on memory and measurements during a forward."""
        self.session.add_setup(seconds)

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedHFCache:
        """Refused: its tokens are in host memory and in flight.

        Raises:
            KVOffloadError: always.
        """
        raise KVOffloadError(
            "an offloaded cache cannot be copied with copy.deepcopy: give the common prompt to a session.new_cache() "
            "for each continuation, or continue one and crop it back (cache.crop(-n) removes the newest n tokens)"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached tokens of a layer."""
        return super().get_seq_length(layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: a positive number (the old meaning of a final length).
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 counts candidates in a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        removed = min(-tokens_to_remove, self.core.layers[0].num_tokens)
        self.check_usable()  # another cache may have had the engine's buffers
        for layer in (*self._others, *self._beside):
            layer.crop(tokens_to_remove)
        with torch.no_grad():
            self.core.crop(removed)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow a beam search: only the row table and the tails change."""
        for layer in self._others:
            layer.reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        for layer in self._others:
            layer.batch_repeat_interleave(repeats)
        self._select(torch.arange(self.core.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows (indices or a mask)."""
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

    def reset(self) -> None:
        """Forget everything."""
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
            self.core.reset()
            for layer in self._others:
                layer.reset()
            self._renew()
