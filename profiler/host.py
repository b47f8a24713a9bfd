"""What the host costs: seconds to issue a chunk and to issue a layer from Python.

Owns these two timings. The time between two steps (sampling, stopping criteria) needs a model: it is assumed in a
profile and corrected from the first real steps.

Timeline of the chunk measurement:

    clock | queue n smallest copies | clock | wait until all have arrived | clock | n waits and releases | clock
            timed                             not timed                           timed

so that only the calls are counted, not the link. The layer measurement issues a stand-in decoder layer of a few
numbers' width on one token: on a GPU the launches are timed without waiting for them, on a CPU the arithmetic is
negligible against the calls. Valid under the rule of `trials`.
"""

from __future__ import annotations

import time

import torch

from kvoffload.backend import Backend
from kvoffload.profiler.trials import Trials, time_trials


def measure_host_s_per_chunk(backend: Backend, *, budget_s: float = 0.3) -> Trials:
    """Host seconds to queue one chunk, wait for it and release its slot, on `backend`."""
    host = backend.allocate_host(64)
    slot = backend.allocate_device(64)

    def burst(n: int) -> float:
        began = time.perf_counter()
        events = [backend.copy_to_device(slot, host.tensor, ()) for _ in range(n)]
        queued_s = time.perf_counter() - began
        backend.synchronize()
        began = time.perf_counter()
        for event in events:
            backend.compute_waits(event)
            backend.release(slot)
        return queued_s + time.perf_counter() - began

    try:
        return time_trials(burst, budget_s=budget_s, max_burst=128)
    finally:
        backend.synchronize()
        backend.release_host(host)


def measure_host_s_per_layer(device: torch.device, *, budget_s: float = 0.3) -> Trials:
    """Host seconds to issue one decoder layer from Python, everything of the layer but its chunks."""
    with torch.inference_mode(False), torch.no_grad():
        layer = _StandInLayer().to(device)
        state = torch.zeros(1, 1, layer.hidden, device=device)

        def burst(n: int) -> float:
            out = state
            began = time.perf_counter()
            for _ in range(n):
                out = layer(out)
            took_s = time.perf_counter() - began
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return took_s

        return time_trials(burst, budget_s=budget_s, max_burst=16)


class _StandInLayer(torch.nn.Module):
    """The calls of one decoder layer (norms, projections, rotary, attention, gated MLP), hardly any arithmetic."""

    hidden = 32
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        # Made without the global generator: measuring must not change the user's random numbers.
        linears = [torch.nn.Linear(self.hidden, self.hidden, bias=False, device="meta") for _ in range(7)]
        self.linears = torch.nn.ModuleList(linear.to_empty(device="cpu") for linear in linears)
        for parameter in self.parameters():
            parameter.fill_(0.01)
        self.register_buffer("cos", torch.ones(1, 1, 1, 8))
        self.register_buffer("sin", torch.zeros(1, 1, 1, 8))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [1, 1, hidden]."""
        normed = self._norm(x)
        q, k, v = (self.linears[idx](normed).view(1, 1, 4, 8).transpose(1, 2) for idx in range(3))
        q, k = self._rotate(q), self._rotate(k)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.linears[3](attended.transpose(1, 2).reshape(1, 1, self.hidden))
        normed = self._norm(x)
        gated = torch.nn.functional.silu(self.linears[4](normed)) * self.linears[5](normed)
        out: torch.Tensor = x + self.linears[6](gated)
        return out
