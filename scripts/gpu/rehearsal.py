"""Tier 1 on a device that is not there (tests/fake_cuda.py), and how long its steps would take on two cards.

Every step runs, with small models: its calls, its rows, its files. What it does is counted on the way, put to scale,
and priced at made-up speeds. Nothing overlaps in the prices, where on a device nearly everything does: they say too
much rather than too little. What they cannot see: a kernel that is slow, a driver that waits.

    counted                       to scale                              price
    bytes pinned, bytes copied    cache of the shape over the small's   rate of pinning, of the link, time of a chunk
    matrix products               weights and tokens, likewise          the longer of arithmetic and reading weights
    operations                    layers                                time to launch one
    kernels of another kind       as they are                           time to compile one
    budgets in wall-clock time    as they are
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import bench_kernels
import fake_cuda
import pytest
import torch
from fake_cuda_kernels import use_twins

from campaign import cells, rows
from gpu import smoke, worker
from gpu.steps import START_S, STEPS, TIER_1_S, Step
from kvoffload.backend import CudaBackend
from kvoffload.bench import PRESETS, Preset, current_rates, lab
from kvoffload.kernels import linear_rope, ops, reference
from kvoffload.profiler import budget, compute, host_memory, profile, trials
from kvoffload.session import measured_rates
from kvoffload.store import pool

FIRST_ROW_S = 90.0
CHUNK_BYTES, CHUNK_S = 2**24, 150e-6  # of the shapes here; host time of one
BACKEND_S = 0.6  # of timing a chunk both ways when a session begins, see measured_rates
LEAST_SHARE = 1.5  # of a budget: trying out, and the last stretch, which goes beyond it
CHECK_S = measured_rates.CHECK_BUDGET_S
TINY = {"hidden": 64, "heads": 4, "ffn": 64, "layers": 2, "cached_tokens": 128, "dtype": torch.float32}


class Speeds(NamedTuple):
    """Made up, and meant to be rather low."""

    name: str
    link_bytes_per_s: float
    pin_bytes_per_s: float
    flop_per_s: float
    memory_bytes_per_s: float
    launch_s: float
    compile_s: float
    random_bytes_per_s: float  # making a model of random weights, Python included


SPEEDS = (
    Speeds("H200, PCIe 5", 45e9, 2.0e9, 400e12, 3000e9, 15e-6, 2.5, 5e9),
    Speeds("RTX 4090, PCIe 4", 22e9, 1.5e9, 120e12, 800e9, 12e-6, 2.0, 4e9),
)


class Scale(NamedTuple):
    """A shape over the small one that stands in for it."""

    cache: float = 1.0
    weights: float = 1.0
    tokens: float = 1.0
    layers: float = 1.0


@dataclass(slots=True)
class Ledger:
    """Seconds of each machine for what was counted since it was made."""

    seconds: list[float] = field(default_factory=lambda: [0.0] * len(SPEEDS))

    def add(self, price: Callable[[Speeds], float]) -> None:
        """What it costs on each machine."""
        for idx, speeds in enumerate(SPEEDS):
            self.seconds[idx] += price(speeds)


class Meter:
    """Counts what the fake device is asked for, into the ledger of the step that runs."""

    def __init__(self, fake: fake_cuda.FakeCuda, full: dict[Preset, Preset]) -> None:
        self.ledger, self.scale, self._full = Ledger(), Scale(), full
        self._compiled: set[Any] = set()
        self._run, self._register = fake.run, torch.cuda.cudart().cudaHostRegister

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation: to be launched, and a copy or a product perhaps."""
        found = self._run(func, args, kwargs)
        given = [one for one in args if isinstance(one, torch.Tensor)]
        if not any(one.is_cuda for one in given):
            return found
        scale, packet = self.scale, func.overloadpacket
        self.ledger.add(lambda speeds: scale.layers * speeds.launch_s)
        if packet is torch.ops.aten.copy_ and not all(one.is_cuda for one in given):
            self._link(given[0].nbytes * scale.cache)
        elif packet in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = given[-2:]
            flop = 2 * left.shape[0] * left.shape[1] * right.shape[1] * scale.weights * scale.tokens
            num_bytes = right.nbytes * scale.weights / 2  # small ones are float32
            self.ledger.add(lambda speeds: max(flop / speeds.flop_per_s, num_bytes / speeds.memory_bytes_per_s))
        return found

    def _link(self, num_bytes: float) -> None:
        self.ledger.add(lambda speeds: num_bytes / speeds.link_bytes_per_s + num_bytes / CHUNK_BYTES * CHUNK_S)

    def register(self, address: int, num_bytes: int, flags: int) -> int:
        """Host memory to be touched and pinned."""
        whole = num_bytes * self.scale.cache
        self.ledger.add(lambda speeds: whole / speeds.pin_bytes_per_s)
        return int(self._register(address, num_bytes, flags))

    def kernel(self, name: str, tensor: torch.Tensor, options: dict[str, Any]) -> None:
        """A launch of ours; compiled where it is the first of its kind."""
        given = tuple(sorted(key for key, value in options.items() if value is not None and value is not False))
        kind = (name, tensor.dtype, tensor.shape[-1], tensor.shape[1] > 1, given, self.scale)
        is_new = kind not in self._compiled
        self._compiled.add(kind)
        layers = self.scale.layers
        self.ledger.add(lambda speeds: layers * speeds.launch_s + is_new * speeds.compile_s)

    def model(self, preset: Preset) -> None:
        """A model of random weights is made; what comes now is of its scale."""
        whole = self._full[preset]
        self.scale = Scale(
            cache=_cache_bytes(whole) / _cache_bytes(preset),
            weights=_weights(whole) / _weights(preset),
            tokens=whole.batch * whole.cached_tokens / (preset.batch * preset.cached_tokens),
            layers=whole.layers / preset.layers,
        )
        num_bytes = _weights(whole) * whole.dtype.itemsize
        self.ledger.add(lambda speeds: num_bytes / speeds.random_bytes_per_s)

    def budget(self, seconds: float) -> None:
        """A stretch that lasts as long whatever the machine."""
        self.ledger.add(lambda _speeds: seconds)

    @contextlib.contextmanager
    def lasting(self, seconds: float) -> Iterator[None]:
        """What is repeated until so many seconds are over: these count, and not how often it happens to run here."""
        self.budget(seconds)
        ledger, self.ledger = self.ledger, Ledger()
        try:
            yield
        finally:
            self.ledger = ledger


