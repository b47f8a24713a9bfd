"""What the first real tokens show about a layer, where its configuration only says what to expect.

Owns how such a layer recomputes its K and V, where its blocks would carry their position embeddings, and what is timed
of that. Does not decide what is done with it (the session does, which asks), nor when (`offloaded_layer`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import nn

from kvoffload.cache.layer import CacheLayer
from kvoffload.hf.arguments import name_of_cache
from kvoffload.pipeline.buffers import Buffers
from kvoffload.planning.forms import LEAST_HEAD_DIM, can_encode
from kvoffload.store import recompute
from kvoffload.store.carried import CarriedPositions, PositionLayout, rows_are_equal
from kvoffload.store.forms import activation as activations
from kvoffload.store.positions import INDEX_BYTES
from kvoffload.store.tail import KVShape, RowShape
from kvoffload.store.verification import Probe, Recompute

VERIFIED_TOKENS = 16  # the last of the first forward (padding comes first), on which recomputation is checked


class FirstTokens:
    """The first tokens that a layer was given.

    Args:
        layer: of which nothing is cached yet.
        module: its attention module, if it is known.
        keys: [rows, heads, tokens, dim]; values likewise.
        activation: the module's input, [rows, tokens, hidden]; None if it is not known.
        embeddings: position embeddings, each [rows or 1, tokens, width]; None: of a kind that cannot be stored.
        presence: a context in which the module's weights can be read outside its forward.
    """

    def __init__(
        self,
        layer: CacheLayer,
        module: nn.Module | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        activation: torch.Tensor | None,
        embeddings: tuple[torch.Tensor, ...] | None,
        *,
        presence: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._presence = presence
        self.layer, self.module = layer, module
        self._keys, self._values = keys, values
        self._activation, self._embeddings = activation, embeddings
        self.rows, self.tokens = keys.shape[0], keys.shape[2]
        self.kv_row_bytes = (keys[0, :, 0].numel() + values[0, :, 0].numel()) * keys.element_size()
        self.activation_row_bytes = self.kv_row_bytes
        if activation is not None:
            self.activation_row_bytes = activation[0, 0].numel() * activation.element_size()

    @property
    def kv_head_dim(self) -> int:
        """Of keys and values; 0 where their heads differ."""
        return self._keys.shape[3] if self._keys.shape == self._values.shape else 0

    def why_not_encoded(self) -> str:
        """Why no form of fewer bytes is for these K and V; "" where there are such."""
        keys, values = self._keys.shape, self._values.shape
        if keys != values:
            return f"it caches {keys[1]} x {keys[3]} and {values[1]} x {values[3]} values a token (latent attention?)"
        if not can_encode(keys[3]):
            return f"its heads have {keys[3]} values, and forms are for multiples of 4 from {LEAST_HEAD_DIM} on"
        return ""

    @property
    def kv_dtype(self) -> str:
        return str(self._keys.dtype).removeprefix("torch.")

    @cached_property
    def position_layout(self) -> PositionLayout | None:
        """Where blocks would carry the position embeddings of their tokens; None where they cannot."""
        if self._activation is None or not self._embeddings or not all(map(rows_are_equal, self._embeddings)):
            return None
        return PositionLayout(self._activation, self._embeddings, self.rows // self.layer.cache.prompt_copies)

    @property
    def carried_row_bytes(self) -> int:
        """Of position embeddings behind each activation, if blocks carry them; 0 where they cannot."""
        layout = self.position_layout
        return 0 if layout is None else layout.row_bytes - self.activation_row_bytes

    @property
    def position_token_bytes(self) -> int:
        """What a token's position embeddings take in a table of them on the device."""
        return sum(part.shape[2] * part.element_size() + INDEX_BYTES for part in self._embeddings or ())

    def recomputing_form(self, most_row_bytes: int | None) -> activations.Stored | None:
        """Blocks of activations that give K and V of the last of these tokens; None where there is no way to.

        Args:
            most_row_bytes: of a row of such a block, where blocks of the cache carry their position embeddings.
        """
        cache, layout = self.layer.cache, None
        if isinstance(cache.positions, CarriedPositions):
            layout = self.position_layout
            if layout is not None and most_row_bytes is not None and layout.row_bytes > most_row_bytes:
                layout = None  # slots are made for the first layer's
            if self._embeddings and layout is None:
                return None  # no place for its position embeddings
        way = way_to_recompute(self.module, self._activation, self._embeddings, self._keys, self._values)
        if way is None or self._activation is None:
            return None
        return activations.Stored(
            cache.engine.backend,
            KVShape.of(self._keys, self._values),
            RowShape(self._activation.shape[2], self._activation.dtype),
            functools.partial(_recompute, way, self._presence),
            probe=Probe.of(self._activation, self._embeddings or (), self._keys, self._values),
            positions=cache.positions,
            layout=layout,
            work=cache.work,
        )

    def prepare_measurement(self, way: Recompute, num_tokens: int) -> Callable[[], None]:
        """Recomputation of that many tokens (these, repeated), as often as it is called; see `prepare_measurement`."""
        assert self._activation is not None
        shape = KVShape.of(self._keys, self._values)
        buffers = self.layer.cache.engine.buffers
        return prepare_measurement(buffers, way, self._activation, self._embeddings or (), shape, num_tokens)


