"""Ways to decode one cell, behind one small interface: plain transformers, its own offloading, and ours.

Owns how each is called and why it cannot run somewhere. Does not own the clock (`serving`) or the workloads (`cells`).

    on_device                transformers, the whole batch on the device: the truth for tokens and logits
    sub_batches              the same in the largest equal parts that fit, one after the other
    hf_offloaded             cache_implementation="offloaded"
    hf_quantized             cache_implementation="quantized", 4 bits: not exact
    whole_layer_both_ways    the traffic of hf_offloaded over the same link as ours, also where there is no GPU
    full_transfer, sequential, kvpr, planned     kvoffload, as `Lab.config` sets it
"""

from __future__ import annotations

import importlib.util
import time
from abc import ABC, abstractmethod
from typing import Any

import torch

from campaign.cells import Cell
from campaign.serving import Outcome, ServedGroup, generate
from campaign.whole_layer_cache import WholeLayerCache
from kvoffload import hf
from kvoffload.advise.task import Task
from kvoffload.api import offload
from kvoffload.backend import Backend, CudaBackend, EmulatedBackend
from kvoffload.bench.lab import Lab
from kvoffload.config import GIB, EmulatedLink, OffloadConfig
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.planning.workload import Workload
from kvoffload.units import gb


class Bed:
    """One cell made ready: the model, its prompts, and what fits on the device.

    Args:
        cell: the workload.
        lab: a model of the cell's shape on this machine.
        profile: this machine, as `plan` takes it.
    """

    def __init__(self, cell: Cell, lab: Lab, profile: HardwareProfile) -> None:
        self.cell = cell
        self.lab = lab
        self.ids, self.mask = cell.prompts(lab.device)
        self.profile = profile
        on_link = lab.on_this_link(profile)
        assert isinstance(on_link, HardwareProfile)
        cap_gib = "auto" if self.room_bytes is None else max(self.room_bytes, 1) / GIB
        config = OffloadConfig(device_gib=cap_gib, link=lab.link)  # type: ignore[arg-type]
        workload = Workload(
            batch=cell.batch, prompt_tokens=cell.prompt_tokens, new_tokens=cell.new_tokens, num_beams=cell.num_beams
        )
        self.task = Task(lab.shape, workload, on_link, config)

    @property
    def room_bytes(self) -> int | None:
        """What the emulated device has for the cache; None where the device's own memory decides."""
        if self.cell.room_sequences is None:
            return None
        tokens = self.cell.prompt_tokens + self.cell.new_tokens - 1
        per_sequence = self.lab.shape.num_offloaded_layers * tokens * self.lab.shape.kv_row_bytes
        return int(self.cell.room_sequences * self.cell.num_beams * per_sequence)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, without padding."""
        return int(self.mask.sum())

    def generate(
        self, new_tokens: int, *, started_s: float, keeps_logits: bool, rows: slice = slice(None), **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, ServedGroup]:
        """Decode the prompts, or some rows of them, under the clock; arguments and result as of `serving.generate`."""
        return generate(
            self.lab.model,
            self.ids[rows],
            self.mask[rows],
            new_tokens=new_tokens,
            started_s=started_s,
            keeps_logits=keeps_logits,
            **options,
        )

    def options(self) -> dict[str, Any]:
        """The options of `generate()` that the cell asks for."""
        options: dict[str, Any] = {"num_beams": self.cell.num_beams} if self.cell.num_beams > 1 else {}
        if self.cell.prompt_lookup_tokens is not None:
            options["prompt_lookup_num_tokens"] = self.cell.prompt_lookup_tokens
        return options


class Provider(ABC):
    """One way to decode; `is_exact` where its float32 tokens must be those of `on_device`."""

    name: str
    is_exact = True

    def problem(self, bed: Bed) -> str | None:
        """Why it cannot run here, in words for a row; None if it can."""
        return None

    @abstractmethod
    def run(self, bed: Bed, new_tokens: int, *, keeps_logits: bool) -> Outcome:
        """Decode `new_tokens` of every sequence."""


class DynamicCache(Provider):
    """transformers as it is."""

    name = "on_device"

    def own_options(self) -> dict[str, Any]:
        """Options of `generate()` that make this provider."""
        return {}

    def problem(self, bed: Bed) -> str | None:
        needed, room = bed.task.resident_bytes(bed.cell.batch), bed.task.free_bytes(bed.task.workload.rows)
        return None if needed <= room else f"the whole cache needs {gb(needed)}, the device has room for {gb(room)}"

    def run(self, bed: Bed, new_tokens: int, *, keeps_logits: bool) -> Outcome:
        return self._in_parts(bed, bed.cell.batch, new_tokens, keeps_logits)

    def _in_parts(self, bed: Bed, batch: int, new_tokens: int, keeps_logits: bool) -> Outcome:
        options = bed.options() | self.own_options()
        _watch_peak(bed.lab.device)
        started_s = time.perf_counter()
        tokens, logits, groups = [], [], []
        for start in range(0, bed.cell.batch, batch):
            part = slice(start, start + batch)
            found = bed.generate(new_tokens, started_s=started_s, keeps_logits=keeps_logits, rows=part, **options)
            tokens.append(found[0])
            logits.append(found[1])
            groups.append(found[2])
        return Outcome(
            tokens=torch.cat(tokens),
            logits=torch.cat([part for part in logits if part is not None], dim=1) if keeps_logits else None,
            groups=groups,
            total_s=time.perf_counter() - started_s,
            device_cache_bytes=self._cache_bytes(bed, batch),
            peak_device_bytes=_peak(bed.lab.device),
            h2d_bytes=0,
            d2h_bytes=0,
        )

    def _cache_bytes(self, bed: Bed, batch: int) -> int | None:
        return bed.task.resident_bytes(min(batch, bed.cell.batch))


class OnDeviceSubBatches(DynamicCache):
    """The largest batch that fits, run as often as needed, in equal parts."""

    name = "sub_batches"

    def problem(self, bed: Bed) -> str | None:
        on_device = bed.task.on_device()
        if on_device is None:
            needed, room = bed.task.resident_bytes(1), bed.task.free_bytes(bed.cell.num_beams)
            return f"one sequence alone needs {gb(needed)}, the device has room for {gb(room)}"
        return "the whole batch fits: see on_device" if on_device.runs == 1 else None

    def run(self, bed: Bed, new_tokens: int, *, keeps_logits: bool) -> Outcome:
        on_device = bed.task.on_device()
        assert on_device is not None
        return self._in_parts(bed, on_device.batch, new_tokens, keeps_logits)


class HFOffloaded(DynamicCache):
    """transformers' own offloading."""

    name = "hf_offloaded"

    def own_options(self) -> dict[str, Any]:
        return {"cache_implementation": "offloaded"}

    def problem(self, bed: Bed) -> str | None:
        if bed.lab.device.type != "cuda":
            return "transformers' offloaded cache needs CUDA (whole_layer_both_ways moves the same bytes)"
        return None

    def run(self, bed: Bed, new_tokens: int, *, keeps_logits: bool) -> Outcome:
        found = super().run(bed, new_tokens, keeps_logits=keeps_logits)
        return Outcome(
            tokens=found.tokens,
            logits=found.logits,
            groups=found.groups,
            total_s=found.total_s,
            peak_device_bytes=found.peak_device_bytes,
        )


