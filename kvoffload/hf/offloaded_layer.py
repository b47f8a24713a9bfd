"""One layer of the cache as transformers sees it: takes K and V from an attention module, and answers its attention.

Owns what happens in which order within one forward of such a module. What the module's call asks for is in
attention_call.py, what follows from a layer's first tokens in first_tokens.py; the cached tokens are a `CacheLayer`'s.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from kvoffload.cache import attention, whole_layer
from kvoffload.cache.layer import CacheLayer
from kvoffload.errors import KVOffloadError, UnsupportedModelError
from kvoffload.hf.attention_call import asks_for_own_attention, can_segment, question, wants_contiguous
from kvoffload.hf.collected_rows import Collected, CollectedRows, Update
from kvoffload.hf.first_tokens import FirstTokens
from kvoffload.hf.layer_owner import OwningCache
from kvoffload.hf.masks import Padding
from kvoffload.store.forms import activation as activations
from kvoffload.store.tail import KVShape


class OffloadedLayer(CacheLayerMixin):
    """One layer of an `OffloadedHFCache`: the interface of a transformers cache layer over a `CacheLayer`."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    dtype: Any
    device: Any

    def __init__(self, owner: OwningCache, core: CacheLayer, module: nn.Module | None) -> None:
        self.core = core  # first: what transformers sets below may be kept there
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner = weakref.ref(owner)  # a cycle would keep the cache, and its memory, until the next collection
        self._module = module
        self._wants_contiguous = module is not None and wants_contiguous(module)
        self._activation: torch.Tensor | None = None  # input of the attention module in this forward
        self._embeddings: tuple[torch.Tensor, ...] | None = ()  # None: of a kind that cannot be stored
        self._mask: Any = None  # that the attention module was called with
        self._is_in_module = False
        self._collected: CollectedRows | None = None  # of a forward whose rows come in slices
        self._generation = 0  # number of the `generate()` that cached the newest tokens
        self._pending: Update | None = None  # to be cached once its attention has run
        self._was_attended: Literal["", "without", "with cached tokens"] = ""  # in this forward

    @property
    def keys(self) -> torch.Tensor | None:
        """All cached keys, [rows, heads, tokens, dim], put together on the device anew at every access.

        Slow: the whole layer crosses the link or is recomputed. None where nothing is cached. A copy: changing it
        changes nothing. In the middle of a forward of the model a tensor of that shape without values (on `meta`).
        """
        return self._read_back()[0]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._refuse_assignment(value)

    @property
    def values(self) -> torch.Tensor | None:
        """All cached values; as `keys`."""
        return self._read_back()[1]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._refuse_assignment(value)

    def _read_back(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        owner, core, pending, tokens = self._owner(), self.core, self._pending, self.get_seq_length()
        if owner is None or owner.is_closed or not tokens:
            return None, None
        if any(isinstance(layer, OffloadedLayer) and layer._is_in_module for layer in owner.layers):
            # Buffers are in use: only how many there are is known.
            shape = core.shape if pending is None else KVShape.of(pending.keys, pending.values)
            assert shape is not None
            rows = owner.core.rows if pending is None else pending.keys.shape[0]
            return (
                torch.empty(rows, shape.key_heads, tokens, shape.key_dim, dtype=shape.dtype, device="meta"),
                torch.empty(rows, shape.value_heads, tokens, shape.value_dim, dtype=shape.dtype, device="meta"),
            )
        owner.drop_ahead()
        owner.claim(owner.core.rows)
        return whole_layer.read_back(core)

    def _refuse_assignment(self, value: torch.Tensor | None) -> None:
        if value is not None:  # transformers says None when it makes a layer
            raise KVOffloadError("K and V of an offloaded cache cannot be replaced: take a session.new_cache()")

    @property
    def record_past(self) -> bool:
        """Whether a crop will follow each forward."""
        return self.core.cache.is_recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.core.cache.is_recording = value

    @property
    def is_in_forward(self) -> bool:
        """Whether its attention module is running, or has handed over what is not cached yet."""
        return self._is_in_module or self._pending is not None

    def copy_from(self, other: OffloadedLayer) -> None:
        """Become a copy of `other`, between two forwards; what is cached is copied already."""
        if other.is_initialized:
            self.is_initialized, self.dtype, self.device = True, other.dtype, other.device
        self._generation = other._generation

    def capture(self, activation: torch.Tensor, embeddings: Any, mask: Any) -> None:
        """Remember what the attention module was called with."""
        self._mask = mask
        self._activation, self._is_in_module, self._pending, self._was_attended = activation, True, None, ""
        if embeddings is None:
            self._embeddings = ()
        elif isinstance(embeddings, (tuple, list)) and all(
            isinstance(part, torch.Tensor) and part.dim() == 3 and part.is_floating_point() for part in embeddings
        ):
            self._embeddings = tuple(embeddings)
        else:
            self._embeddings = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: shapes are learnt from the first K/V of real tokens."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache new tokens and return all of K and V, [rows, heads, tokens, head_dim]."""
        owner, core = self._owner(), self.core
        assert owner is not None
        owner.claim(key_states.shape[0] if self._collected is None else self._collected.num_rows)
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise UnsupportedModelError("gradients do not flow through an offloaded cache: use torch.no_grad()")
        activation, self._activation = self._activation, None
        if activation is not None and activation.shape[:2] != key_states.permute(0, 2, 1, 3).shape[:2]:
            activation = None
        update = Update(key_states, value_states, activation)
        if self._is_in_module and owner.offers_segments and (core.shape is None or core.is_segmented):
            self._pending = update
            return key_states, value_states
        if self._collected is not None:
            self._collect(update, is_segmented=False)
            return key_states, value_states
        with torch.no_grad():
            self._prepare(update, is_segmented=False)
            result = (key_states, value_states)
            if core.num_tokens:
                result = whole_layer.whole_kv(core, key_states, value_states)
                if self._wants_contiguous:
                    result = (result[0].contiguous(), result[1].contiguous())
            self._append(update)
        return result

    @property
    def awaits_attention(self) -> bool:
        """Whether K and V were handed over in this forward and their attention is to come."""
        return self._pending is not None

    def refuse_more_attention(self, module: nn.Module) -> None:
        """The module attends once more in this forward; to what, only its own attention over whole layers knows.

        Raises:
            UnsupportedModelError: too late, there are cached tokens that this attention would not see.
        """
        owner, core = self._owner(), self.core
        if owner is None or not core.is_segmented or not self._was_attended:
            return
        if self._was_attended == "with cached tokens":
            raise UnsupportedModelError(
                f"{type(module).__name__} attends twice in one forward; use OffloadConfig(attention='whole_layer')"
            )
        core.is_segmented = False
        owner.use_whole_layers(module)

    def attend(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """The attention of the tokens just handed over, over all that is cached; then these are cached.

        Args:
            original: the attention function that was selected before ours.
            module: the attention module.
            query: [rows, heads, tokens, head_dim]; key and value are those of the new tokens.
            mask: as the original takes it.
            kwargs: further arguments of the call.
        """
        update, self._pending = self._pending, None
        owner, core = self._owner(), self.core
        assert update is not None and owner is not None
        self._was_attended = "with cached tokens" if core.num_tokens else "without"
        given_mask, self._mask = self._mask, None
        untouched = _same(key, update.keys) and _same(value, update.values)
        is_known = can_segment(module, query, key, value, kwargs)
        with torch.no_grad():
            if core.shape is None:
                output = original(module, query, key, value, mask, **kwargs)
                is_segmented = untouched and is_known and _is_mask(mask, given_mask)
                if not is_segmented and not asks_for_own_attention(module, kwargs, query.device):
                    owner.warn_whole_layer(module)
                if self._collected is not None:
                    self._collect(update, is_segmented=is_segmented)
                    return output
                self._prepare(update, is_segmented=is_segmented)
            elif not untouched or not _covers(mask, core.num_tokens + key.shape[2]):
                raise UnsupportedModelError(
                    f"{type(module).__name__} changes K, V or its mask after caching them in some calls only; "
                    "use OffloadConfig(attention='whole_layer')"
                )
            elif not core.num_tokens:
                output = original(module, query, key, value, mask, **kwargs)
                if self._collected is not None:
                    self._collect(update, is_segmented=core.is_segmented)
                    return output
                self._prepare(update, is_segmented=core.is_segmented)
            else:
                self._prepare(update, is_segmented=core.is_segmented)
                padding = self._padding(owner, query, mask) if is_known else None
                if padding is None:
                    if not asks_for_own_attention(module, kwargs, query.device):
                        owner.warn_whole_layer(module)
                    key, value = whole_layer.whole_kv(core, key, value)
                    with core.cache.engine.backend.recording("attention"):
                        output = original(module, query, key, value, mask, **kwargs)
                else:
                    output = attention.attend(core, key, value, question(query, padding, kwargs)), None
            self._append(update)
        return output

    def _padding(self, owner: OwningCache, query: torch.Tensor, mask: torch.Tensor | None) -> Padding | None:
        return owner.masks.read(
            mask,
            forward=owner.progress.forwards,
            rows=query.shape[0],
            query_tokens=query.shape[2],
            cached_tokens=self.core.num_tokens,
        )

    # ---- rows in slices ----------------------------------------------------------------------------------------------

    def begin_slices(self, rows: int) -> None:
        """The module is called several times in this forward, each time for the next of so many rows."""
        self._collected = CollectedRows(rows)

    def end_slices(self) -> None:
        """That is over; what was collected of an incomplete forward is lost."""
        self._collected = None

    def _collect(self, update: Update, *, is_segmented: bool) -> None:
        """Keep a slice; with the last one all rows are cached."""
        assert self._collected is not None
        whole = self._collected.add(Collected(update, self._embeddings, is_segmented))
        if whole is None:
            return
        self._embeddings = whole.embeddings
        with torch.no_grad():
            self._prepare(whole.update, is_segmented=whole.is_segmented)
            self._append(whole.update)
        self._embeddings = ()  # each layer has its own, unlike those of a whole forward

    def finish(self) -> None:
        """The attention module is done: cache what its own attention did not come to us for, free the layer buffer."""
        self._is_in_module = False
        update, self._pending = self._pending, None
        if update is not None:
            if self.core.num_tokens:
                raise UnsupportedModelError(
                    f"layer {self.core.position} attended without its cached tokens; "
                    "use OffloadConfig(attention='whole_layer')"
                )
            if self._collected is not None:
                self._collect(update, is_segmented=False)
            else:
                with torch.no_grad():
                    self._prepare(update, is_segmented=False)
                    self._append(update)
        self.core.cache.engine.finish_current()

    def abandon(self) -> None:
        """An exception ended the forward of the attention module: what it handed over is not cached."""
        self._is_in_module, self._pending = False, None

    def _prepare(self, update: Update, *, is_segmented: bool) -> None:
        """Make ready for the tokens of an update: the first ones settle how, all bring their position embeddings."""
        owner, core = self._owner(), self.core
        assert owner is not None
        if core.shape is None:
            core.is_segmented = is_segmented
            self._bind(owner, *update)
        elif self._begins_turn(owner, update) and not core.is_as_it_was():
            raise UnsupportedModelError(
                f"layer {core.position} does not compute the K and V that it cached any more (weights, adapters, hooks "
                "or the precision changed since): take a new cache, or use split='transfer'"
            )
        self._generation = owner.progress.generations
        form = core.forms.get(activations.Stored.name)
        if isinstance(form, activations.Stored):
            if update.activation is None:
                raise UnsupportedModelError(
                    f"layer {core.position} was updated outside its attention module; use split='transfer'"
                )
            if self._embeddings:
                form.capture(owner.progress.forwards, core.position, self._embeddings, core.num_tokens)

    def _begins_turn(self, owner: OwningCache, update: Update) -> bool:
        """Whether these may be the first tokens of a further turn; several that a crop follows are a step's."""
        several = update.keys.shape[2] > 1 and not self.record_past
        return self.core.num_tokens > 0 and (several or self._generation != owner.progress.generations)

    def _append(self, update: Update) -> None:
        owner, core = self._owner(), self.core
        assert owner is not None
        core.append(update.keys, update.values, update.activation)
        if core.position == len(owner.core.layers) - 1:
            owner.end_forward()

    def _bind(
        self, owner: OwningCache, keys: torch.Tensor, values: torch.Tensor, activation: torch.Tensor | None
    ) -> None:
        """First tokens: the session settles the plan and the forms by them, then there is room made."""
        core = self.core
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device
        core.is_full_precision = keys.dtype == values.dtype and keys.dtype in (torch.float32, torch.float64)
        core.is_full_precision &= not torch.is_autocast_enabled(keys.device.type)
        began = time.perf_counter()
        was_attended, self._was_attended = self._was_attended, ""  # a try of the module's forward may attend, too
        try:
            owner.settle(
                core.position,
                FirstTokens(
                    core,
                    self._module,
                    keys,
                    values,
                    activation,
                    self._embeddings,
                    presence=functools.partial(owner.presence, core.position),
                ),
            )
        finally:
            self._was_attended = was_attended
        core.bind(keys, values, activation)  # allocates and pins
        owner.progress.setup_s += time.perf_counter() - began

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the K/V that the next attention sees."""
        return self.core.num_tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Cached tokens."""
        return self.core.num_tokens + (0 if self._pending is None else self._pending.keys.shape[2])

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (the name that transformers 5.17 uses beside `get_max_length`)."""
        return -1

    def reset(self) -> None:
        """Forget everything (the cache resets its layers together)."""

    def offload(self) -> None:
        """Nothing: blocks are on the host already."""

    def prefetch(self) -> None:
        """Nothing: the engine does that."""


def _is_mask(mask: Any, given: Any) -> bool:
    """Whether a mask is the one that the module was given, and not made of what it took from the cache."""
    if mask is None or given is None:
        return mask is given
    if not isinstance(mask, torch.Tensor) or not isinstance(given, torch.Tensor):
        return mask is given
    return _same(mask, given) or (mask.shape == given.shape and torch.equal(mask, given.to(mask.dtype)))


def _covers(mask: Any, num_tokens: int) -> bool:
    """Whether a mask, if it is one, is for that many cached and new tokens."""
    return not isinstance(mask, torch.Tensor) or mask.shape[-1] == num_tokens


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same memory seen the same way."""
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    )