def _recompute(
    way: Recompute,
    presence: Callable[[], AbstractContextManager[None]],
    activation: torch.Tensor,
    embeddings: tuple[torch.Tensor, ...],
    out: torch.Tensor,
) -> None:
    """With the weights there: blocks are read back outside their layer's forward as well."""
    with presence():
        way(activation, embeddings, out)


def way_to_recompute(
    module: nn.Module | None,
    activation: torch.Tensor | None,
    embeddings: tuple[torch.Tensor, ...] | None,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> Recompute | None:
    """What reproduces K and V of some of the first tokens, or None.

    Args:
        module: the attention module, if it is known.
        activation: [rows, tokens, hidden].
        embeddings: each [rows or 1, tokens, width]; None: of a kind that cannot be stored.
        keys: [rows, heads, tokens, dim]; values likewise.
    """
    if module is None or activation is None or embeddings is None:
        return None
    cache_name = name_of_cache(module.forward)
    if cache_name is None:
        return None
    n = slice(-VERIFIED_TOKENS, None)
    parts = tuple(part[:, n] for part in embeddings)
    shape = KVShape.of(keys, values)
    return recompute.choose_path(
        module, shape, activation[:, n], parts, keys[:, :, n], values[:, :, n], cache_name=cache_name
    )


def prepare_measurement(
    buffers: Buffers,
    way: Recompute,
    activation: torch.Tensor,
    embeddings: tuple[torch.Tensor, ...],
    shape: KVShape,
    num_tokens: int,
) -> Callable[[], None]:
    """Recomputation of that many tokens (the first ones, repeated), as often as it is called.

    Args:
        buffers: idle; the memory that a step would write.
        way: to recompute.
        activation: [rows, tokens, hidden].
        embeddings: each [rows or 1, tokens, width].
        shape: of the layer's K/V.
        num_tokens: of each row.
    """
    index = torch.arange(num_tokens, device=activation.device) % activation.shape[1]
    parts = tuple(part.index_select(1, index) for part in embeddings)
    x = activation.transpose(0, 1).index_select(0, index)
    # All over a layer buffer, as in a step: in a cache it would look faster than it is.
    scratch = buffers.measuring_room()
    num_bytes = num_tokens * x.shape[1] * shape.row_bytes
    starts = range(0, scratch.numel() - num_bytes + 1, num_bytes)
    chunks = [scratch[start : start + num_bytes].view(shape.dtype) for start in starts]
    if not chunks:  # a cache shorter than a chunk
        chunks = [torch.empty(num_bytes // shape.dtype.itemsize, dtype=shape.dtype, device=x.device)]
    turns = itertools.cycle(chunk.view(num_tokens, x.shape[1], shape.width) for chunk in chunks)
    return lambda: way(x, parts, next(turns))
