"""When tokens come out of a generation."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stamp:
    """A stopping criterion that only notes the time of every step."""

    def __init__(self, times: list[float]) -> None:
        self._times = times

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
