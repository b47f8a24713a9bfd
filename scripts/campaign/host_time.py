"""Host time of the decode path: microseconds of Python and of PyTorch's dispatch per chunk, layer and step.

Owns a device that costs nothing: the CUDA backend over streams and events that only count, and Triton kernels that are
prepared and not launched. What remains is the host's own time, which a fast device has to wait for. Calls of the driver
and launches are counted, not timed. Tensors are tiny and on the CPU; an operation on them costs about what a launch
does.

    kv chunk          slope of a step over the chunks of a layer, all of them K and V
    activation chunk  the same with all of them activations; includes recomputation's products
    layer             slope over the layers at one chunk each, less that of the model by itself
    step              what is left, less that of the model by itself, whose own attention may make it negative

Times are those of the thread (`time.thread_time`), so that waiting for a core does not count; of the steps of several
rounds the shortest.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvoffload import hf
from kvoffload.backend import CudaBackend
from kvoffload.backend.base import HostBuffer
from kvoffload.config import EmulatedLink, OffloadConfig
from kvoffload.errors import ConfigError
from kvoffload.kernels import ops
from kvoffload.session.session import Session

BLOCK_TOKENS = 64
FEW_CHUNKS, MANY_CHUNKS = 4, 20  # of a layer
FEW_LAYERS, MANY_LAYERS = 2, 6
STEPS, SETTLING_STEPS, ROUNDS = 24, 4, 3


class _Event:
    """Completes at once, and took no time."""

    def __init__(self, calls: Counter[str], timed: bool) -> None:
        self._calls = calls
        calls["timed event" if timed else "event"] += 1

    def record(self, stream: Any = None) -> None:
        self._calls["record"] += 1

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.001


class _Stream:
    """Counts what is asked of it."""

    def __init__(self, calls: Counter[str]) -> None:
        self._calls = calls

    def wait_event(self, event: Any) -> None:
        self._calls["wait"] += 1

    def query(self) -> bool:
        self._calls["query"] += 1
        return False


class CountingBackend(CudaBackend):
    """The CUDA backend with its tensors on the CPU; inside `counting` alone."""

    emulated = True  # so that sizes are those that were asked for

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", 0))
        self.device = torch.device("cpu")

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        return HostBuffer(torch.zeros(num_bytes, dtype=torch.uint8), num_bytes)

    def release_host(self, buffer: HostBuffer) -> None:
        """Nothing was pinned."""


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Streams and events that only count, in the place of the driver's."""
    calls: Counter[str] = Counter()
    stream = _Stream(calls)

    def stands_in(**options: Any) -> _Event:
        return _Event(calls, bool(options.get("enable_timing")))

    with mock.patch.multiple(
        torch.cuda,
        Event=stands_in,
        Stream=lambda device=None: stream,
        current_stream=lambda device=None: stream,
        stream=lambda stream: contextlib.nullcontext(),
        synchronize=lambda device=None: None,
        get_device_name=lambda device=None: "nothing",
        current_device=lambda: -1,  # that of tensors on the CPU
    ):
        yield calls


@contextlib.contextmanager
def _no_launches(calls: Counter[str]) -> Iterator[None]:
    """Triton kernels are counted and not launched, whatever device their tensors are on."""
    kernels = ops._module("segment_attention")
    if kernels is None:
        raise ConfigError("host time is that of launching Triton's kernels, and triton cannot be imported: install it")
    jit_function = type(kernels._segment_kernel)

    def run(*args: Any, **kwargs: Any) -> None:
        calls["kernel"] += 1

    with (
        mock.patch.object(ops, "_on_gpu", lambda tensor: True),
        mock.patch.object(ops, "_on_cpu", lambda tensor: False),
        mock.patch.object(jit_function, "run", run),
    ):
        yield


class DecodeSteps(NamedTuple):
    """Decode steps of one model and cache."""

    seconds: float  # of the thread, in a step
    calls: Counter[str]  # in all of them
    num_steps: int


