"""Device memory that a prefill takes beside weights and cache, and how long a part of it may be."""

from __future__ import annotations

from typing import NamedTuple

from kvoffload.model.shape import ModelShape

DEVICE_SHARE = 0.9  # of the free device memory that "auto" takes at most
HOST_SHARE = 0.8  # of the free host memory that "auto" takes at most
PREFILL_TOKENS = 16384  # of all rows, in one part of a prefill: several `BUSY_TOKENS`; more takes the cache's room
BUSY_TOKENS = 4096  # of all rows that pass a layer at once, with which matrix products are as fast as with more
MIN_PREFILL_TOKENS = 64  # of each sequence, in one part of a prefill


class PrefillParts(NamedTuple):
    """How a prompt goes through a model whose weights are streamed."""

    tokens: int  # of each row, in one forward, for which all weights cross the link once
    rows: int  # that pass a layer at once, while its weights are there


def prefill_peak_bytes(shape: ModelShape, *, num_tokens: int, rows: int, rows_at_once: int | None = None) -> int:
    """Device memory that a prefill of `num_tokens` tokens, of `rows` rows together, needs beside weights and cache.

    Args:
        shape: of the model.
        num_tokens: of all rows together.
        rows: sequences.
        rows_at_once: that pass a layer at once; None: all.
    """
    itemsize = shape.activation_itemsize_bytes
    mlp = shape.mlp_matrices * shape.intermediate_size  # gate, up and their product live at once
    attention = 4 * shape.num_heads * shape.head_dim  # queries, output and their transposed copies
    kv = 3 * shape.kv_row_bytes  # one layer's K/V, and packed for two
    per_token = (max(mlp, attention) + 4 * shape.hidden_size) * itemsize + kv  # residual, norm, input, output
    logits = rows * shape.vocab_size * (itemsize + 4)  # and a float32 copy
    if rows_at_once is None or rows_at_once >= rows:
        return num_tokens * per_token + logits
    # of all rows: input and output of the layer, and what it caches, collected and together
    of_all = 4 * shape.hidden_size * itemsize + 2 * kv
    return num_tokens * of_all + -(-num_tokens // rows) * rows_at_once * per_token + logits


def prefill_parts(
    shape: ModelShape, *, rows: int, prompt_tokens: int, room_bytes: int, may_slice: bool = True
) -> PrefillParts:
    """The fewest passes over streamed weights in which a prefill fits in `room_bytes`.

    In one pass as few rows go through a layer at once as keep the device busy, so that more weights can stay there; all
    where slices save nothing, where layers cache something else than K and V of every token, and in several passes, of
    which the later ones read what the first has cached.

    Args:
        shape: of the model.
        rows: sequences.
        prompt_tokens: of each.
        room_bytes: that it may take.
        may_slice: False where something in the layers does not go by rows.
    """
    may_slice, tokens = may_slice and shape.goes_by_rows, prompt_tokens

    def peak_bytes(at_once: int) -> int:
        return prefill_peak_bytes(shape, num_tokens=rows * tokens, rows=rows, rows_at_once=at_once)

    while True:
        at_once = min(rows, -(-BUSY_TOKENS // tokens))
        if not may_slice or tokens < prompt_tokens or peak_bytes(at_once) >= peak_bytes(rows):
            at_once = rows
        if tokens <= MIN_PREFILL_TOKENS or peak_bytes(at_once) <= room_bytes:
            return PrefillParts(tokens, at_once)
        tokens = -(-tokens // 2)


def prefill_chunk_tokens(shape: ModelShape, *, rows: int, prompt_tokens: int, room_bytes: int) -> int:
    """Tokens of each row that go through a model at once, so that the prefill fits in `room_bytes`.

    As many as make `PREFILL_TOKENS` of all rows, or half of that as often as needed, down to `MIN_PREFILL_TOKENS`,
    which may not fit either. What a part takes is taken from blocks that could stay on the device in every later step.
    """
    tokens = min(prompt_tokens, max(MIN_PREFILL_TOKENS, PREFILL_TOKENS // rows))
    while tokens > MIN_PREFILL_TOKENS and prefill_peak_bytes(shape, num_tokens=rows * tokens, rows=rows) > room_bytes:
        tokens = -(-tokens // 2)
    return tokens
