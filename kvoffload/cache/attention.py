"""Attention over segments: each chunk is attended where it arrives, and the partial results are merged.

Owns the order of a layer's segments (resident blocks, chunks as they come, tail and new tokens) and the running result.
No place on the device holds a whole layer, so its memory does not grow with the context. Partial results merge by
log-sum-exp (online softmax: Milakov and Gimelshein 2018; FlashAttention, arXiv 2205.14135, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kvoffload.cache.layer import CacheLayer
from kvoffload.cache.resident import ResidentBlocks
from kvoffload.kernels import ops
from kvoffload.planning.forms import FORMS
from kvoffload.planning.placement import FormName
from kvoffload.store.block import Span
from kvoffload.store.device_memory import DeviceMemory
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

    While the cache is drafting, over those on the device alone: no job begins, and nothing is asked of the link.

    Args:
        layer: a segmented layer that has cached tokens; its state does not change.
        keys: of the new tokens, [rows, heads, q_tokens, head_dim]; values likewise.
        question: the queries and how to score.

    Returns:
        [rows, q_tokens, q_heads, head_dim] in the dtype of the queries.
    """
    cache, engine = layer.cache, layer.cache.engine
    answer = _Answer(layer, question)
    if cache.is_drafting:
        is_any_order = question.valid is None and cache.row_table.table is None
        for span, stored in layer.on_device(is_any_order):
            answer.add(stored, span)
        answer.add_newest(keys, values)
        return answer.finish()
    resident = ResidentBlocks(layer, max_blocks=cache.placement.chunk_blocks)

    job = engine.begin(cache, layer, in_layer_buffer=False)
    shares = max(1, len(job.cargo))  # spread, so that work which frees no slot never keeps the ring full for long

    def attend_resident(share: float = 1 / shares) -> None:
        for span in resident.due(share):
            answer.add(layer.resident(span), span)

    for chunk, room in engine.arriving(job, between=attend_resident):
        answer.is_sampled = chunk is job.cargo[0] and question.query.shape[1] == 1
        engine.backend.compute(reads=(room.part(chunk.source.numel()),))
        answer.add(room, chunk.span)
    attend_resident(1)  # what rounding left, or all of it
    answer.add_newest(keys, values)
    return answer.finish()


class _Answer:
    """The running result of one layer's attention."""

    def __init__(self, layer: CacheLayer, question: Question) -> None:
        query = question.query
        self._layer, self._question = layer, question
        self._scratch = layer.cache.engine.buffers.scratch
        self._out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        self._lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        self._is_first = True
        self._queries: dict[FormName, torch.Tensor] = {}  # as segments of a form are asked
        self.is_sampled = False  # whether the next attention is timed: one of a layer's chunks in a step

    def add(self, stored: DeviceMemory, span: Span) -> None:
        """Attend to blocks that are on the device."""
        form = self._layer.forms[span.form]
        table = self._layer.cache.row_table.table
        if table is not None:
            table = table[span.first_block : span.first_block + span.num_blocks]
        query = self._queries.get(span.form)
        if query is None:
            query = self._queries[span.form] = form.question(self._question.query)
        segment = form.segment(stored, span, self._scratch)
        self.is_sampled &= not FORMS[span.form].is_encoded  # decoding takes time that K and V do not
        self._attend(form.attend, query, segment, span.num_tokens, span.first_token, table)

    def add_newest(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Attend to the tail and the new tokens, [rows, heads, tokens, head_dim]."""
        tail = self._layer.tail
        assert tail is not None
        newest = tail.with_new(NewTokens(keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)))
        heads, head_dim = keys.shape[1], keys.shape[3]
        kv = newest.view(*newest.shape[:2], 2, heads, head_dim)
        query = self._question.query
        self._attend(ops.segment_attention, query, kv, kv.shape[0], self._layer.num_stored_tokens, None)

    def _attend(
        self,
        attention: Callable[..., None],
        query: torch.Tensor,
        segment: Any,
        tokens: int,
        first_position: int,
        row_table: torch.Tensor | None,
    ) -> None:
        question = self._question
        row_tokens = tokens * question.query.shape[0] if self.is_sampled else 0
        with self._layer.cache.engine.backend.sampling("attention", row_tokens):
            attention(
                query,
                segment,
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