class HFQuantized(HFOffloaded):
    """transformers' quantised cache on the device."""

    name = "hf_quantized"
    is_exact = False

    def own_options(self) -> dict[str, Any]:
        return {"cache_implementation": "quantized", "cache_config": {"backend": _quantizer()}}

    def problem(self, bed: Bed) -> str | None:
        return "needs the package optimum-quanto or hqq" if _quantizer() is None else None


class WholeLayerBothWays(Provider):
    """What HFOffloaded moves, over our backend; without `writes_back` only the fetches."""

    def __init__(self, *, writes_back: bool = True) -> None:
        self.writes_back = writes_back
        self.name = "whole_layer_both_ways" if writes_back else "whole_layer_fetched"

    def problem(self, bed: Bed) -> str | None:
        if bed.options() or bed.cell.is_ragged:
            return "made for greedy decoding of equal prompts"
        return None

    def run(self, bed: Bed, new_tokens: int, *, keeps_logits: bool) -> Outcome:
        lab = bed.lab
        backend: Backend = EmulatedBackend(lab.link) if isinstance(lab.link, EmulatedLink) else CudaBackend(lab.device)
        try:
            row_bytes = bed.cell.batch * lab.shape.kv_row_bytes
            max_tokens = bed.cell.prompt_tokens + new_tokens
            cache = WholeLayerCache(lab.model, backend, max_tokens, row_bytes, writes_back=self.writes_back)
            _watch_peak(lab.device)
            started_s = time.perf_counter()
            options: dict[str, Any] = {hf.generation_name(): cache}
            tokens, logits, group = bed.generate(new_tokens, started_s=started_s, keeps_logits=keeps_logits, **options)
            total_s = time.perf_counter() - started_s
            backend.synchronize()
            return Outcome(
                tokens=tokens,
                logits=logits,
                groups=[group],
                total_s=total_s,
                device_cache_bytes=cache.device_bytes,
                peak_device_bytes=_peak(lab.device),
                host_bytes=cache.host_bytes,
                h2d_bytes=backend.link_use("h2d").copied_bytes,
                d2h_bytes=backend.link_use("d2h").copied_bytes,
            )
        finally:
            backend.close()


