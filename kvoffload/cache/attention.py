"""Attention over segments: each chunk is attended where it arrives, and the partial results are merged.

Owns the order of a layer's segments (resident blocks, chunks as they come, tail and new tokens) and the running result.
No place on the device holds a whole layer, so its memory does not grow with the context. Partial results merge by
log-sum-exp (online softmax: Milakov and Gimelshein 2018; FlashAttention, arXiv 2205.14135, section 3.1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvoffload.cache import ops
from kvoffload.cache.layer import CacheLayer
from kvoffload.cache.resident import ResidentBlocks
from kvoffload.store.tail import NewTokens


class Question(NamedTuple):
    """What a forward asks of one layer."""

    query: torch.Tensor  # [rows, q_tokens, q_heads, head_dim]
    scale: float
    valid: torch.Tensor | None = None  # int32 [rows, words]: bit p % 32 of word p // 32, may position p be attended
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # [q_heads]: a logit without a value


def attend(layer: CacheLayer, keys: torch.Tensor, values: torch.Tensor, question: Question) -> torch.Tensor:
    """Attention over all cached tokens of a layer and the new ones, causal among the new.

    Args:
        layer: a segmented layer that has cached tokens; its state does not change.
        keys: of the new tokens, [rows, heads, q_tokens, head_dim]; values likewise.
        question: the queries and how to score.

    Returns:
        [rows, q_tokens, q_heads, head_dim] in the dtype of the queries.
    """
    cache, engine, tail = layer.cache, layer.cache.engine, layer.tail
    assert tail is not None
    block_tokens = cache.placement.block_tokens
    answer = _Answer(layer, question)
    resident = ResidentBlocks(layer, max_blocks=cache.placement.chunk_blocks)

    job = engine.begin(cache, layer, in_layer_buffer=False)
    shares = max(1, len(job.chunks))  # spread, so that work which frees no slot never keeps the ring full for long

    def attend_resident(share: float = 1 / shares) -> None:
        for run in resident.due(share):
            if run.form == "kv":
                answer.add(run.data.view(answer.layout(*run.data.shape[:2])[1]), run.first_block)
            else:
                answer.add_recomputed(run.data, run.first_block)

    for chunk, room in engine.arriving(job, between=attend_resident):
        tokens, rows = len(chunk.blocks) * block_tokens, chunk.blocks[0].rows
        answer.is_sampled = chunk is job.chunks[0] and question.query.shape[1] == 1
        if chunk.form == "kv":
            kv = room.view(*answer.layout(tokens, rows))
            engine.backend.compute(reads=(kv,))
            answer.add(kv, chunk.first_block)
        else:
            row = layer.row_shapes["activation"]
            stored = room.view(row.dtype, (tokens, rows, row.width))
            engine.backend.compute(reads=(stored,))
            answer.add_recomputed(stored, chunk.first_block)
    attend_resident(1)  # what rounding left, or all of it
    answer.add_newest(keys, values)
    return answer.finish()


class _Answer:
    """The running result of one layer's attention."""

    def __init__(self, layer: CacheLayer, question: Question) -> None:
        assert layer.shape is not None
        query = question.query
        self._layer, self._question, self._shape = layer, question, layer.shape
        self._out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        self._lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        self._is_first = True
        self.is_sampled = False  # whether the next attention is timed: one of a layer's chunks in a step

    def layout(self, tokens: int, rows: int) -> tuple[torch.dtype, tuple[int, ...]]:
        """How attention reads K and V: [tokens, rows, 2, heads, head_dim]."""
        shape = self._shape
        return shape.dtype, (tokens, rows, 2, shape.key_heads, shape.key_dim)

    def add_recomputed(self, stored: torch.Tensor, first_block: int) -> None:
        """Attend to blocks stored as activations, [tokens, rows, width], which are on the device."""
        layer, backend = self._layer, self._layer.cache.engine.backend
        tokens, rows = stored.shape[:2]
        scratch = layer.cache.engine.scratch
        kv = scratch.view(self._shape.dtype, (tokens, rows, self._shape.width))
        backend.compute(writes=(kv,))
        layer.recompute_into(first_block, layer.blocks[first_block], stored, kv)
        backend.compute(reads=(kv,))
        self.add(scratch.view(*self.layout(tokens, rows)), first_block)

    def add(self, kv: torch.Tensor, first_block: int) -> None:
        """Attend to stored blocks, as `layout` says."""
        block_tokens = self._layer.cache.placement.block_tokens
        table = self._layer.cache.row_table.table
        if table is not None:
            table = table[first_block : first_block + kv.shape[0] // block_tokens]
        self._attend(kv, first_block * block_tokens, table)

    def add_newest(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Attend to the tail and the new tokens, [rows, heads, tokens, head_dim]."""
        tail = self._layer.tail
        assert tail is not None
        newest = tail.with_new(NewTokens(keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)))
        self._attend(newest.view(self.layout(*newest.shape[:2])[1]), self._layer.num_stored_tokens, None)

    def _attend(self, kv: torch.Tensor, first_position: int, row_table: torch.Tensor | None) -> None:
        question = self._question
        row_tokens = kv.shape[0] * question.query.shape[0] if self.is_sampled else 0
        with self._layer.cache.engine.backend.sampling("attention", row_tokens):
            ops.segment_attention(
                question.query,
                kv,
                self._out,
                self._lse,
                scale=question.scale,
                is_first=self._is_first,
                first_position=first_position,
                query_position=self._layer.num_tokens,
                valid=question.valid,
                row_table=row_table,
                block_tokens=self._layer.cache.placement.block_tokens if row_table is not None else 0,
                softcap=question.softcap,
            )
        self._is_first = self.is_sampled = False

    def finish(self) -> torch.Tensor:
        """The result, with attention sinks entering now."""
        result = torch.empty_like(self._question.query, memory_format=torch.contiguous_format)
        ops.finish(self._out, self._lse, result, self._question.sinks)
        return result
