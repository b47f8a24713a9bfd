"""Device memory that a prefill takes beside weights and cache, and how long a part of it may be."""

from __future__ import annotations

from kvoffload.model.shape import ModelShape

DEVICE_SHARE = 0.9  # of the free device memory that "auto" takes at most
HOST_SHARE = 0.8  # of the free host memory that "auto" takes at most
MIN_PREFILL_TOKENS = 64  # of each sequence, in one part of a prefill


def prefill_peak_bytes(shape: ModelShape, *, num_tokens: int, rows: int) -> int:
    """Device memory that a prefill of `num_tokens` tokens, of `rows` rows together, needs beside weights and cache."""
    itemsize = shape.activation_itemsize_bytes
    mlp = shape.mlp_matrices * shape.intermediate_size  # gate, up and their product live at once
    attention = 4 * shape.num_heads * shape.head_dim  # queries, output and their transposed copies
    kv = 3 * shape.kv_row_bytes  # one layer's K/V, and packed for two
    per_token = (max(mlp, attention) + 4 * shape.hidden_size) * itemsize + kv  # residual, norm, input, output
    logits = rows * shape.vocab_size * (itemsize + 4)  # and a float32 copy
    return num_tokens * per_token + logits


def prefill_chunk_tokens(shape: ModelShape, *, rows: int, prompt_tokens: int, room_bytes: int) -> int:
    """Tokens of each row that go through a model at once, so that the prefill fits in `room_bytes`.

    The whole prompt, or half of it as often as needed, down to `MIN_PREFILL_TOKENS`, which may not fit either.
    """
    tokens = prompt_tokens
    while tokens > MIN_PREFILL_TOKENS and prefill_peak_bytes(shape, num_tokens=rows * tokens, rows=rows) > room_bytes:
        tokens = -(-tokens // 2)
    return tokens