def _cache_bytes(preset: Preset) -> float:
    row_bytes = 2 * preset.kv_heads * (preset.hidden // preset.heads) * preset.dtype.itemsize
    return float(preset.batch * preset.cached_tokens * preset.layers * row_bytes)


def _weights(preset: Preset) -> float:
    head_dim, matrices = preset.hidden // preset.heads, 2 if preset.architecture == "opt" else 3
    layer = 2 * preset.hidden * head_dim * (preset.heads + preset.kv_heads) + matrices * preset.hidden * preset.ffn
    return float(preset.layers * layer + 2 * preset.vocab * preset.hidden)


@contextlib.contextmanager
def device() -> Iterator[Meter]:
    """The fake device, small shapes and short budgets; a meter on all of it."""
    with pytest.MonkeyPatch.context() as patch, fake_cuda.fake_cuda("lazy", total_bytes=2**35) as fake:
        meter = Meter(fake, _use_small_shapes(patch))
        patch.setattr(smoke, "PIN_BYTES", 2**24)
        patch.setattr(pool, "SLAB_BYTES", 2**12)  # as much less as the shapes are smaller
        meter.scale = Scale(cache=2**30 / smoke.PIN_BYTES)
        _count(patch, meter)
        patch.setattr(fake, "run", meter.run)
        patch.setattr(torch.cuda.cudart(), "cudaHostRegister", meter.register)
        use_twins(patch)
        twins = ops._triton
        patch.setattr(ops, "_triton", lambda name, tensor: _counted(twins(name, tensor), meter))
        patch.setattr(linear_rope, "linear_rope", reference.linear_rope)
        _use_short_budgets(patch)
        yield meter


def _use_small_shapes(patch: pytest.MonkeyPatch) -> dict[Preset, Preset]:
    """Small ones instead of those that tier 1 uses; which stands for which."""
    full: dict[Preset, Preset] = {}

    def small(preset: Preset) -> Preset:
        """With as many query heads to one of K and V; no two are equal."""
        kv_heads = 4 if preset.kv_heads == preset.heads else 2
        made = replace(preset, **TINY, kv_heads=kv_heads, batch=2, vocab=96 + len(full))
        full[made] = preset
        return made

    for name in ("opt-6.7b-512", "llama-3.1-8b", "llama-2-7b-512"):
        patch.setitem(PRESETS, name, small(PRESETS[name]))
    for name, cell in cells.CELLS.items():
        if cell.group == "first":
            patch.setitem(cells.CELLS, name, replace(cell, preset=small(cell.preset)))
    sizes = {"hidden": 32, "q_heads": 4, "head_dim": 16, "batch": 1, "cached_tokens": 16, "chunk_tokens": 16}
    for name, shape in bench_kernels.ON_CUDA.items():
        patch.setitem(bench_kernels.ON_CUDA, name, replace(shape, kv_heads=2, **sizes))
    return full


def _use_short_budgets(patch: pytest.MonkeyPatch) -> None:
    """A CPU stands in for the device: what it takes means nothing."""
    quick = budget.BUDGETS["quick"]
    seconds = {name: 0.03 for name in quick._fields if name.endswith("_s") and getattr(quick, name)}
    patch.setitem(budget.BUDGETS, "quick", quick._replace(**seconds)._replace(sizes_bytes=(2**12, 2**16)))
    patch.setitem(compute.POOL_BYTES, "cuda", 2**22)
    patch.setitem(compute.WEIGHTS, "cuda", ((64, 64), (128, 64)))
    patch.setitem(compute.ATTENTION_BYTES, "cuda", (2**17, 2**18))
    patch.setattr(compute, "ROWS", (1, 4))
    patch.setitem(host_memory.measure_host_memory.__kwdefaults__, "pool_bytes", 2**22)
    patch.setattr(trials, "MAX_UNCERTAINTY_FRACTION", 10.0)  # nothing here is steady
    patch.setattr(measured_rates, "CHECK_BUDGET_S", 0.01)


def _counted(twin: Any, meter: Meter) -> Any:
    """The module of a kernel, whose launches are counted."""
    if twin is None:
        return None

    class Module:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                meter.kernel(name, args[0] if args else next(iter(kwargs.values())), kwargs)
                getattr(twin, name)(*args, **kwargs)

            return launch

    return Module()


def _count(patch: pytest.MonkeyPatch, meter: Meter) -> None:
    """Models, backends, and what lasts as long as its budget."""
    make_model, median_s, seconds, begin, measure = (
        lab.make_model,
        current_rates._median_s,
        measured_rates._seconds,
        CudaBackend.__init__,
        profile.measure_hardware,
    )
    quick_s = sum(getattr(budget.BUDGETS["quick"], name) for name in ("link_s", "compute_s", "host_memory_s", "host_s"))

    def made(preset: Preset, where: torch.device) -> Any:
        meter.model(preset)
        return make_model(preset, where)

    def median(work: Callable[[], Any], where: torch.device, budget_s: float, idle_s: float = 0.0) -> float:
        with meter.lasting(LEAST_SHARE * budget_s):
            return median_s(work, where, 0.0, 0.0)

    def seconds_of(*args: Any, **kwargs: Any) -> float | None:
        with meter.lasting(LEAST_SHARE * CHECK_S / 3):
            return seconds(*args, **kwargs)

    def backend(self: CudaBackend, where: torch.device) -> None:
        meter.budget(BACKEND_S)
        begin(self, where)

    def measured(*args: Any, **kwargs: Any) -> Any:
        meter.scale = Scale()
        meter.budget(1.5 * quick_s)  # and allocations
        return measure(*args, **kwargs)

    patch.setattr(lab, "make_model", made)
    patch.setattr(current_rates, "_median_s", median)
    patch.setattr(measured_rates, "_seconds", seconds_of)
    patch.setattr(CudaBackend, "__init__", backend)
    patch.setattr(profile, "measure_hardware", measured)


def rehearse(steps: Sequence[Step], results: Path) -> dict[str, list[float]]:
    """Expected seconds of each step on each machine, of the first row and of all; tests count as long as they may run.

    Raises:
        AssertionError: a step did not end well.
    """
    found = {"start": [START_S] * len(SPEEDS)}
    save, outcomes = rows.save, []
    with device() as meter:

        def saved(path: Path, new: Sequence[rows.Row]) -> None:
            found.setdefault("first row", [START_S + seconds for seconds in meter.ledger.seconds])
            save(path, new)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "save", saved)
            for step in steps:
                meter.ledger = Ledger()
                if step.writes == "-":
                    meter.budget(step.limit_s)
                else:
                    worker.run([step], results, outcomes.append)
                found[step.name] = meter.ledger.seconds
    wrong = [one for one in outcomes if one.get("outcome", "ended well") != "ended well"]
    assert not wrong, wrong
    steps_s = [found[step.name] for step in steps]
    found["all"] = [START_S + sum(seconds) for seconds in zip(*steps_s, strict=True)]
    return found


def main() -> int:
    """0 if tier 1 fits its eight minutes on both, each step its limit, and the first row comes in time."""
    logging.getLogger("kvoffload").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        found = rehearse(STEPS, Path(folder))
    print(f"\n{'expected seconds':24}" + "".join(f"{speeds.name:>18}" for speeds in SPEEDS))
    for name, seconds in found.items():
        print(f"{name:24}" + "".join(f"{value:18.0f}" for value in seconds))
    limits_s = {step.name: step.limit_s for step in STEPS} | {"first row": FIRST_ROW_S, "all": TIER_1_S}
    late = [name for name, limit_s in limits_s.items() if max(found[name]) > limit_s]
    print(f"too late: {', '.join(late)}" if late else "all within their limits")
    return int(bool(late))


if __name__ == "__main__":
    sys.exit(main())
