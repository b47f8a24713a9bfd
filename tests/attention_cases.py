"""Shapes of segment attention, made with everything a cache has, and what they must give, from one dense softmax."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of attention over a cache in segments; the query tokens are the last ones of the cache by default."""

    name: str  # what it forces
    segments: tuple[int, ...] = (48,)  # tokens of each
    batch: int = 2
    q_tokens: int = 1
    heads: tuple[int, int] = (4, 2)  # of q and of kv
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    first_position: int = 0
    query_position: int | None = None
    padding: bool = False  # bits that are off: left padding, holes in the middle, and all of the last sequence
    block_tokens: int = 0  # with it, a row table: rows shuffled in every block
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    strided: bool = False  # K/V with gaps between heads, rows and tokens

    @property
    def tokens(self) -> int:
        return sum(self.segments)

    @property
    def first_query(self) -> int:
        if self.query_position is not None:
            return self.query_position
        return self.first_position + self.tokens - self.q_tokens

    def of(self, dtype: torch.dtype) -> Case:
        return replace(self, dtype=dtype, name=f"{self.name}, {str(dtype).removeprefix('torch.')}")

    def __str__(self) -> str:
        return self.name


@dataclass
class Data:
    """The tensors of a case; `kv` is as stored, before the row table."""

    q: Tensor
    kv: list[Tensor]  # one per segment, strided: a view of a wider slot
    valid: Tensor | None
    row_tables: list[Tensor | None]
    sinks: Tensor | None
    dense_keys: Tensor  # [batch, q_heads, tokens, head_dim], rows in order, heads repeated
    dense_values: Tensor
    allowed: Tensor  # bool [batch, 1, q_tokens, tokens]


