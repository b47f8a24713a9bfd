"""Kernels on a CUDA device that is not there: Triton's, interpreted, or the twins in `kernels/reference.py`.

Owns the check of what a launch is given. Does not own the operations of PyTorch (`fake_cuda`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from fake_cuda_streams import active
from fake_cuda_tensors import CudaTensor, each_tensor, inner
from torch.utils._python_dispatch import _disable_current_modes

from kvoffload.kernels import ops, pieces, reference


class _Twins:
    """Stands for a module of kernels: the twins in `kernels/reference.py`, each as one kernel."""

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> None:
            given: list[torch.Tensor] = []
            each_tensor(given.append, (args, kwargs))
            _on_the_device(given)
            active().run()
            tensors = [inner(one) for one in given]
            active().launch(lambda clock: clock.speeds.operation_s(tensors))
            args, kwargs = inner((args, kwargs))
            with _disable_current_modes():
                getattr(pieces if operation == "stored_attention" else reference, operation)(*args, **kwargs)

        return launch


def use_twins(patch: pytest.MonkeyPatch) -> None:
    """The twins instead of interpreted kernels, which are slow."""
    patch.setattr(ops, "_triton", lambda name, tensor: _Twins() if tensor.is_cuda else None)


def _on_the_device(tensors: Iterable[torch.Tensor]) -> None:
    if not all(isinstance(one, CudaTensor) for one in tensors):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    assert active().current_device == 0, "Triton launches on the current device"
    active().count("kernel")


def interpret_kernels(patch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter gets the CPU tensors inside the wrappers, and refuses any that are not on the device."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    launch = GridExecutor.__call__

    def on_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        _on_the_device(given)
        active().run()
        active().launch(lambda clock: clock.speeds.operation_s(inner(given)))
        args, kwargs = inner((args, kwargs))
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    patch.setattr(GridExecutor, "__call__", on_device)
