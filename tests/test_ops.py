"""Which implementation an operation gets, and what is said where that is not the fast one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import fake_cuda
import pytest
import torch
from attention_cases import Case, gpu, make, run
from torch.utils._python_dispatch import TorchDispatchMode

from kvoffload.kernels import cpu_attention, ops, reference


@pytest.fixture(autouse=True)
def nothing_said_yet() -> Iterator[None]:
    ops._warn_once.cache_clear()
    yield
    ops._warn_once.cache_clear()


class OnCuda:
    """What is asked of a tensor before a kernel is picked, where there is no device to put one on."""

    is_cuda, device = True, torch.device("cpu")

    def __init__(self, dtype: torch.dtype, head_dim: int = 64) -> None:
        self.dtype, self.shape = dtype, (2, 1, 4, head_dim)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("segment_attention", OnCuda(torch.float64), "cannot do queries of torch.float64"),
        ("segment_attention", OnCuda(torch.float16, 512), "cannot do a head_dim of 512, more than 256"),
        ("merge", OnCuda(torch.float64), "cannot do accumulators of torch.float64"),
        ("merge", OnCuda(torch.float32, 4096), "cannot do a head_dim of 4096"),
        ("rope", OnCuda(torch.float64), "cannot do keys of torch.float64"),
    ],
)
def test_what_a_kernel_cannot_do_is_said_once(name: str, tensor: Any, reason: str) -> None:
    pytest.importorskip("triton")
    with pytest.warns(UserWarning, match=reason):
        assert ops._triton(name, tensor) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops._triton(name, tensor) is None


@pytest.mark.parametrize("name", ["segment_attention", "merge", "rope"])
def test_a_kernel_is_picked_on_cuda(name: str) -> None:
    pytest.importorskip("triton")
    assert ops._triton(name, OnCuda(torch.float32)) is importlib.import_module(f"kvoffload.kernels.{name}")
    assert ops._triton(name, torch.zeros(1, 1, 1, 8)) is None


def test_without_triton_the_twins_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'triton'")

    ops._module.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.warns(UserWarning, match="No module named 'triton'"):
        assert ops._triton("merge", OnCuda(torch.float32)) is None
    ops._module.cache_clear()


def test_old_devices_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("triton") and importlib.import_module("kvoffload.kernels.segment_attention")
    monkeypatch.setattr(kernel.tiles, "processors", lambda device: 0)
    with pytest.warns(UserWarning, match="compute capability below 8.0"):
        assert ops._triton("segment_attention", OnCuda(torch.float16)) is None


@pytest.mark.parametrize(("device", "picked"), [("cpu", cpu_attention), ("meta", reference)])
def test_attention_off_cuda(device: str, picked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    for module in (cpu_attention, reference):
        monkeypatch.setattr(module, "segment_attention", lambda *args, module=module, **kwargs: seen.append(module))
    q = torch.zeros(1, 1, 1, 8, device=device)
    ops.segment_attention(q, q, q, q, scale=1.0, is_first=True, first_position=0, query_position=0)
    assert seen == [picked]


def test_a_torch_without_the_operator_takes_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(name="any", segments=(20, 20))
    data = make(case)
    wanted = run(reference.segment_attention, case, data)
    monkeypatch.setattr(cpu_attention, "_FLASH", None)
    found = run(cpu_attention.segment_attention, case, data)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


class Operations(TorchDispatchMode):
    """Notes which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_never_goes_into_a_strided_product_of_a_gpu(dtype: torch.dtype) -> None:
    with fake_cuda.fake_cuda():
        x, weight, bias, out = (torch.randn(size, dtype=dtype).cuda() for size in ((6, 8), (4, 8), (4,), (6, 10)))
        wanted = torch.nn.functional.linear(x, weight, bias)
        for view, has_bias, operations in (
            (out[:, 3:7], True, ["aten.addmm.default", "aten.copy_.default"]),
            (out[:, 3:7], False, ["aten.mm.out"]),
            (torch.empty_like(wanted), True, ["aten.addmm.out"]),
        ):
            with Operations() as ran:
                ops.linear_into(x, weight, bias if has_bias else None, view)
            assert [name for name in ran.names if "mm" in name or "copy" in name] == operations
            if has_bias:
                assert torch.equal(view.cpu(), wanted.cpu())  # the model's own to the last bit


@gpu
def test_what_the_kernel_cannot_do_is_still_done_on_cuda() -> None:
    case = Case(name="wide", segments=(20, 20), head_dim=320)
    data = make(case, "cuda")
    with pytest.warns(UserWarning, match="head_dim of 320"):
        found = run(ops.segment_attention, case, data)
    wanted = run(reference.segment_attention, case, data)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
