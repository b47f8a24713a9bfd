"""Attention over a segment of the cache, every implementation against one dense softmax in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, dense, distance, gpu, interpreted, make, plain_errors, run

from kvoffload.kernels import cpu_attention, ops, reference, tiles

ON_CPU = {
    "twin": reference.segment_attention,
    "cpu": cpu_attention.segment_attention,
    "ops": ops.segment_attention,
}

CASES = [
    Case(name="one token", segments=(1,), batch=1, heads=(1, 1)),
    Case(name="decode", segments=(48,)),
    Case(name="decode, a prime of tokens", segments=(37,), batch=3, heads=(6, 2)),
    Case(name="decode, several segments", segments=(64, 1, 31, 17)),
    Case(name="no groups", segments=(33,), heads=(3, 3)),
    Case(name="groups of 8", segments=(33,), heads=(8, 1)),
    Case(name="groups of 7", segments=(33,), heads=(14, 2)),
    Case(name="head_dim 80", segments=(19, 20), head_dim=80),
    Case(name="head_dim 96", segments=(39,), head_dim=96),
    Case(name="head_dim 128", segments=(39,), head_dim=128),
    Case(name="head_dim 256", segments=(39,), heads=(2, 1), head_dim=256),
    Case(name="head_dim 8, padded to a tile", segments=(21,), head_dim=8),
    Case(name="2 queries", segments=(33,), q_tokens=2),
    Case(name="5 queries over segments", segments=(17, 30, 2), q_tokens=5),
    Case(name="16 queries, one tile", segments=(40,), q_tokens=16, heads=(2, 2)),
    Case(name="17 queries, one more than a tile", segments=(40,), q_tokens=17, heads=(2, 2)),
    Case(name="40 queries, a prefill in segments", segments=(16, 40), q_tokens=40, heads=(4, 1)),
    Case(name="queries before some keys", segments=(24, 24), q_tokens=5, query_position=21),
    Case(name="queries before all keys", segments=(24,), q_tokens=2, first_position=30, query_position=20),
    Case(name="queries long after the keys", segments=(24,), query_position=1000, first_position=3),
    Case(name="padding", segments=(33, 40), batch=3, padding=True),
    Case(name="padding, positions that start within a word", segments=(30, 7), first_position=41, padding=True),
    Case(name="padding and 5 queries", segments=(20, 20), batch=3, q_tokens=5, padding=True),
    Case(name="window", segments=(20, 20, 20), window=11),
    Case(name="window that ends before the segment", segments=(20,), first_position=4, query_position=90, window=7),
    Case(
        name="window that only the first of 2 queries has all of",
        segments=(20,),
        q_tokens=2,
        query_position=25,
        window=11,
    ),
    Case(name="window that starts one token before a step of 32", segments=(70,), window=39),
    Case(name="window that starts one token before a step of 64", segments=(70,), window=7),
    Case(name="window that starts within a step, row table", segments=(128,), window=78, block_tokens=64),
    Case(name="window and 17 queries", segments=(31, 29), q_tokens=17, window=9),
    Case(name="window of 1 and padding", segments=(9,), batch=3, q_tokens=5, window=1, padding=True),
    Case(name="softcap", segments=(20, 20), softcap=0.7),
    Case(name="softcap far above the scores", segments=(40,), softcap=50.0),
    Case(name="softcap, padding, 5 queries", segments=(20, 20), batch=3, q_tokens=5, softcap=2.0, padding=True),
    Case(name="sinks", segments=(20, 20), sinks=True),
    Case(name="sinks and padding", segments=(21,), batch=3, sinks=True, padding=True, q_tokens=2),
    Case(name="row table", segments=(40, 24), batch=3, block_tokens=8),
    Case(name="row table, last block in part", segments=(21, 13), block_tokens=16, q_tokens=2),
    Case(name="row table, block of a prime", segments=(40,), block_tokens=7, padding=True),
    Case(name="strided", segments=(20, 20), q_tokens=2, strided=True),
    Case(name="strided, row table, window", segments=(20, 20), strided=True, block_tokens=4, window=23),
    Case(name="an empty segment among others", segments=(0, 20, 0, 3), q_tokens=2),
    Case(name="empty segments only", segments=(0, 0), query_position=0, sinks=True),
    Case(name="empty, with a row table and padding", segments=(0, 5), block_tokens=4, padding=True),
    Case(name="no batch", segments=(5,), batch=0),
]
LONG_CASES = [
    Case(name="more keys than torch's operator takes at once", segments=(1100, 600), q_tokens=2, padding=True),
    Case(name="more keys than one piece in float32", segments=(1500,), batch=3, heads=(4, 4), padding=True),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def agrees(
    attend: Callable[..., None],
    finish: Callable[..., None],
    case: Case,
    device: str = "cpu",
    weights_in_float32: bool = True,
) -> None:
    """One implementation gives what a dense softmax gives, whatever the order of the segments."""
    data = make(case, device)
    wanted_out, wanted_lse = dense(case, data, torch.float64)
    plain_out, plain_lse = plain_errors(case, device)
    if not weights_in_float32:
        plain_lse = max(plain_lse, torch.finfo(case.dtype).eps)
    if len(case.segments) > 1 or case.sinks:
        plain_out += plain_lse  # the weights of the parts are those of their lse
    for last_first in (False, True) if len(case.segments) > 1 else (False,):
        out, lse = run(attend, case, data, last_first)
        result = torch.full_like(data.q, torch.nan)
        finish(out, lse, result, data.sinks)
        assert distance(lse, wanted_lse) <= 2 * plain_lse
        assert distance(result, wanted_out) <= 2 * plain_out
        nothing = wanted_lse.isneginf()
        assert not out[nothing].any(), "out must be exactly 0 where nothing was attended to"


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=str)
def test_it_is_one_softmax_over_all_segments(name: str, case: Case, dtype: torch.dtype) -> None:
    fast_exponential = dtype is torch.bfloat16 and name != "twin"  # of torch's operator
    agrees(ON_CPU[name], reference.finish, replace(case, dtype=dtype), weights_in_float32=not fast_exponential)


@pytest.fixture
def kernel() -> Any:
    """The module of the Triton kernel, for the interpreter."""
    return interpreted("segment_attention")


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # -inf minus -inf and the like
@pytest.mark.parametrize(("dtype", "split"), [(torch.float32, False), (torch.float16, True)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_one_softmax_over_all_segments(
    case: Case, dtype: torch.dtype, split: bool, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "processors", lambda device: 1000 if split else 1)
    agrees(kernel.segment_attention, reference.finish, replace(case, dtype=dtype))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=str)
def test_the_compiled_kernel_is_one_softmax_over_all_segments(case: Case, dtype: torch.dtype) -> None:
    agrees(ops.segment_attention, ops.finish, replace(case, dtype=dtype), "cuda")


GPU_CASES = [
    Case(name="OPT-6.7B", segments=(256, 256, 130), batch=8, heads=(32, 32), head_dim=128),
    Case(name="Llama-3.1-8B", segments=(256, 256, 130), batch=8, heads=(32, 8), head_dim=128, padding=True),
    Case(name="few heads, many tokens", segments=(4096, 33), batch=1, heads=(8, 1), head_dim=128),
    Case(name="prefill", segments=(512, 512), batch=2, q_tokens=512, heads=(8, 2), head_dim=128),
    Case(name="prefill, window", segments=(512, 512), batch=2, q_tokens=512, heads=(8, 2), head_dim=80, window=100),
]


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_the_compiled_kernel_at_sizes_of_models(case: Case, dtype: torch.dtype) -> None:
    agrees(ops.segment_attention, ops.finish, replace(case, dtype=dtype), "cuda")


def far_apart(attend: Callable[..., None], device: str) -> None:
    """Tokens, rows, K and V, or heads, the last of them more than 2**31 elements from the first."""
    for axis, count in enumerate((3, 3, 2, 3)):
        shape, strides = [1, 1, 2, 1, 64], [256, 256, 64, 256, 1]
        shape[axis] = count
        strides[axis] = (2**31 + 2**12) // (count - 1)  # of three, a stride that still fits into 32 bits
        # on the CPU untouched pages take no memory
        data = torch.empty(2**31 + 2**13, dtype=torch.float16, device=device)
        kv = data.as_strided(shape, strides)
        near = torch.randn(shape, generator=torch.Generator().manual_seed(axis)).to(device, torch.float16)
        kv.copy_(near)
        q = torch.ones(shape[1], 1, shape[3], 64, device=device, dtype=torch.float16)
        found, wanted = torch.full((2, *q.shape), torch.nan, device=device)
        lse = torch.full(q.shape[:3], torch.nan, device=device)
        options = {"scale": 0.1, "is_first": True, "first_position": 0, "query_position": 2}
        attend(q, kv, found, lse, **options)
        reference.segment_attention(q, near, wanted, lse, **options)
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_offsets_beyond_32_bits(kernel: Any) -> None:
    far_apart(kernel.segment_attention, "cpu")


@gpu
def test_compiled_offsets_beyond_32_bits() -> None:
    far_apart(ops.segment_attention, "cuda")


@pytest.mark.parametrize("name", ON_CPU)
def test_float64_stays_float64(name: str) -> None:
    case = Case(name="float64", segments=(30,), dtype=torch.float64)
    data = make(case)
    out, lse = data.q.new_empty(data.q.shape), data.q.new_empty(data.q.shape[:3])
    ON_CPU[name](
        data.q, data.kv[0], out, lse, scale=0.9 / 8, is_first=True, first_position=0, query_position=case.first_query
    )
    wanted_out, wanted_lse = dense(case, data, torch.float64)
    torch.testing.assert_close(out, wanted_out, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-13, rtol=1e-13)


BAD = {
    "q must be": {"q": torch.zeros(2, 4, 64)},
    "kv must be": {"kv": torch.zeros(9, 2, 2, 2, 32)},
    "[tokens, rows, 2, kv_heads, 64]": {"kv": torch.zeros(9, 2, 3, 2, 64)},
    "4 heads of q must be a multiple of the 3 heads": {"kv": torch.zeros(9, 2, 2, 3, 64)},
    "multiple of the 0 heads": {"kv": torch.zeros(9, 2, 2, 0, 64)},
    "q has dtype torch.int32": {"q": torch.zeros(2, 1, 4, 64, dtype=torch.int32)},
    "kv has dtype torch.float16": {"kv": torch.zeros(9, 2, 2, 2, 64, dtype=torch.float16)},
    "unit stride": {"kv": torch.zeros(9, 2, 2, 2, 128)[..., ::2]},
    "q and kv need unit stride": {"q": torch.zeros(2, 1, 4, 128)[..., ::2]},
    "out must be [2, 1, 4, 64]": {"out": torch.zeros(2, 4, 64)},
    "out must be [2, 1, 4, 64] of torch.float32": {"out": torch.zeros(2, 1, 4, 64, dtype=torch.bfloat16)},
    "out must be contiguous": {"out": torch.zeros(2, 1, 4, 128)[..., :64]},
    "lse must be [2, 1, 4]": {"lse": torch.zeros(2, 1, 1)},
    "kv is on meta": {"kv": torch.zeros(9, 2, 2, 2, 64, device="meta")},
    "positions start at 0, got first_position=-1": {"first_position": -1},
    "query_position=-2": {"query_position": -2},
    "window must be at least 1": {"window": 0},
    "softcap must be positive": {"softcap": -1.0},
    "valid must be of rank 2 and torch.int32": {"valid": torch.ones(2, 1, dtype=torch.int64)},
    "valid must be [2, 2 or more]": {"valid": torch.ones(2, 1, dtype=torch.int32), "first_position": 24},
    "valid needs unit stride": {"valid": torch.ones(2, 2, dtype=torch.int32).t(), "first_position": 24},
    "row_table must be of rank 2": {"row_table": torch.zeros(2, dtype=torch.int32), "block_tokens": 8},
    "row_table must be [blocks, 2]": {"row_table": torch.zeros(1, 2, dtype=torch.int32), "block_tokens": 8},
    "block_tokens=0": {"row_table": torch.zeros(9, 2, dtype=torch.int32)},
    "kv has 3 rows and q a batch of 2": {"kv": torch.zeros(9, 3, 2, 2, 64)},
}


def bad_call(attend: Callable[..., None], change: dict[str, Any]) -> None:
    tensors = {
        "q": torch.zeros(2, 1, 4, 64),
        "kv": torch.zeros(9, 2, 2, 2, 64),
        "out": torch.zeros(2, 1, 4, 64),
        "lse": torch.zeros(2, 1, 4),
    }
    attend(**{**tensors, "scale": 1.0, "is_first": True, "first_position": 0, "query_position": 8, **change})


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("message", BAD)
def test_arguments_that_do_not_fit_are_named(name: str, message: str) -> None:
    bad_call(ON_CPU[name], {})
    with pytest.raises(ValueError, match=re.escape(message)):
        bad_call(ON_CPU[name], BAD[message])
