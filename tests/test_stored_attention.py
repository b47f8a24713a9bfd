"""Attention that reads forms of fewer bytes: every implementation against attention over the K and V that come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention_cases import gpu, interpreted
from test_forms import form_of, packed, random_blocks

from kvoffload.kernels import ops, pieces, reference, tiles
from kvoffload.kernels.stored import StoredKV

FORMS = ("int8", "int4", "int2", "packed_kv")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Attention over blocks of one form."""

    name: str
    blocks: int = 3
    block_tokens: int = 16
    batch: int = 2
    q_tokens: int = 1
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    first_position: int = 0
    padding: bool = False
    has_table: bool = False
    window: int | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        return self.name


CASES = [
    Case(name="decode"),
    Case(name="one block", blocks=1, batch=1, heads=(2, 2)),
    Case(name="blocks smaller than a step, of a prime", blocks=9, block_tokens=7),
    Case(name="blocks of a step", block_tokens=64, blocks=2, batch=1),
    Case(name="blocks larger than a step", block_tokens=80, blocks=2, batch=1),
    Case(name="head_dim 32", head_dim=32),
    Case(name="head_dim 80", head_dim=80),
    Case(name="head_dim 96", head_dim=96),
    Case(name="head_dim 128, groups of 7", head_dim=128, heads=(14, 2)),
    Case(name="head_dim 256", head_dim=256, heads=(2, 1), batch=1),
    Case(name="5 queries, some before the last keys", q_tokens=5),
    Case(name="40 queries", q_tokens=40, heads=(4, 1), block_tokens=20),
    Case(name="padding", padding=True, batch=3, first_position=41),
    Case(name="row table", has_table=True, batch=3),
    Case(name="row table, blocks of a prime, padding", has_table=True, block_tokens=7, blocks=6, padding=True),
    Case(name="row table, blocks of a step", has_table=True, block_tokens=64, blocks=2),
    Case(name="window", window=11),
    Case(name="window, softcap, table", window=30, softcap=0.7, has_table=True),
]


@dataclass
class Data:
    """The tensors of a case."""

    q: torch.Tensor
    stored: StoredKV
    options: dict[str, Any]


