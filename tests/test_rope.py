"""The rotary kernel against the formula in float64; that of the twin is in test_recompute.py, bit for bit."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import distance, gpu, interpreted
from torch import Tensor

from kvoffload.kernels import ops, reference

# tokens, rows, heads, head_dim, rotary_dim
SHAPES = [
    (1, 1, 1, 2, 2),
    (7, 3, 2, 64, 64),
    (5, 2, 3, 80, 32),  # a part of each head; StableLM, Phi
    (3, 1, 71, 64, 64),  # more heads than a program takes
    (2, 2, 5, 96, 96),
    (2, 1, 3, 256, 256),
    (4, 2, 2, 20, 6),  # halves of 3
    (0, 2, 2, 64, 64),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def kernel() -> Any:
    """The module of the Triton kernel, for the interpreter."""
    return interpreted("rope")


def angles(tokens: int, rows: int, rotary_dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`cos` and `sin` `[tokens, rows, rotary_dim]`, in two orders in memory; halves differ to tell them apart."""
    rng = torch.Generator().manual_seed(seed)
    angle = torch.rand(rows, tokens, rotary_dim, generator=rng).transpose(0, 1) * 6  # as models have them
    sin = torch.empty(rotary_dim, rows, tokens).permute(2, 1, 0).copy_(angle.sin() * 1.25)  # longrope scales both
    return angle.cos(), sin


def rotated(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula in float64."""
    keys, cos, sin = (part.double() for part in (keys, cos, sin))
    half = cos.shape[-1] // 2
    out = keys.clone()
    for i in range(half):
        first, second = keys[..., i], keys[..., i + half]
        out[..., i] = first * cos[..., None, i] - second * sin[..., None, i]
        out[..., i + half] = second * cos[..., None, i + half] + first * sin[..., None, i + half]
    return out


def rotates(rope_: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    tokens, rows, heads, head_dim, rotary_dim = shape
    rng = torch.Generator().manual_seed(0)
    for one_row in (False, True):
        keys = torch.randn(tokens, rows, heads, head_dim, generator=rng).to(device, dtype)
        cos, sin = angles(tokens, 1 if one_row else rows, rotary_dim)
        cos, sin = cos.to(device, dtype), sin.to(device, dtype)
        wanted = rotated(keys, cos, sin)
        plain = keys.clone()
        reference.rope_(plain, cos, sin)
        # the K half of K and V in a wider slot, and with heads first as transformers has them
        slot = torch.full((tokens, rows + 1, 2, heads, head_dim + 8), torch.nan, device=device, dtype=dtype)
        heads_first = torch.full((rows, heads, tokens, head_dim), torch.nan, device=device, dtype=dtype)
        pairs = torch.full((tokens, rows, heads, head_dim, 2), torch.nan, device=device, dtype=dtype)
        for strided in (slot[:, :rows, 0, :, :head_dim], heads_first.permute(2, 0, 1, 3), pairs[..., 1]):
            strided.copy_(keys)
            rope_(strided, cos, sin)
            ulp = torch.finfo(dtype).eps * float(wanted.abs().max()) if keys.numel() else 0.0
            assert distance(strided, wanted) <= 2 * max(distance(plain, wanted), ulp)
            assert torch.equal(strided[..., rotary_dim:], keys[..., rotary_dim:])
            strided.fill_(torch.nan)
        assert slot.isnan().all(), "something beside the keys was written"
        assert pairs.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_rotates_in_place(kernel: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rotates(kernel.rope_, shape, dtype, "cpu")


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (256, 32, 8, 128, 128)], ids=str)
def test_the_compiled_kernel_rotates_in_place(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rotates(ops.rope_, shape, dtype, "cuda")


def far_apart(rope_: Callable[..., None], device: str) -> None:
    for axis in range(3):
        shape, strides = [1, 1, 1, 8], [8, 8, 8, 1]
        shape[axis] = 3
        strides[axis] = 2**30 + 2**12  # fits into 32 bits, twice that does not
        data = torch.empty(2**31 + 2**14, dtype=torch.float16, device=device)  # untouched pages take no memory
        keys = data.as_strided(shape, strides)
        near = torch.randn(shape, generator=torch.Generator().manual_seed(axis)).to(device, torch.float16)
        keys.copy_(near)
        cos, sin = (part.to(device) for part in angles(shape[0], shape[1], 8))
        rope_(keys, cos, sin)
        torch.testing.assert_close(keys.double(), rotated(near, cos, sin), atol=2e-3, rtol=2e-3)


def test_offsets_beyond_32_bits(kernel: Any) -> None:
    far_apart(kernel.rope_, "cpu")


@gpu
def test_compiled_offsets_beyond_32_bits() -> None:
    far_apart(ops.rope_, "cuda")


KEYS, COS = torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 8)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("keys must be [tokens, rows, heads, head_dim]", (KEYS[0], COS, COS)),
        ("keys must be", (KEYS.int(), COS, COS)),
        ("cos must be [3, 2 or 1, rotary_dim]", (KEYS, COS[:2], COS[:2])),
        ("cos must be [3, 2 or 1, rotary_dim]", (KEYS, COS[0], COS[0])),
        ("sin must be [3, 2 or 1, rotary_dim]", (KEYS, COS, COS[..., :4])),
        ("cos must be of one of", (KEYS, COS.int(), COS)),
        ("sin must be of one of float32, float16, bfloat16, float64 on cpu", (KEYS, COS, COS.to("meta"))),
        (
            "rotary_dim must be even and at most head_dim, 8, got 10",
            (KEYS, torch.zeros(3, 1, 10), torch.zeros(3, 1, 10)),
        ),
        ("rotary_dim must be even", (KEYS, COS[..., :3], COS[..., :3])),
        ("rotary_dim must be even", (KEYS, COS[..., :0], COS[..., :0])),
    ],
)
@pytest.mark.parametrize("name", ["reference", "rope"])
def test_arguments_that_do_not_fit_are_named(name: str, message: str, arguments: tuple[Tensor, ...]) -> None:
    if name == "rope":
        pytest.importorskip("triton")
    module = importlib.import_module(f"kvoffload.kernels.{name}")
    with pytest.raises(ValueError, match=re.escape(message)):
        module.rope_(*arguments)
