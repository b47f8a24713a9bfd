"""What the host costs: seconds to issue a chunk and to issue a layer from Python.

Owns these two timings. The time between two steps (sampling, stopping criteria) needs a model: it is assumed in a
profile and corrected from the first real steps.

The chunk measurement sends layers of small chunks of one form, or of both in turn, through the runtime's own
`TransferEngine`; each is attended to, an activation recomputed first. On a GPU a chunk is just long enough that all is
launched that a large one launches: attention in several parts that are merged, position embeddings that are read for
the rotation; on a CPU, where work is no launch, it has hardly any numbers. The processor time of the calling thread
counts, so neither the link nor a wait for it does, and on a GPU nothing that runs there. The layer measurement issues a
stand-in decoder layer of a few numbers' width on one token: on a GPU the launches are timed without waiting for them,
on a CPU the arithmetic is negligible against the calls. Valid under the rule of `trials`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch

from kvoffload.backend import Backend
from kvoffload.kernels import ops
from kvoffload.pipeline.chunks import Chunk
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.planning.placement import PLAIN, FormName
from kvoffload.profiler.trials import Trials, time_trials
from kvoffload.store.block import Span
from kvoffload.store.device_memory import DeviceMemory
from kvoffload.store.positions import PositionTable

CHUNKS_PER_LAYER = 8
CHUNK_TOKENS = {"cpu": 1, "cuda": 256}  # on a GPU several steps of a kernel, which are parts of their own
WIDTH = 16  # of a head, and of the activation
_BOTH: tuple[FormName, FormName] = ("activation", "kv")


def measure_host_s_per_chunk(backend: Backend, *, forms: tuple[FormName, ...] = _BOTH, budget_s: float = 0.3) -> Trials:
    """Host seconds of one chunk on `backend`: queue its copy, wait, recompute activations, attend, release.

    Args:
        backend: the backend, idle.
        forms: of the chunks, in turn.
        budget_s: for all trials.
    """
    layer = _StandInChunks(backend, forms)
    cache = _OneLayer(layer)
    engine = TransferEngine(backend)
    engine.configure(slot_bytes=layer.chunk_bytes, num_slots=4, buffer_bytes=0, d2h_slot_bytes=layer.chunk_bytes)

    def burst(n: int) -> float:
        began = time.thread_time()
        for _ in range(n):
            job = engine.begin(cache, layer, in_layer_buffer=False)
            for chunk, room in engine.arriving(job):
                layer.use(chunk, room)
            engine.finish_current()
        took_s = time.thread_time() - began
        backend.synchronize()
        return took_s / CHUNKS_PER_LAYER

    try:
        return time_trials(burst, budget_s=budget_s / CHUNKS_PER_LAYER, max_burst=16)
    finally:
        engine.close()
        backend.synchronize()
        layer.close()


class _StandInChunks:
    """A layer of `CHUNKS_PER_LAYER` chunks of one block and one row, of some forms in turn."""

    position, version, is_segmented, stored_kv_bytes, goes_on = 0, 0, True, 0, True

    def __init__(self, backend: Backend, forms: tuple[FormName, ...]) -> None:
        self._backend = backend
        self._tokens = CHUNK_TOKENS[backend.device.type]
        self.chunk_bytes = self._tokens * 2 * WIDTH * 4  # an activation chunk uses half of it
        self._host = backend.allocate_host(CHUNKS_PER_LAYER * self.chunk_bytes)
        parts = self._host.tensor.view(CHUNKS_PER_LAYER, self.chunk_bytes)
        written = backend.release()
        self._host.tensor.zero_()
        self._chunks = [
            Chunk(
                source=part,
                after=written,
                span=Span(forms[idx % len(forms)], idx, 1, self._tokens, 1, 1),
                kv_offset=0,
                landing_offset=None,
            )
            for idx, part in enumerate(parts)
        ]
        with torch.inference_mode(False):
            zeros = functools.partial(torch.zeros, device=backend.device, dtype=torch.float32)
            self._weight, angles = zeros(WIDTH, WIDTH), zeros(1, CHUNKS_PER_LAYER * self._tokens, WIDTH)
            self._query, self._scratch = zeros(1, 1, 1, WIDTH), zeros(self._tokens, 1, 2 * WIDTH)
            self._out, self._lse = zeros(1, 1, 1, WIDTH), zeros(1, 1, 1)
            self._angles = angles[:, :1]
            self._positions = PositionTable(angles.shape[1])
            self._streams = self._positions.capture(0, 0, (angles, angles.clone()), 0)

    def cargo(self) -> Sequence[Chunk]:
        return self._chunks

    def expects_another_step(self) -> bool:
        return True

    def use(self, chunk: Chunk, room: DeviceMemory) -> None:
        """What a decode step does with a chunk, on hardly any numbers."""
        kv = room.view(torch.float32, (self._tokens, 1, 2 * WIDTH))
        self._backend.compute(reads=(kv,))
        first_position = chunk.span.first_token
        with torch.no_grad():
            if chunk.span.form != PLAIN:
                activation, kv = kv[:, 0, :WIDTH], self._scratch
                cos, sin = self._embeddings(first_position)
                span = self._backend.start_span("recompute")
                for half in range(2):
                    out = kv.view(self._tokens, 2 * WIDTH)[:, half * WIDTH : (half + 1) * WIDTH]
                    ops.linear_into(activation, self._weight, None, out)
                ops.rope_(kv[..., :WIDTH].unflatten(-1, (1, WIDTH)), cos, sin)
                self._backend.end_span(span)
            ops.segment_attention(
                self._query,
                kv.view(self._tokens, 1, 2, 1, WIDTH),
                self._out,
                self._lse,
                scale=1.0,
                is_first=chunk.span.first_block == 0,
                first_position=first_position,
                query_position=CHUNKS_PER_LAYER * self._tokens,
            )

    def _embeddings(self, first: int) -> tuple[torch.Tensor, ...]:
        """Cosines and sines of a chunk's tokens, [tokens, 1, width]; on a CPU those of all chunks are the same."""
        if self._tokens == 1:
            return self._angles, self._angles
        parts = self._positions.read(self._streams, first, first + self._tokens, 1, 1)
        return tuple(part.transpose(0, 1) for part in parts)

    def close(self) -> None:
        """Give the host memory back."""
        self._backend.release_host(self._host)


class _OneLayer:
    """A cache of nothing but that layer."""

    def __init__(self, layer: _StandInChunks) -> None:
        self.sources = [layer]


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
