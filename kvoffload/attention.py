"""The whole-layer attention path: one layer's K and V stand in a layer buffer before the model's own attention runs.

Owns the assembly of that buffer from resident blocks, arriving chunks, the tail and the new tokens. The model's
attention function then reads views of it; the buffer is free for another layer once that attention has been issued.
"""

from __future__ import annotations

import torch

from kvoffload.cache import CacheLayer, KVShape
from kvoffload.store import Block


def assemble(layer: CacheLayer, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All cached K and V of a layer followed by the new tokens', in logical order.

    The layer's job stays current until `layer.cache.engine.finish_current()`.

    Args:
        layer: a layer that has cached tokens; its state does not change.
        keys: of the new tokens, [rows, heads, tokens, dim]; values likewise.

    Returns:
        K and V, [rows, heads, cached + new tokens, dim], views of a layer buffer.
    """
    cache, engine, shape = layer.cache, layer.cache.engine, layer.shape
    assert shape is not None
    row_bytes = cache.rows * shape.row_bytes
    total = layer.num_tokens + keys.shape[2]
    engine.ensure_buffers(total * row_bytes)
    job = engine.begin(cache, layer)
    landing = job.buffer.bytes
    _place_resident(layer, landing)
    for chunk, data in engine.arriving(job):
        tokens = len(chunk.blocks) * cache.placement.block_tokens
        rows = chunk.blocks[0].rows
        activation = data.view(layer.activation_dtype).view(tokens, rows, layer.hidden_size)
        out = _tokens(landing, chunk.landing_offset, tokens, rows, shape)
        engine.backend.compute(reads=(data,), writes=(out,))
        layer.recompute_into(chunk.first_block, chunk.blocks[0], activation, out)
    index = cache.gather_index()
    if index is None:
        target = landing
    else:
        stored = landing[: layer.stored_kv_bytes].view(shape.dtype).view(-1, shape.width)
        target = engine.gather_buffer(total * row_bytes)
        gathered = target[: layer.num_stored_tokens * row_bytes].view(shape.dtype).view(-1, shape.width)
        engine.backend.compute(reads=(stored,))
        torch.index_select(stored, 0, index, out=gathered)
    everything = _tokens(target, 0, total, cache.rows, shape)
    newest = everything[layer.num_stored_tokens :]
    engine.backend.compute(writes=(newest,))
    newest[: layer.tail_tokens] = layer.tail
    new_keys, new_values = shape.split(newest[layer.tail_tokens :])
    new_keys.copy_(keys.permute(2, 0, 1, 3))
    new_values.copy_(values.permute(2, 0, 1, 3))
    engine.backend.compute(reads=(everything,))  # the attention that follows
    all_keys, all_values = shape.split(everything)
    return all_keys.permute(1, 2, 0, 3), all_values.permute(1, 2, 0, 3)


def _place_resident(layer: CacheLayer, landing: torch.Tensor) -> None:
    """Copy or recompute the blocks that live on the device, runs of equal form and rows at a time."""
    cache, shape = layer.cache, layer.shape
    assert shape is not None
    bt, offset, idx = cache.placement.block_tokens, 0, 0
    while idx < len(layer.blocks) and layer.blocks[idx].resident is not None:
        run = _resident_run(layer.blocks, idx)
        first, rows = layer.blocks[idx], layer.blocks[idx].rows
        assert first.resident is not None
        data = first.resident.as_strided((run * bt, rows, first.resident.shape[2]), first.resident.stride())
        out = _tokens(landing, offset, run * bt, rows, shape)
        cache.engine.backend.compute(writes=(out,))
        if first.form == "kv":
            out.copy_(data)
        else:
            layer.recompute_into(idx, first, data, out)
        offset += run * bt * rows * shape.row_bytes
        idx += run


def _resident_run(blocks: list[Block], start: int) -> int:
    """How many blocks from `start` on are resident, of one form and contiguous."""
    first = blocks[start]
    assert first.resident is not None
    stop = start + 1
    while stop < len(blocks):
        block = blocks[stop]
        address = first.resident.data_ptr() + (stop - start) * first.num_bytes
        if block.resident is None or block.form != first.form or block.resident.data_ptr() != address:
            break
        stop += 1
    return stop - start


def _tokens(buffer: torch.Tensor, offset: int, tokens: int, rows: int, shape: KVShape) -> torch.Tensor:
    """Part of a layer buffer as [tokens, rows, width]."""
    return buffer[offset : offset + tokens * rows * shape.row_bytes].view(shape.dtype).view(tokens, rows, shape.width)