def make(case: Case, device: str = "cpu", seed: int = 0) -> Data:
    """The tensors of a case, the same on any device."""
    rng = torch.Generator().manual_seed(seed)
    q_heads, kv_heads = case.heads
    q = torch.randn(case.batch, q_heads, case.q_tokens, case.head_dim, generator=rng).to(case.dtype).transpose(1, 2)
    rows = case.batch + (1 if case.block_tokens else 0)
    kv, tables, dense = [], [], []
    for tokens in case.segments:
        data = torch.randn(tokens, rows, 2, kv_heads, case.head_dim, generator=rng).to(case.dtype)
        wide = (tokens, rows + 1, 2, kv_heads, case.head_dim + 8) if case.strided else data.shape
        slot_bytes = torch.Size(wide).numel() * case.dtype.itemsize
        slot = torch.full((slot_bytes + 64,), 0xFF, dtype=torch.uint8, device=device)  # NaN around it and in its gaps
        view = slot[32:-32].view(case.dtype).view(wide)[:, :rows, ..., : case.head_dim]
        view.copy_(data)
        kv.append(view)
        table = None
        if case.block_tokens:
            blocks = -(-tokens // case.block_tokens)
            table = torch.randint(rows, (blocks, case.batch), generator=rng)
            picked = table.repeat_interleave(case.block_tokens, 0)
            data = torch.stack([data[j, picked[j]] for j in range(tokens)]) if tokens else data[:, : case.batch]
        tables.append(None if table is None else table.int().to(device))
        dense.append(data)
    keys, values = (
        part.permute(1, 2, 0, 3).repeat_interleave(q_heads // kv_heads, 1) for part in torch.cat(dense).unbind(2)
    )
    sinks = torch.randn(q_heads, generator=rng) if case.sinks else None
    key = case.first_position + torch.arange(case.tokens)
    distance = case.first_query + torch.arange(case.q_tokens)[:, None] - key  # [q_tokens, tokens]
    allowed = (distance >= 0) & (distance < (case.window or 2**31))
    allowed = allowed.expand(case.batch, 1, -1, -1)
    valid = None
    if case.padding:
        bits = torch.rand(case.batch, case.first_position + case.tokens, generator=rng) < 0.7
        bits[0, : case.tokens // 3] = False
        bits[-1] = False
        allowed = allowed & bits[:, None, None, case.first_position :]
        words = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 32)).unflatten(1, (-1, 32)).long()
        packed = (words << torch.arange(32)).sum(-1)
        valid = torch.where(packed >= 2**31, packed - 2**32, packed).int().to(device)
    moved = [None if part is None else part.to(device) for part in (sinks, keys, values, allowed)]
    return Data(q.to(device), kv, valid, tables, moved[0], *moved[1:])  # type: ignore[arg-type]


def run(attend: Callable[..., None], case: Case, data: Data, last_first: bool = False) -> tuple[Tensor, Tensor]:
    """`out` and `lse` of all segments through one implementation, from accumulators full of NaN."""
    shape, device = data.q.shape, data.q.device
    out = torch.full(shape, torch.nan, device=device)
    lse = torch.full(shape[:3], torch.nan, device=device)
    order = list(enumerate(data.kv))
    starts = [case.first_position + sum(case.segments[:i]) for i in range(len(order))]
    for count, (i, kv) in enumerate(reversed(order) if last_first else order):
        attend(
            data.q,
            kv,
            out,
            lse,
            scale=scale_of(case),
            is_first=count == 0,
            first_position=starts[i],
            query_position=case.first_query,
            valid=data.valid,
            row_table=data.row_tables[i],
            block_tokens=case.block_tokens,
            window=case.window,
            softcap=case.softcap,
        )
    return out, lse


def scale_of(case: Case) -> float:
    return 0.9 / math.sqrt(case.head_dim)  # not the default of torch, so that it must be handed on


def dense(case: Case, data: Data, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One softmax over everything, computed in `dtype`: `out` [batch, q_tokens, q_heads, head_dim] and `lse`."""
    q, keys, values = (part.to(dtype) for part in (data.q.transpose(1, 2), data.dense_keys, data.dense_values))
    scores = q @ keys.transpose(-1, -2) * scale_of(case)
    if case.softcap is not None:
        scores = case.softcap * (scores / case.softcap).tanh()
    scores = scores.masked_fill(~data.allowed, -torch.inf)
    lse = scores.logsumexp(-1)  # [batch, q_heads, q_tokens]
    if data.sinks is not None:
        sinks = data.sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1).nan_to_num(0.0)  # nothing to attend to: 0
    return (weights[..., : case.tokens] @ values).transpose(1, 2), lse.transpose(1, 2)


def plain_torch(case: Case, data: Data) -> tuple[Tensor, Tensor]:
    """What plain torch gives: `out` in the dtype of the case, through SDPA where that can; `lse` in float32."""
    out = dense(case, data, case.dtype)[0]
    if case.softcap is None and data.sinks is None and case.tokens:
        out = torch.nn.functional.scaled_dot_product_attention(
            data.q.transpose(1, 2), data.dense_keys, data.dense_values, attn_mask=data.allowed, scale=scale_of(case)
        ).transpose(1, 2)
    return out.nan_to_num(0.0), dense(case, data, torch.float32)[1]


@cache
def plain_errors(case: Case, device: str) -> tuple[float, float]:
    """The largest errors of plain torch against float64, of `out` and of `lse`; one ulp of the largest at least.

    Over some draws of the data: in a few numbers the last bits are luck.
    """
    largest = [0.0, 0.0]
    for seed in range(4):
        data = make(case, device, seed)
        both = zip(plain_torch(case, data), dense(case, data, torch.float64), strict=True)
        for i, (plain, wanted) in enumerate(both):
            magnitude = float(wanted.nan_to_num(neginf=0.0).abs().max()) if wanted.numel() else 1.0
            ulp = torch.finfo(plain.dtype).eps * magnitude
            largest[i] = max(largest[i], distance(plain, wanted), ulp)
    return largest[0], largest[1]


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest error; infinite for NaN and for -inf at other places than in `wanted`."""
    if not torch.equal(found.isneginf(), wanted.isneginf()):
        return torch.inf
    error = (found.double().nan_to_num(nan=torch.nan, neginf=0.0) - wanted.nan_to_num(neginf=0.0)).abs()
    return float(error.nan_to_num(nan=torch.inf).max()) if error.numel() else 0.0


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs a CUDA device, where kernels are compiled."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    marked: Callable[..., None] = pytest.mark.gpu(skip(test))
    return marked


def interpreted(name: str) -> Any:
    """A module of Triton kernels, for the interpreter; skips the test where they run compiled, or not at all."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("compiled, in the tests marked gpu")
    return importlib.import_module(f"kvoffload.kernels.{name}")