class Ours(Provider):
    """kvoffload in one of the modes of `Lab.config`, with changes to its options."""

    def __init__(self, mode: str, name: str | None = None, **changes: Any) -> None:
        self.mode = mode
        self.name = name or mode
        self.changes = changes

    def run(self, bed: Bed, new_tokens: int, *, keeps_logits: bool) -> Outcome:
        lab = bed.lab
        room = {} if bed.room_bytes is None else {"device_gib": bed.room_bytes / GIB}
        config = lab.config(self.mode, bed.profile, **room | self.changes)
        _watch_peak(lab.device)
        started_s = time.perf_counter()
        with offload(lab.model, config) as session:
            tokens, logits, group = bed.generate(
                new_tokens, started_s=started_s, keeps_logits=keeps_logits, **bed.options()
            )
            total_s = time.perf_counter() - started_s
        stats = session.stats
        assert stats is not None
        # Pinning happens once in a process that serves; it is reported apart, as `setup_s`.
        served = ServedGroup(group.sequences, group.began_s, [max(0.0, at - stats.setup_s) for at in group.token_s])
        return Outcome(
            tokens=tokens,
            logits=logits,
            groups=[served],
            total_s=total_s - stats.setup_s,
            device_cache_bytes=max(stats.device_kv_peak_decode_bytes, stats.device_kv_peak_prefill_bytes),
            peak_device_bytes=_peak(lab.device),
            host_bytes=stats.host_bytes,
            h2d_bytes=stats.h2d_bytes,
            d2h_bytes=stats.d2h_bytes,
            stats=stats,
        )


def providers() -> dict[str, Provider]:
    """All of them but the tools of others, by name."""
    ours = [Ours(mode) for mode in ("full_transfer", "sequential", "kvpr", "planned")]
    found: list[Provider] = [DynamicCache(), OnDeviceSubBatches(), HFOffloaded(), HFQuantized(), WholeLayerBothWays()]
    return {provider.name: provider for provider in [*found, *ours]}


def _quantizer() -> str | None:
    """The installed one, as transformers' `cache_config` names it: left out, it takes quanto whatever is there."""
    packages = {"quanto": "optimum.quanto", "hqq": "hqq"}
    found = (name for name, package in packages.items() if _has_parent(package) and importlib.util.find_spec(package))
    return next(found, None)


def _has_parent(package: str) -> bool:
    """`find_spec("a.b")` imports a; whether there is one to import."""
    return importlib.util.find_spec(package.partition(".")[0]) is not None


def _watch_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
