"""Merging partial attention and writing it out, every implementation against plain formulas in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import distance, gpu, interpreted
from torch import Tensor

from kvoffload.kernels import ops, reference

SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 4, 64),
    (3, 5, 7, 80),  # more rows than a program takes, the last program in part
    (1, 2, 3, 256),
    (2, 3, 1, 2048),  # one row per program
    (0, 1, 4, 64),
    (2, 0, 4, 64),
]
IMPLEMENTATIONS = ["twin", "ops", "triton"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Any:
    """A module with `merge_` and `finish`; the kernels in the interpreter."""
    return interpreted("merge") if request.param == "triton" else {"twin": reference, "ops": ops}[request.param]


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # -inf minus -inf


def accumulators(shape: tuple[int, ...], seed: int, nothing: float = 0.0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """`out` and `lse`, a share of their rows those of queries that attended to nothing."""
    rng = torch.Generator().manual_seed(seed)
    out, lse = torch.randn(shape, generator=rng), torch.randn(shape[:3], generator=rng) * 4
    empty = torch.rand(shape[:3], generator=rng) < nothing
    return out.masked_fill(empty[..., None], 0.0).to(device), lse.masked_fill(empty, -torch.inf).to(device)


def merged(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """What merging must give, in float64."""
    logits = torch.stack((lse, part_lse)).double()
    weights = logits.softmax(0).nan_to_num(0.0)
    return (torch.stack((out, part_out)).double() * weights[..., None]).sum(0), logits.logsumexp(0)


def check_merge(merge_: Callable[..., None], shape: tuple[int, ...], device: str) -> None:
    for nothing in (0.0, 0.5, 1.0):
        out, lse = accumulators(shape, 0, nothing, device)
        part_out, part_lse = accumulators(shape, 1, nothing, device)
        wanted_out, wanted_lse = merged(out, lse, part_out, part_lse)
        found_out, found_lse = out.clone(), lse.clone()
        merge_(found_out, found_lse, part_out, part_lse)
        eps = torch.finfo(torch.float32).eps
        largest = max(float(lse.nan_to_num(neginf=0.0).abs().max()), 1.0) if lse.numel() else 1.0
        assert distance(found_lse, wanted_lse) <= 2 * eps * largest
        assert distance(found_out, wanted_out) <= 2 * eps * largest
        for kept, other, kept_out, kept_lse in (
            (lse, part_lse, out, lse),
            (part_lse, lse, part_out, part_lse),
        ):
            only = other.isneginf() & ~kept.isneginf()
            assert torch.equal(found_out[only], kept_out[only]), "merging with nothing changes bits"
            assert torch.equal(found_lse[only], kept_lse[only])
        assert not found_out[lse.isneginf() & part_lse.isneginf()].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merging_weights_by_the_log_sum_exp(implementation: Any, shape: tuple[int, ...]) -> None:
    check_merge(implementation.merge_, shape, "cpu")


@gpu
@pytest.mark.parametrize("shape", [*SHAPES, (64, 3, 32, 128)], ids=str)
def test_compiled_merging_weights_by_the_log_sum_exp(shape: tuple[int, ...]) -> None:
    check_merge(ops.merge_, shape, "cuda")


def test_far_apart_log_sum_exps_keep_the_larger_side(implementation: Any) -> None:
    for larger in (0, 1):
        out, lse = accumulators((1, 1, 2, 8), 0)
        part_out, part_lse = accumulators((1, 1, 2, 8), 1)
        lse[...], part_lse[...] = (3000.0, -3000.0) if larger == 0 else (-3000.0, 3000.0)
        kept = (out.clone(), part_out.clone())[larger]
        implementation.merge_(out, lse, part_out, part_lse)
        assert torch.equal(out, kept)
        assert (lse == 3000.0).all()


def test_what_is_not_a_number_stays_visible(implementation: Any) -> None:
    for target in range(4):
        tensors = [*accumulators((1, 1, 2, 8), 0), *accumulators((1, 1, 2, 8), 1)]
        tensors[target][0, 0, 1] = torch.nan
        implementation.merge_(*tensors)
        assert tensors[0][0, 0, 1].isnan().any()
        assert not tensors[0][0, 0, 0].isnan().any()


def test_many_parts_at_once(implementation: Any) -> None:
    """As the parts of a split segment: one after the other, or all by one call of the kernel."""
    if not hasattr(implementation, "merge_parts"):
        pytest.skip("one part only")
    shape = (2, 3, 5, 24)
    parts = [accumulators(shape, seed, 0.3) for seed in range(1, 5)]
    part_out, part_lse = (torch.stack(side) for side in zip(*parts, strict=True))
    for is_first in (False, True):
        out, lse = accumulators(shape, 0, 0.3)
        wanted_out, wanted_lse = (torch.zeros(shape), torch.full(shape[:3], -torch.inf)) if is_first else (out, lse)
        wanted_out, wanted_lse = wanted_out.clone(), wanted_lse.clone()
        for one_out, one_lse in parts:
            reference.merge_(wanted_out, wanted_lse, one_out, one_lse)
        if is_first:
            out.fill_(torch.nan)
            lse.fill_(torch.nan)
        implementation.merge_parts(out, lse, part_out, part_lse, num_parts=4, is_first=is_first)
        torch.testing.assert_close(out, wanted_out, atol=1e-6, rtol=0.0)
        torch.testing.assert_close(lse, wanted_lse, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("head_dim", [80, 128, 2048])
@pytest.mark.parametrize("num_parts", [2, 64, 70])
def test_parts_of_a_long_segment_are_merged_by_a_program_for_each_row(
    head_dim: int, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, shape = interpreted("merge"), (1, 1, 32 if head_dim < 2048 else 2, head_dim)
    grids: list[tuple[int, ...]] = []
    kernel = kernels._merge_kernel

    class Launch:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "_merge_kernel", Launch())
    parts = [accumulators(shape, seed, 0.4) for seed in range(num_parts)]
    part_out, part_lse = (torch.stack(side) for side in zip(*parts, strict=True))
    part_out[:, ..., 0, :], part_lse[:, ..., 0] = 0.0, -torch.inf  # of a query that attended to nothing
    out, lse = (torch.full(size, torch.nan) for size in (shape, shape[:3]))
    kernels.merge_parts(out, lse, part_out, part_lse, num_parts=num_parts, is_first=True)
    assert grids == [shape[2:3]]
    weights = part_lse.double().softmax(0).nan_to_num(0.0)
    eps = torch.finfo(torch.float32).eps
    assert distance(out, (part_out.double() * weights[..., None]).sum(0)) <= 4 * eps * float(part_out.abs().max())
    assert distance(lse, part_lse.double().logsumexp(0)) <= 4 * eps * float(part_lse.nan_to_num(neginf=0).abs().max())
    assert not out[..., 0, :].any()
    part_out[1, ..., 1, :] = torch.nan
    kernels.merge_parts(out, lse, part_out, part_lse, num_parts=num_parts, is_first=True)
    assert out[..., 1, :].isnan().all()


def check_finish(finish: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    out, lse = accumulators(shape, 0, 0.3, device)
    sinks = torch.randn(shape[2], generator=torch.Generator().manual_seed(1)).to(device)
    sinks[0] = -torch.inf  # no sink at all
    batch, q_tokens, q_heads, head_dim = shape
    for given in (None, sinks, sinks.to(torch.bfloat16)):
        if given is None:
            wanted = out.double()
        else:
            wanted = out.double() * torch.sigmoid(lse.double() - given.double()).nan_to_num(0.0)[..., None]
        wide = torch.full((batch, q_heads, q_tokens, head_dim + 3), torch.nan, device=device, dtype=dtype)
        transposed = torch.full((head_dim, q_heads, q_tokens, batch), torch.nan, device=device, dtype=dtype)
        for result in (wide[..., :head_dim].transpose(1, 2), transposed.permute(3, 2, 1, 0)):
            finish(out, lse, result, given)
            largest = float(wanted.abs().max()) if wanted.numel() else 1.0
            assert distance(result, wanted) <= 2 * torch.finfo(dtype).eps * largest
        assert wide[..., head_dim:].isnan().all()
    if out.numel():
        exact = torch.empty_like(out)
        finish(out, lse, exact)
        assert torch.equal(exact, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_finish_writes_any_strides_and_lets_sinks_enter_once(
    implementation: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check_finish(implementation.finish, shape, dtype, "cpu")


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 3, 32, 128)], ids=str)
def test_compiled_finish(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_finish(ops.finish, shape, dtype, "cuda")


OUT, LSE = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("out must be [batch, q_tokens, q_heads, head_dim]", (OUT[0], LSE, OUT, LSE)),
        ("of float32 or float64, got [2, 3, 4, 8], torch.float16", (OUT.half(), LSE, OUT, LSE)),
        ("lse must be [2, 3, 4]", (OUT, LSE[..., None], OUT, LSE)),
        ("lse must be contiguous", (OUT, torch.zeros(2, 3, 8)[..., ::2], OUT, LSE)),
        ("part_out must be [2, 3, 4, 8]", (OUT, LSE, OUT[:1], LSE)),
        ("part_out must be [2, 3, 4, 8] of torch.float32 on cpu", (OUT, LSE, OUT.to("meta"), LSE)),
        ("part_lse must be [2, 3, 4] of torch.float32", (OUT, LSE, OUT, LSE.double())),
    ],
)
def test_accumulators_that_do_not_fit_are_named(
    implementation: Any, message: str, arguments: tuple[Tensor, ...]
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        implementation.merge_(*arguments)


@pytest.mark.parametrize(
    ("message", "result", "sinks"),
    [
        ("result must be [2, 3, 4, 8]", OUT[:1], None),
        ("result must be", OUT.int(), None),
        ("result must be", OUT.to("meta"), None),
        ("sinks must be [4]", OUT, torch.zeros(3)),
        ("sinks must be [4]", OUT, torch.zeros(4, dtype=torch.int64)),
        ("got [4], torch.float32 on meta", OUT, torch.zeros(4, device="meta")),
    ],
)
def test_results_and_sinks_that_do_not_fit_are_named(
    implementation: Any, message: str, result: Tensor, sinks: Tensor | None
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        implementation.finish(OUT, LSE, result, sinks)
