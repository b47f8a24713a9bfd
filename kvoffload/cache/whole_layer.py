"""The whole-layer attention path: one layer's K and V stand in a layer buffer before the model's own attention runs.

Taken where attention over segments (`attention`) does not know the model or the call. Owns the assembly of that buffer
from resident blocks, arriving chunks, the tail and the new tokens. The model's attention function then reads views of
it; the buffer is free for another layer once that attention has been issued.
"""

from __future__ import annotations

import torch

from kvoffload.cache.layer import CacheLayer
from kvoffload.cache.resident import ResidentBlocks
from kvoffload.store.tail import KVShape


def whole_kv(layer: CacheLayer, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All cached K and V of a layer followed by the new tokens', in logical order.

    The layer's job stays current until `layer.cache.engine.finish_current()`.

    Args:
        layer: a layer that has cached tokens; its state does not change.
        keys: of the new tokens, [rows, heads, tokens, dim]; values likewise.

    Returns:
        K and V, [rows, heads, cached + new tokens, dim], views of a layer buffer.
    """
    cache, engine, shape, tail = layer.cache, layer.cache.engine, layer.shape, layer.tail
    assert shape is not None and tail is not None
    row_bytes = cache.rows * shape.row_bytes
    total = layer.num_tokens + keys.shape[2]
    engine.ensure_buffers(max(total * row_bytes, layer.stored_kv_bytes))  # blocks land with the rows they have
    job = engine.begin(cache, layer, in_layer_buffer=True)
    assert job.buffer is not None
    landing = job.buffer.bytes
    resident = _ResidentPlacing(layer, landing)
    shares = sum(map(job.has_slot, job.cargo))  # spread, so that other work never keeps the ring full for long
    if shares == 0:
        resident.place(1)
    for chunk, room in engine.arriving(job):
        out = _tokens(landing, chunk.kv_offset, chunk.span.num_tokens, chunk.span.rows, shape)
        engine.backend.compute(reads=(room.part(chunk.source.numel()),), writes=(out,))
        layer.forms[chunk.span.form].restore(room, chunk.span, out)
        resident.place(1 / shares)
    resident.place(1)
    index = cache.gather_index(layer.blocks)
    if index is None:
        target = landing
    else:
        stored = landing[: layer.stored_kv_bytes].view(shape.dtype).view(-1, shape.width)
        target = engine.buffers.gather_buffer(total * row_bytes)
        gathered = target[: layer.num_stored_tokens * row_bytes].view(shape.dtype).view(-1, shape.width)
        engine.backend.compute(reads=(stored,))
        torch.index_select(stored, 0, index, out=gathered)
    everything = _tokens(target, 0, total, cache.rows, shape)
    newest = everything[layer.num_stored_tokens :]
    engine.backend.compute(writes=(newest,))
    newest[: tail.num_tokens] = tail.kv
    new_keys, new_values = shape.split(newest[tail.num_tokens :])
    new_keys.copy_(keys.permute(2, 0, 1, 3))
    new_values.copy_(values.permute(2, 0, 1, 3))
    engine.backend.compute(reads=(everything,))  # the attention that follows
    all_keys, all_values = shape.split(everything)
    return all_keys.permute(1, 2, 0, 3), all_values.permute(1, 2, 0, 3)


def read_back(layer: CacheLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """All cached K and V of a layer, [rows, heads, tokens, dim], in memory of their own; between two forwards.

    Every block crosses the link or is recomputed, as in a decode step of this layer; what was prefetched is dropped.
    """
    engine, shape = layer.cache.engine, layer.shape
    assert shape is not None
    rows, device, buffer_bytes = layer.cache.rows, engine.backend.device, engine.buffers.layer_bytes
    keys = torch.empty(rows, shape.key_heads, 0, shape.key_dim, dtype=shape.dtype, device=device)
    values = torch.empty(rows, shape.value_heads, 0, shape.value_dim, dtype=shape.dtype, device=device)
    with torch.no_grad():
        keys, values = (part.clone() for part in whole_kv(layer, keys, values))
    engine.finish_current()
    engine.resize_buffers(buffer_bytes)  # attention over segments has none, and no room for them is planned
    return keys, values


class _ResidentPlacing:
    """K and V of resident blocks, into the layer buffer."""

    def __init__(self, layer: CacheLayer, landing: torch.Tensor) -> None:
        self._layer, self._landing = layer, landing
        self._blocks = ResidentBlocks(layer)

    def place(self, share: float) -> None:
        """A further share of the blocks."""
        layer, shape = self._layer, self._layer.shape
        assert shape is not None
        for span in self._blocks.due(share):
            offset = layer.kv_offset(span.first_block)
            out = _tokens(self._landing, offset, span.num_tokens, span.rows, shape)
            layer.cache.engine.backend.compute(writes=(out,))
            layer.forms[span.form].restore(layer.resident(span), span, out)


def _tokens(buffer: torch.Tensor, offset: int, tokens: int, rows: int, shape: KVShape) -> torch.Tensor:
    """Part of a layer buffer as [tokens, rows, width]."""
    return buffer[offset : offset + tokens * rows * shape.row_bytes].view(shape.dtype).view(tokens, rows, shape.width)
