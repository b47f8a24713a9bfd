"""What the kernels ask of their arguments, checked once for all implementations, before anything is launched.

Owns the `ValueError`s of every operation here. Reads shapes, strides, dtypes and devices only, never data: a few
microseconds on the host and no wait for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvoffload.kernels.stored import StoredKV

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def segment(
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    first_position: int,
    query_position: int,
    valid: Tensor | None,
    row_table: Tensor | None,
    block_tokens: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """Arguments of `segment_attention`; see there for what they mean.

    Raises:
        ValueError: naming the tensor, what was given and what is needed.
    """
    if q.dim() != 4 or kv.dim() != 5:
        raise ValueError(
            "q must be [batch, q_tokens, q_heads, head_dim] and kv [tokens, rows, 2, kv_heads, head_dim], "
            f"got {list(q.shape)} and {list(kv.shape)}"
        )
    head_dim, dtype = q.shape[3], q.dtype
    tokens, rows, two, kv_heads, kv_dim = kv.shape
    if two != 2 or kv_dim != head_dim:
        raise ValueError(f"kv must be [tokens, rows, 2, kv_heads, {head_dim}] for this q, got {list(kv.shape)}")
    if kv.dtype != dtype and dtype in FLOATS:
        raise ValueError(f"kv has dtype {kv.dtype}, needed is that of q, {dtype}")
    if q.stride(3) != 1 or kv.stride(4) != 1:
        raise ValueError(
            f"q and kv need unit stride in head_dim, their strides are {list(q.stride())} and {list(kv.stride())}"
        )
    _attention(
        q,
        kv,
        (tokens, rows, kv_heads),
        out,
        lse,
        first_position=first_position,
        query_position=query_position,
        valid=valid,
        row_table=row_table,
        block_tokens=block_tokens,
        window=window,
        softcap=softcap,
    )


def stored(
    q: Tensor,
    stored: StoredKV,
    out: Tensor,
    lse: Tensor,
    *,
    first_position: int,
    query_position: int,
    valid: Tensor | None,
    row_table: Tensor | None,
    block_tokens: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """Arguments of `stored_attention`; see there for what they mean.

    Raises:
        ValueError: naming the tensor, what was given and what is needed.
    """
    data = stored.data
    if q.dim() != 4 or q.shape[3] != stored.head_dim or q.stride(3) != 1:
        raise ValueError(
            f"q must be [batch, q_tokens, q_heads, {stored.head_dim}] for these blocks, with unit stride in the last "
            f"dimension, got {list(q.shape)} with strides {list(q.stride())}"
        )
    if data.dim() != 2 or data.dtype is not torch.uint8 or not data.is_contiguous():
        raise ValueError(
            f"blocks must be contiguous [blocks, bytes] of torch.uint8, got {list(data.shape)}, {data.dtype}"
        )
    if row_table is not None and block_tokens != stored.block_tokens:
        raise ValueError(f"blocks have {stored.block_tokens} tokens, a row of row_table {block_tokens}: needed is one")
    _attention(
        q,
        data,
        (stored.num_tokens, stored.rows, stored.heads),
        out,
        lse,
        first_position=first_position,
        query_position=query_position,
        valid=valid,
        row_table=row_table,
        block_tokens=block_tokens,
        window=window,
        softcap=softcap,
    )


def _attention(
    q: Tensor,
    kv: Tensor,
    kv_shape: tuple[int, int, int],
    out: Tensor,
    lse: Tensor,
    *,
    first_position: int,
    query_position: int,
    valid: Tensor | None,
    row_table: Tensor | None,
    block_tokens: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """What both kinds of K and V ask; `kv_shape` is tokens, rows and heads."""
    batch, q_tokens, q_heads, _ = q.shape
    tokens, rows, kv_heads = kv_shape
    dtype, device = q.dtype, q.device
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"the {q_heads} heads of q must be a multiple of the {kv_heads} heads of kv")
    if dtype not in FLOATS:
        raise ValueError(f"q has dtype {dtype}, needed is one of {_names(FLOATS)}")
    accumulated = torch.float64 if dtype is torch.float64 else torch.float32
    _accumulator("out", out, list(q.shape), accumulated, device)
    _accumulator("lse", lse, [batch, q_tokens, q_heads], accumulated, device)
    if kv.device != device:
        raise ValueError(f"kv is on {kv.device}, q on {device}")
    if first_position < 0 or query_position < 0:
        raise ValueError(f"positions start at 0, got first_position={first_position}, query_position={query_position}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None, got {softcap}")
    if valid is not None:
        words = -(-(first_position + tokens) // 32)
        _table("valid", valid, device)
        if valid.shape[0] != batch or valid.shape[1] < words:
            raise ValueError(
                f"valid must be [{batch}, {words} or more] to tell of positions up to {first_position + tokens}, "
                f"got {list(valid.shape)}"
            )
    if row_table is not None:
        _table("row_table", row_table, device)
        if row_table.shape[1] != batch or block_tokens < 1 or row_table.shape[0] * block_tokens < tokens:
            raise ValueError(
                f"row_table must be [blocks, {batch}] with blocks * block_tokens of at least {tokens} tokens, "
                f"got {list(row_table.shape)} and block_tokens={block_tokens}"
            )
    elif rows != batch:
        raise ValueError(f"kv has {rows} rows and q a batch of {batch}: without a row_table they must be equal")


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Arguments of `merge_`.

    Raises:
        ValueError: naming the tensor, what was given and what is needed.
    """
    shape = _accumulators(out, lse)
    _accumulator("part_out", part_out, shape, out.dtype, out.device)
    _accumulator("part_lse", part_lse, shape[:3], out.dtype, out.device)


