"""Device memory that a prefill takes beside weights and cache."""

from __future__ import annotations

from kvoffload.model.shape import ModelShape


def prefill_peak_bytes(shape: ModelShape, *, num_tokens: int, rows: int) -> int:
    """Device memory that a prefill of `num_tokens` tokens, of `rows` rows together, needs beside weights and cache."""
    itemsize = shape.activation_itemsize_bytes
    mlp = shape.mlp_matrices * shape.intermediate_size  # gate, up and their product live at once
    attention = 4 * shape.num_heads * shape.head_dim  # queries, output and their transposed copies
    kv = 3 * shape.kv_row_bytes  # one layer's K/V, and packed for two
    per_token = (max(mlp, attention) + 4 * shape.hidden_size) * itemsize + kv  # residual, norm, input, output
    logits = rows * shape.vocab_size * (itemsize + 4)  # and a float32 copy
    return num_tokens * per_token + logits
