"""What the first real tokens show about a layer, where its configuration only says what to expect.

Owns how such a layer recomputes its K and V, where its blocks carry their position embeddings, and what is timed of
that. Does not decide what is done with it (the session does), nor when (`offloaded_layer`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from kvoffload.cache import recompute
from kvoffload.cache.layer import CacheLayer
from kvoffload.cache.verification import Recompute
from kvoffload.hf.arguments import name_of_cache
from kvoffload.hf.layer_owner import FirstTokens, OwningCache
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.store.carried import CarriedPositions, PositionLayout, rows_are_equal
from kvoffload.store.positions import INDEX_BYTES
from kvoffload.store.tail import KVShape

VERIFIED_TOKENS = 16  # the last of the first forward (padding comes first), on which recomputation is checked


def settle_position_layout(
    owner: OwningCache,
    core: CacheLayer,
    first: FirstTokens,
    activation: torch.Tensor | None,
    embeddings: tuple[torch.Tensor, ...] | None,
) -> PositionLayout | None:
    """Where a layer's blocks carry their position embeddings, if they do.

    The first layer settles for the whole cache whether they do, and asks the session for that.

    Args:
        owner: the cache.
        core: the layer.
        first: sizes of its first tokens.
        activation: theirs, [rows, tokens, hidden].
        embeddings: theirs, each [rows or 1, tokens, width]; None: of a kind that cannot be stored.
    """
    cache, is_first = owner.core, core.position == 0
    layout, row_bytes = None, 0
    if not is_first and not isinstance(cache.positions, CarriedPositions):
        return None
    if activation is not None and embeddings and all(map(rows_are_equal, embeddings)):
        layout = PositionLayout(activation, embeddings, first.rows // cache.prompt_copies)
        row_bytes = layout.row_bytes - first.activation_row_bytes
    if not is_first:  # slots are made for the first layer's
        settled = cache.layers[0].layout
        return layout if layout and settled and layout.row_bytes <= settled.row_bytes else None
    token_bytes = sum(part.shape[2] * part.element_size() + INDEX_BYTES for part in embeddings or ())
    is_wanted = owner.carries_positions(first, row_bytes=row_bytes, token_bytes=token_bytes)
    cache.carry_positions(is_wanted)
    return layout if is_wanted else None


def way_to_recompute(
    module: nn.Module | None,
    core: CacheLayer,
    activation: torch.Tensor | None,
    embeddings: tuple[torch.Tensor, ...] | None,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> Recompute | None:
    """What reproduces K and V of some of the first tokens, or None.

    Args:
        module: the attention module, if it is known.
        core: the layer; its layout is settled.
        activation: [rows, tokens, hidden].
        embeddings: each [rows or 1, tokens, width]; None: of a kind that cannot be stored.
        keys: [rows, heads, tokens, dim]; values likewise.
    """
    if module is None or activation is None or embeddings is None:
        return None
    cache_name = name_of_cache(module.forward)
    if cache_name is None:
        return None
    if embeddings and core.layout is None and isinstance(core.cache.positions, CarriedPositions):
        return None  # no place for its position embeddings
    n = slice(-VERIFIED_TOKENS, None)
    parts = tuple(part[:, n] for part in embeddings)
    shape = KVShape.of(keys, values)
    return recompute.choose_path(
        module, shape, activation[:, n], parts, keys[:, :, n], values[:, :, n], cache_name=cache_name
    )


def prepare_measurement(
    engine: TransferEngine,
    way: Recompute,
    activation: torch.Tensor,
    embeddings: tuple[torch.Tensor, ...],
    shape: KVShape,
    num_tokens: int,
) -> Callable[[], None]:
    """Recomputation of that many tokens (the first ones, repeated), as often as it is called.

    Args:
        engine: idle; has the memory that a step would write.
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
    scratch = engine.measuring_room()
    num_bytes = num_tokens * x.shape[1] * shape.row_bytes
    starts = range(0, scratch.numel() - num_bytes + 1, num_bytes)
    chunks = [scratch[start : start + num_bytes].view(shape.dtype) for start in starts]
    if not chunks:  # a cache shorter than a chunk
        chunks = [torch.empty(num_bytes // shape.dtype.itemsize, dtype=shape.dtype, device=x.device)]
    turns = itertools.cycle(chunk.view(num_tokens, x.shape[1], shape.width) for chunk in chunks)
    return lambda: way(x, parts, next(turns))