def finish(out: Tensor, lse: Tensor, result: Tensor, sinks: Tensor | None) -> None:
    """Arguments of `finish`.

    Raises:
        ValueError: naming the tensor, what was given and what is needed.
    """
    shape = _accumulators(out, lse)
    if list(result.shape) != shape or result.dtype not in FLOATS or result.device != out.device:
        raise ValueError(
            f"result must be {shape} of one of {_names(FLOATS)} on {out.device}, "
            f"got {list(result.shape)}, {result.dtype} on {result.device}"
        )
    if sinks is not None and (
        list(sinks.shape) != [shape[2]] or sinks.dtype not in FLOATS or sinks.device != out.device
    ):
        raise ValueError(
            f"sinks must be [{shape[2]}] of one of {_names(FLOATS)} on {out.device}, "
            f"got {list(sinks.shape)}, {sinks.dtype} on {sinks.device}"
        )


def rope(keys: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Arguments of `rope_`.

    Raises:
        ValueError: naming the tensor, what was given and what is needed.
    """
    if keys.dim() != 4 or keys.dtype not in FLOATS:
        raise ValueError(
            f"keys must be [tokens, rows, heads, head_dim] of one of {_names(FLOATS)}, "
            f"got {list(keys.shape)}, {keys.dtype}"
        )
    tokens, rows, _, head_dim = keys.shape
    for name, part in (("cos", cos), ("sin", sin)):
        if part.dim() != 3 or part.shape != cos.shape or part.shape[0] != tokens or part.shape[1] not in (1, rows):
            raise ValueError(f"{name} must be [{tokens}, {rows} or 1, rotary_dim], got {list(part.shape)}")
        if part.dtype not in FLOATS or part.device != keys.device:
            raise ValueError(
                f"{name} must be of one of {_names(FLOATS)} on {keys.device}, got {part.dtype} on {part.device}"
            )
    if cos.shape[2] % 2 or not 0 < cos.shape[2] <= head_dim:
        raise ValueError(f"rotary_dim must be even and at most head_dim, {head_dim}, got {cos.shape[2]}")


def linear_rope(x: Tensor, weight: Tensor, bias: Tensor | None, keys: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Arguments of `linear_rope`.

    Raises:
        ValueError: naming the tensor, what was given and what is needed.
    """
    rope(keys, cos, sin)
    tokens, rows, heads, head_dim = keys.shape
    if x.dim() != 2 or x.shape[0] != tokens * rows:
        raise ValueError(f"x must be [{tokens * rows}, hidden] for these keys, got {list(x.shape)}")
    wanted = {"x": [tokens * rows, x.shape[1]], "weight": [heads * head_dim, x.shape[1]], "bias": [heads * head_dim]}
    for name, given in (("x", x), ("weight", weight), ("bias", bias)):
        if given is None:
            continue
        if list(given.shape) != wanted[name] or given.dtype != keys.dtype or given.device != keys.device:
            raise ValueError(
                f"{name} must be {wanted[name]} of {keys.dtype} on {keys.device}, "
                f"got {list(given.shape)}, {given.dtype} on {given.device}"
            )
        if given.stride(-1) != 1:
            raise ValueError(f"{name} needs unit stride in its last dimension, its strides are {list(given.stride())}")
    if keys.stride(3) != 1:
        raise ValueError(f"keys need unit stride in head_dim, their strides are {list(keys.stride())}")


def _accumulators(out: Tensor, lse: Tensor) -> list[int]:
    """The shape of `out`, once it and `lse` were found to fit each other."""
    shape = list(out.shape)
    if len(shape) != 4 or out.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"out must be [batch, q_tokens, q_heads, head_dim] of float32 or float64, got {shape}, {out.dtype}"
        )
    _accumulator("out", out, shape, out.dtype, out.device)
    _accumulator("lse", lse, shape[:3], out.dtype, out.device)
    return shape


def _accumulator(name: str, given: Tensor, shape: list[int], dtype: torch.dtype, device: torch.device) -> None:
    """`out`, `lse` and the like are contiguous, so that kernels need no strides of theirs."""
    if list(given.shape) != shape or given.dtype is not dtype or given.device != device:
        raise ValueError(
            f"{name} must be {shape} of {dtype} on {device}, got {list(given.shape)}, {given.dtype} on {given.device}"
        )
    if not given.is_contiguous():
        raise ValueError(f"{name} must be contiguous, its strides are {list(given.stride())}")


def _table(name: str, given: Tensor, device: torch.device) -> None:
    if given.dim() != 2 or given.dtype != torch.int32 or given.device != device:
        raise ValueError(
            f"{name} must be of rank 2 and torch.int32 on {device}, "
            f"got {list(given.shape)}, {given.dtype} on {given.device}"
        )
    if given.shape[1] > 1 and given.stride(1) != 1:
        raise ValueError(f"{name} needs unit stride in its last dimension, its strides are {list(given.stride())}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
