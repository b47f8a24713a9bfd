"""Keys from activations in one kernel, against the two steps of torch and against float64."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
from attention_cases import distance, gpu, interpreted
from test_rope import angles, rotated

from kvoffload.kernels import reference

# tokens, rows, heads, head_dim, rotary_dim, hidden
SHAPES = [
    (1, 1, 1, 2, 2, 1),
    (7, 3, 2, 64, 64, 128),
    (5, 1, 3, 80, 32, 37),  # a part of each head; a last step over hidden in part
    (41, 1, 2, 16, 16, 24),  # more than one tile of rows, the last in part
    (50, 6, 3, 6, 4, 16),  # tiles of rows in more than one group of them
    (2, 1, 1, 256, 256, 20),
    (0, 1, 2, 64, 64, 8),
]
CHANGES: dict[str, dict[str, Any]] = {
    "x must be [6, hidden]": {"x": torch.zeros(5, 16)},
    "x must be [6, 16] of torch.float32 on cpu": {"x": torch.zeros(6, 16, dtype=torch.float64)},
    "weight must be [32, 16]": {"weight": torch.zeros(16, 32)},
    "weight needs unit stride": {"weight": torch.zeros(16, 32).t()},
    "bias must be [32]": {"bias": torch.zeros(32, device="meta")},
    "keys need unit stride in head_dim": {"keys": torch.zeros(3, 2, 4, 16)[..., ::2]},
    "rotary_dim must be even": {"cos": torch.zeros(3, 1, 3), "sin": torch.zeros(3, 1, 3)},
}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the Triton kernel, for the interpreter."""
    module = interpreted("linear_rope")
    monkeypatch.setattr(module, "_GROUP_ROWS", 2)  # so that few rows make several groups
    return module


def agrees(linear_rope: Any, shape: tuple[int, ...], dtype: torch.dtype, device: str, bias: bool) -> None:
    tokens, rows, heads, head_dim, rotary_dim, hidden = shape
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(tokens * rows, hidden + 8, generator=rng).to(device, dtype)[:, :hidden]
    weight = (torch.randn(heads * head_dim, hidden, generator=rng) / max(1, hidden) ** 0.5).to(device, dtype)
    added = torch.randn(heads * head_dim, generator=rng).to(device, dtype) if bias else None
    for one_row in (False, True):
        cos, sin = (part.to(device, dtype) for part in angles(tokens, 1 if one_row else rows, rotary_dim))
        wanted = x.double() @ weight.double().t() + (0.0 if added is None else added.double())
        wanted = rotated(wanted.view(tokens, rows, heads, head_dim), cos, sin)
        plain = torch.empty(wanted.shape, dtype=dtype, device=device)
        reference.linear_rope(x, weight, added, plain, cos, sin)
        slot = torch.full((tokens, rows + 1, 2, heads, head_dim + 8), torch.nan, device=device, dtype=dtype)
        keys = slot[:, :rows, 0, :, :head_dim]
        linear_rope(x, weight, added, keys, cos, sin)
        ulp = torch.finfo(dtype).eps * float(wanted.abs().max()) if wanted.numel() else 0.0
        assert distance(keys, wanted) <= 2 * max(distance(plain, wanted), ulp)
        keys.fill_(torch.nan)
        assert slot.isnan().all(), "something beside the keys was written"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_projects_and_rotates(kernel: Any, shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    agrees(kernel.linear_rope, shape, dtype, "cpu", bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_twin_projects_and_rotates(shape: tuple[int, ...], bias: bool) -> None:
    agrees(reference.linear_rope, shape, torch.float64, "cpu", bias)


@gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (256, 4, 8, 128, 128, 4096)], ids=str)
def test_the_compiled_kernel_projects_and_rotates(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    agrees(importlib.import_module("kvoffload.kernels.linear_rope").linear_rope, shape, dtype, "cuda", bias)


@pytest.mark.parametrize("name", ["reference", "linear_rope"])
@pytest.mark.parametrize("message", CHANGES)
def test_arguments_that_do_not_fit_are_named(name: str, message: str) -> None:
    if name == "linear_rope":
        pytest.importorskip("triton")
    module = importlib.import_module(f"kvoffload.kernels.{name}")
    tensors: dict[str, Any] = {
        "x": torch.zeros(6, 16),
        "weight": torch.zeros(32, 16),
        "bias": None,
        "keys": torch.zeros(3, 2, 4, 8),
        "cos": torch.zeros(3, 2, 8),
        "sin": torch.zeros(3, 2, 8),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        module.linear_rope(**{**tensors, **CHANGES[message]})