def make(name: str, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Data:
    generator = torch.Generator().manual_seed(3)
    form = form_of(name, case.head_dim, case.block_tokens, heads=case.heads[1])
    rows = case.batch + case.has_table
    kv = random_blocks(form, case.blocks, rows)
    if name == "packed_kv":  # some exponents that are listed, in any order of tokens
        kv[:, ::3, 0, :, 0, 5] = 1e-20
        kv[0, -1, rows - 1, 1, -1, :2] = 0
    data = packed(form, kv).to(device)
    q = torch.randn(case.batch, case.heads[0], case.q_tokens, case.head_dim, generator=generator).transpose(1, 2)
    tokens = case.blocks * case.block_tokens
    options: dict[str, Any] = {
        "scale": 0.9 * case.head_dim**-0.5,
        "first_position": case.first_position,
        "query_position": case.first_position + tokens - case.q_tokens,
        "window": case.window,
        "softcap": case.softcap,
        "block_tokens": case.block_tokens if case.has_table else 0,
    }
    if case.has_table:
        table = torch.randint(rows, (case.blocks, case.batch), generator=generator)
        options["row_table"] = table.int().to(device)
    if case.padding:
        words = torch.randint(
            -(2**31), 2**31, (case.batch, (case.first_position + tokens) // 32 + 1), generator=generator
        )
        words[0, : tokens // 64] = 0
        options["valid"] = words.int().to(device)
    stored = StoredKV(name, data, case.block_tokens, rows, case.heads[1], case.head_dim, form.decode)
    return Data(q.to(device, dtype), stored, options)


def run(attend: Callable[..., None], data: Data, kv: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and `lse`, merged into what another segment gave."""
    generator = torch.Generator().manual_seed(5)
    out = torch.randn(data.q.shape, generator=generator).to(data.q.device)
    lse = torch.randn(data.q.shape[:3], generator=generator).to(data.q.device)
    attend(data.q, data.stored if kv is None else kv, out, lse, is_first=False, **data.options)
    return out, lse


def agrees(attend: Callable[..., None], data: Data, tolerance: float) -> None:
    """It gives what attention over the decoded K and V gives."""
    kv = data.stored.decoded(0, len(data.stored.data), torch.float32).to(data.q.dtype)
    wanted = run(reference.segment_attention, data, kv)
    for found, expected in zip(run(attend, data), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_pieces_are_attention_over_what_comes_back(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for piece_bytes in (pieces.PIECE_BYTES, 1):  # all at once, and block by block
        monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        agrees(ops.stored_attention, make(name, case), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_pieces_take_queries_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    data = make(name, CASES[0], dtype)
    if dtype is torch.float64:
        out, lse = torch.zeros(data.q.shape, dtype=dtype), torch.zeros(data.q.shape[:3], dtype=dtype)
        pieces.stored_attention(data.q, data.stored, out, lse, is_first=True, **data.options)
        wanted, wanted_lse = torch.zeros_like(out), torch.zeros_like(lse)
        kv = data.stored.decoded(0, len(data.stored.data), dtype)
        reference.segment_attention(data.q, kv, wanted, wanted_lse, is_first=True, **data.options)
        torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-12)
    else:
        agrees(pieces.stored_attention, data, 2e-2)


@pytest.fixture
def kernel() -> Any:
    return interpreted("segment_attention")


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize(("dtype", "split"), [(torch.float32, False), (torch.float16, True)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_the_kernel_agrees_with_its_twin(
    name: str, case: Case, dtype: torch.dtype, split: bool, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "processors", lambda device: 1000 if split else 1)
    agrees(kernel.stored_attention, make(name, case, dtype), 2e-6 if dtype is torch.float32 else 2e-3)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_the_compiled_kernel_agrees_with_its_twin(name: str, case: Case, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    agrees(ops.stored_attention, make(name, case, dtype, "cuda"), tolerance)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("name", FORMS)
def test_blocks_beyond_32_bits(name: str, kernel: Any) -> None:
    case = Case(name="far", batch=1, blocks=2)
    near = make(name, case)
    block_bytes = near.stored.data.shape[1]
    count = 2**31 // block_bytes + 4
    data = torch.empty(count, block_bytes, dtype=torch.uint8)  # untouched pages take no memory
    data[-2:] = near.stored.data
    far = Data(near.q, near.stored._replace(data=data), dict(near.options))
    far.options["query_position"] = count * 16 - 1
    far.options["window"] = near.options["window"] = 30
    wanted = run(pieces.stored_attention, near)
    for found, expected in zip(run(kernel.stored_attention, far), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)


def test_arguments_that_do_not_fit_are_refused() -> None:
    data = make("int4", CASES[0])
    wrong: list[tuple[dict[str, Any], StoredKV, str]] = [
        ({}, data.stored._replace(head_dim=32), "for these blocks"),
        ({}, data.stored._replace(data=data.stored.data.view(torch.int8)), "torch.uint8"),
        ({}, data.stored._replace(data=data.stored.data[:, ::2]), "contiguous"),
        ({}, data.stored._replace(rows=3), "without a row_table"),
        ({}, data.stored._replace(heads=3), "multiple of the 3 heads"),
        ({"row_table": torch.zeros(3, 2, dtype=torch.int32), "block_tokens": 8}, data.stored, "needed is one"),
        ({"window": 0}, data.stored, "window"),
    ]
    out, lse = torch.zeros(data.q.shape), torch.zeros(data.q.shape[:3])
    for options, stored, message in wrong:
        with pytest.raises(ValueError, match=message):
            ops.stored_attention(data.q, stored, out, lse, is_first=True, **data.options | options)