def tiny_multi_head_model(layers: int) -> PreTrainedModel:
    """A tiny multi-head model, so that activations are half of K and V."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=96,
        max_position_embeddings=(MANY_CHUNKS + 2) * BLOCK_TOKENS,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


def offloaded_steps(layers: int, chunks: int, split: Any) -> DecodeSteps:
    """Steps with that many chunks in each layer, of which `split` says the form."""
    config = OffloadConfig(
        split=split, device_gib="min", block_tokens=BLOCK_TOKENS, chunk_blocks=1, link=EmulatedLink(h2d_gb_per_s=1e3)
    )
    model = tiny_multi_head_model(layers)
    with counting() as calls, Session(model, config, CountingBackend()) as session:
        cache = session.new_cache()
        return _steps(model, cache, chunks, calls)


def plain_steps(layers: int) -> DecodeSteps:
    """Steps with a short cache of transformers: the model's own time."""
    model = tiny_multi_head_model(layers)
    return _steps(model, DynamicCache(config=model.config), 0, Counter())


def _steps(model: PreTrainedModel, cache: Any, chunks: int, calls: Counter[str]) -> DecodeSteps:
    given = {hf.generation_name(): cache}
    ids = torch.zeros(1, chunks * BLOCK_TOKENS + 8, dtype=torch.long)
    seconds = []
    with torch.inference_mode():
        model(ids, **given)
        with _no_launches(calls):
            for step in itertools.count():
                if step == SETTLING_STEPS:
                    calls.clear()
                if step == SETTLING_STEPS + STEPS:
                    break
                began = time.thread_time()
                model(ids[:, :1], **given)
                seconds.append(time.thread_time() - began)
    return DecodeSteps(min(seconds[SETTLING_STEPS:]), calls, STEPS)


class HostTime(NamedTuple):
    """Microseconds, and calls of the driver and kernels by name."""

    kv_chunk_us: float
    activation_chunk_us: float
    layer_us: float
    step_us: float
    kv_chunk_calls: dict[str, float]
    activation_chunk_calls: dict[str, float]


def measure(rounds: int = ROUNDS) -> HostTime:
    """All four, with what each chunk calls."""
    cases: dict[str, Callable[[], DecodeSteps]] = {
        "few kv": lambda: offloaded_steps(FEW_LAYERS, FEW_CHUNKS, "transfer"),
        "many kv": lambda: offloaded_steps(FEW_LAYERS, MANY_CHUNKS, "transfer"),
        "few activation": lambda: offloaded_steps(FEW_LAYERS, FEW_CHUNKS, "recompute"),
        "many activation": lambda: offloaded_steps(FEW_LAYERS, MANY_CHUNKS, "recompute"),
        "many layers": lambda: offloaded_steps(MANY_LAYERS, FEW_CHUNKS, "transfer"),
        "plain": lambda: plain_steps(FEW_LAYERS),
        "plain, many layers": lambda: plain_steps(MANY_LAYERS),
    }
    found: dict[str, DecodeSteps] = {}
    for _ in range(rounds):  # in turns, so that all of them meet the same machine
        for name, run in cases.items():
            steps = run()
            found[name] = min(found.get(name, steps), steps, key=lambda one: one.seconds)
    num_chunks, num_layers = FEW_LAYERS * (MANY_CHUNKS - FEW_CHUNKS), MANY_LAYERS - FEW_LAYERS
    chunk_s, calls = {}, {}
    for form in ("kv", "activation"):
        few, many = found[f"few {form}"], found[f"many {form}"]
        chunk_s[form] = (many.seconds - few.seconds) / num_chunks
        calls[form] = {name: (many.calls[name] - few.calls[name]) / (num_chunks * STEPS) for name in many.calls}
    own_s = {name: found[name].seconds for name in ("plain", "plain, many layers")}
    layer_s = (found["many layers"].seconds - found["few kv"].seconds) / num_layers
    layer_s -= (own_s["plain, many layers"] - own_s["plain"]) / num_layers + FEW_CHUNKS * chunk_s["kv"]
    step_s = found["few kv"].seconds - own_s["plain"] - FEW_LAYERS * (layer_s + FEW_CHUNKS * chunk_s["kv"])
    return HostTime(
        kv_chunk_us=1e6 * chunk_s["kv"],
        activation_chunk_us=1e6 * chunk_s["activation"],
        layer_us=1e6 * layer_s,
        step_us=1e6 * step_s,
        kv_chunk_calls=calls["kv"],
        activation_chunk_calls=calls["activation"],
    )
