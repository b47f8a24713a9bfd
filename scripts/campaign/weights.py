"""Decode with weights streamed from the host, in paired rounds: as planned, and without one part after another.

Owns how each way is called, what is counted meanwhile, and the rows of a cell. Does not own the workloads
(`weight_cells`) nor the clock around `generate()` (`serving`).

    everything on the device     plain transformers with all weights and the whole cache there: the ceiling
    kvoffload                    as planned, `split="auto"`
    no recomputation             the same with `split="transfer"`
    copy, wait, compute          the same with `overlap=False`: nothing travels while anything computes
    accelerate cpu_offload       hooks on every module, without a cache on the host; on CUDA

Every round runs all of them, forwards and backwards in turn, and a ratio is of two runs of one round. Bytes are those
queued for the link and weights those that layers were given, both read at every token: of a step in the steady state,
where what was brought ahead at its begin is what is ahead at its end.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.table import Table

from campaign import rows
from campaign.serving import ServedGroup, generate
from campaign.weight_cells import WeightCell, shrunk
from kvoffload.api import offload
from kvoffload.backend.base import Event
from kvoffload.bench.decode import NUM_UNEVEN_STEPS
from kvoffload.bench.lab import Lab, core_for_the_link, device_and_threads
from kvoffload.bench.presets import Preset
from kvoffload.config import GIB
from kvoffload.errors import KVOffloadError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.decoder_layers import decoder_layers, own_tensors
from kvoffload.planning.weights import WeightSizes
from kvoffload.profiler.stored import load_or_measure
from kvoffload.session.session import Session
from kvoffload.session.stats import GenerationStats
from kvoffload.store.layer_weights import LayerWeights

BENCH = "weights"
ON_DEVICE, AS_PLANNED, NO_RECOMPUTATION = "everything on the device", "kvoffload", "no recomputation"
SEQUENTIAL, ACCELERATE = "copy, wait, compute", "accelerate cpu_offload"
BASELINES = {"speedup_over_copy_wait_compute": SEQUENTIAL, "speedup_over_no_recomputation": NO_RECOMPUTATION}
LEAST_NEW_TOKENS = NUM_UNEVEN_STEPS + 4  # with two steps in the steady state


class Bed:
    """One cell made ready: the model in host memory, what its weights take, and the link.

    Args:
        cell: the workload.
        lab: a model of the cell's shape on this machine; its link gets the speed that the cell asks for.
        profile: this machine, as plans take it.
        new_tokens: of every sequence; a prefill is followed by one.
    """

    def __init__(self, cell: WeightCell, lab: Lab, profile: HardwareProfile, new_tokens: int) -> None:
        self.cell, self.lab, self.profile = cell, lab, profile
        self.new_tokens = 1 if cell.is_prefill else new_tokens
        self.model: Any = lab.model
        _move(self.model, "cpu")  # where streamed weights live; made on a GPU, which is faster
        self.sizes = weight_sizes(self.model)
        self.mask = torch.ones_like(lab.ids)
        if cell.link_over_compute is not None:
            lab.set_link_bytes_per_s(max(1e6, self.bytes_per_step / (cell.link_over_compute * self._compute_s())))

    @property
    def streamed_bytes(self) -> int:
        """Weights over the link in every forward."""
        return self.sizes.streamed_bytes(self.cell.num_resident)

    @property
    def bytes_per_step(self) -> int:
        """Weights and cache over the link, with all of it on the host."""
        p = self.lab.preset
        cached = 0 if self.cell.is_prefill else p.layers * p.batch * p.cached_tokens * self.lab.shape.kv_row_bytes
        return self.streamed_bytes + cached

    @property
    def device_weights_gib(self) -> float:
        """With which exactly the cell's layers stay."""
        return self.sizes.device_bytes(self.cell.num_resident) / GIB

    def _compute_s(self) -> float:
        """What the device computes in a step, or in the prefill, on a CPU."""
        if self.cell.is_prefill:
            return self.generate()[1].prefill_s
        rates, p = self.lab.rates("planned"), self.lab.preset
        return rates.head_s + p.layers * p.cached_tokens * rates.attention_s_per_token

    def generate(self, **options: Any) -> tuple[torch.Tensor, ServedGroup]:
        """New tokens of the prompts, and when they came."""
        tokens, _, group = generate(
            self.lab.model,
            self.lab.ids,
            self.mask,
            new_tokens=self.new_tokens,
            started_s=time.perf_counter(),
            keeps_logits=False,
            **options,
        )
        return tokens, group


def _move(model: Any, device: torch.device | str) -> None:
    model.to(device)


def weight_sizes(model: Any) -> WeightSizes:
    """What a model's weights take, as a slab has those of a layer."""
    tensors = own_tensors(model, decoder_layers(model))
    inside = {id(tensor) for own in tensors for tensor in own}
    everything = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    outside = [tensor for number, tensor in everything.items() if number not in inside]
    return WeightSizes(
        outside=sum(tensor.numel() * tensor.element_size() for tensor in outside),
        layers=tuple(LayerWeights(idx, own).num_bytes for idx, own in enumerate(tensors)),
    )


class Reading(NamedTuple):
    """What a session has moved to the device when a token is chosen."""

    queued_bytes: int  # of all copies
    weight_bytes: int  # that layers were given


class Traffic:
    """Counts every copy to the device that is queued; a logits processor that takes a reading at every token.

    Args:
        session: the one.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._queued_bytes = session, 0
        self.readings: list[Reading] = []

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count meanwhile, from a reading at the begin on."""
        copy = self._session.backend.copy_to_device

        def counted(dst: torch.Tensor, src: torch.Tensor, after: Sequence[Event], **lane: Any) -> Event:
            self._queued_bytes += src.numel() * src.element_size()
            return copy(dst, src, after, **lane)

        self._read()
        with mock.patch.object(self._session.backend, "copy_to_device", counted):
            yield

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._read()
        return scores

    def _read(self) -> None:
        weights = self._session.engine.weights
        self.readings.append(Reading(self._queued_bytes, 0 if weights is None else weights.delivered_bytes))

    @property
    def queued_bytes(self) -> int:
        """Of all copies so far."""
        return self._queued_bytes

    @property
    def prefill_weight_bytes(self) -> int:
        """That layers were given until the first token."""
        return self.readings[1].weight_bytes - self.readings[0].weight_bytes

    @property
    def per_step(self) -> Reading | None:
        """Of one step in the steady state; None where there were too few."""
        steady = self.readings[1 + NUM_UNEVEN_STEPS : -1]  # nothing is brought ahead of a step that does not come
        if len(steady) < 2:
            return None
        first, last, steps = steady[0], steady[-1], len(steady) - 1
        return Reading(*(round((after - before) / steps) for before, after in zip(first, last, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One `generate()` of one provider."""

    tokens: torch.Tensor
    prefill_s: float
    step_s: list[float]  # without uneven ones
    stats: GenerationStats | None = None
    per_step: Reading | None = None
    prefill_weight_bytes: int | None = None
    queued_bytes: int | None = None

    @property
    def compared_s(self) -> float:
        """The median step; of a prefill what it took."""
        return statistics.median(self.step_s) if self.step_s else self.prefill_s


def _run(found: tuple[torch.Tensor, ServedGroup], setup_s: float = 0.0, **more: Any) -> Run:
    tokens, group = found
    steps = [after - before for before, after in itertools.pairwise(group.token_s)]
    return Run(tokens=tokens, prefill_s=group.prefill_s - setup_s, step_s=steps[NUM_UNEVEN_STEPS:], **more)


class Provider(ABC):
    """One way to decode."""

    name: str

    def problem(self, bed: Bed) -> str | None:
        """Why it cannot run here, in words for a row; None if it can."""
        return None

    @abstractmethod
    def run(self, bed: Bed) -> Run:
        """Decode the cell's tokens; the model is in host memory before and after."""


class OnDevice(Provider):
    """transformers as it is, with the model on the device."""

    name = ON_DEVICE

    def run(self, bed: Bed) -> Run:
        _move(bed.model, bed.lab.device)
        try:
            return _run(bed.generate())
        finally:
            _move(bed.model, "cpu")


class Accelerated(Provider):
    """accelerate's hooks, which bring the weights of a module when it is called, and give them back behind it."""

    name = ACCELERATE

    def problem(self, bed: Bed) -> str | None:
        if importlib.util.find_spec("accelerate") is None:
            return "needs the package accelerate"
        return "copies to a CUDA device, and there is none" if bed.lab.device.type != "cuda" else None

    def run(self, bed: Bed) -> Run:
        accelerate = importlib.import_module("accelerate")
        accelerate.cpu_offload(bed.model, execution_device=bed.lab.device)
        try:
            return _run(bed.generate())
        finally:
            accelerate.hooks.remove_hook_from_module(bed.model, recurse=True)
            bed.model.tie_weights()  # each module was given parameters of its own


class Ours(Provider):
    """kvoffload in one of the modes of `Lab.config`.

    Args:
        name: of the provider.
        mode: of the lab.
        changes: to its options.
        options: of `generate()`.
    """

    def __init__(self, name: str, mode: str, options: dict[str, Any] | None = None, **changes: Any) -> None:
        self.name, self.mode, self.options, self.changes = name, mode, options or {}, changes

    def run(self, bed: Bed) -> Run:
        where: dict[str, Any] = {"device_weights_gib": bed.device_weights_gib}
        if bed.lab.device.type == "cuda":
            where["device"] = str(bed.lab.device)
        config = bed.lab.config(self.mode, bed.profile, **where | self.changes)
        with offload(bed.lab.model, config) as session:
            traffic = Traffic(session)
            with traffic.counting():
                found = bed.generate(logits_processor=[traffic], **self.options)
            stats = session.stats
        assert stats is not None
        return _run(
            found,
            stats.setup_s,
            stats=stats,
            per_step=traffic.per_step,
            prefill_weight_bytes=traffic.prefill_weight_bytes,
            queued_bytes=traffic.queued_bytes,
        )


def providers(cell: WeightCell) -> list[Provider]:
    """All of them, for a cell."""
    found: list[Provider] = [
        OnDevice(),
        Ours(AS_PLANNED, "planned"),
        Ours(NO_RECOMPUTATION, "full_transfer"),
        Ours(SEQUENTIAL, "sequential", split="transfer"),
        Accelerated(),
    ]
    if cell.is_prefill:
        chunk = cell.preset.cached_tokens // 4
        found.append(Ours(f"{AS_PLANNED}, prompt in 4 chunks", "planned", {"prefill_chunk_size": chunk}))
    return found


@dataclass(kw_only=True)
class Found:
    """What one cell gave."""

    bed: Bed
    link_name: str
    rounds: list[dict[str, Run]] = field(default_factory=list)  # by provider
    problems: dict[str, str] = field(default_factory=dict)

    def runs(self, provider: str) -> list[Run]:
        """Of all rounds in which it ran."""
        return [found[provider] for found in self.rounds if provider in found]

    @property
    def providers(self) -> list[str]:
        """All that ran."""
        return list(dict.fromkeys(name for found in self.rounds for name in found))

    def speedups(self, provider: str, baseline: str) -> list[float]:
        """Of each round in which both ran: how many times as fast as the baseline's run."""
        both = [found for found in self.rounds if {provider, baseline} <= found.keys()]
        return [found[baseline].compared_s / found[provider].compared_s for found in both]

    def samples(self, provider: str) -> dict[str, tuple[str, list[float]]]:
        """By metric, its unit and samples."""
        bed, runs = self.bed, self.runs(provider)
        stats = [run.stats for run in runs if run.stats is not None]
        step_s = [seconds for run in runs for seconds in run.step_s]
        h2d = [run.per_step.queued_bytes for run in runs if run.per_step is not None]
        found: dict[str, tuple[str, list[float]]] = {
            "step_s": ("s", step_s),
            "tokens_per_s": ("1/s", [bed.cell.preset.batch / seconds for seconds in step_s]),
            "prefill_s": ("s", [run.prefill_s for run in runs]),
            "h2d_bytes": ("bytes", [float(value) for value in h2d]),
            "weight_bytes": ("bytes", [float(run.per_step.weight_bytes) for run in runs if run.per_step is not None]),
            "predicted_step_s": ("s", [one.predicted_step_s for one in stats if one.predicted_step_s and step_s]),
            "device_weight_bytes": ("bytes", [float(one.device_weight_bytes) for one in stats]),
            "split_fraction": ("fraction", [one.plan.split_fraction for one in stats]),
            "same_tokens": ("fraction", self._same_tokens(provider)),
        }
        shares = ("link_utilization", "device_busy_fraction")
        for metric in shares:
            values = [getattr(one, metric) for one in stats if step_s]
            found[metric] = ("fraction", [value for value in values if value is not None])
        passes = [run.prefill_weight_bytes for run in runs if run.prefill_weight_bytes is not None]
        found["prefill_weight_passes"] = ("passes", [value / bed.streamed_bytes for value in passes])
        if bed.cell.is_prefill:
            # with the cache of earlier chunks, and what is brought ahead of a step
            queued = [run.queued_bytes for run in runs if run.queued_bytes is not None]
            found["prefill_h2d_bytes"] = ("bytes", [float(value) for value in queued])
        if h2d:
            bound_s = statistics.median(h2d) / bed.lab.bytes_per_s
            found["bound_s"] = ("s", [bound_s])
            found["fraction_of_bound"] = ("fraction", [bound_s / seconds for seconds in step_s])
            if ceiling := self.runs(ON_DEVICE):
                floor_s = max(bound_s, statistics.median(run.compared_s for run in ceiling))
                found["floor_s"] = ("s", [floor_s])
                found["fraction_of_floor"] = ("fraction", [floor_s / seconds for seconds in step_s])
        for metric, baseline in BASELINES.items():
            found[metric] = ("ratio", self.speedups(provider, baseline))
        return {metric: (unit, values) for metric, (unit, values) in found.items() if values}

    def _same_tokens(self, provider: str) -> list[float]:
        """Of each round the share of tokens that are those of the device alone."""
        both = [found for found in self.rounds if {provider, ON_DEVICE} <= found.keys()]
        return [float((found[provider].tokens == found[ON_DEVICE].tokens).float().mean()) for found in both]

    def rows(self) -> list[rows.Row]:
        """All rows of the cell."""
        cell = self.bed.cell
        how = cell.to_json(self.bed.new_tokens, len(self.rounds))
        made = [rows.skipped(BENCH, name, cell.name, how, self.link_name, why) for name, why in self.problems.items()]
        for name in self.providers:
            for metric, (unit, values) in self.samples(name).items():
                made.append(rows.row(BENCH, name, metric, unit, cell.name, values, how, self.link_name))
        return made


def measure(bed: Bed, rounds: int) -> Found:
    """All providers of a cell, in rounds; one that fails is noted, and left out from then on."""
    found = Found(bed=bed, link_name=bed.lab.link_name)
    left = providers(bed.cell)
    for provider in list(left):
        if (why := provider.problem(bed)) is not None:
            found.problems[provider.name] = why
            left.remove(provider)
    for turn in range(rounds):
        runs: dict[str, Run] = {}
        for provider in list(left) if turn % 2 == 0 else list(reversed(left)):
            try:
                runs[provider.name] = provider.run(bed)
            except (KVOffloadError, torch.OutOfMemoryError) as error:
                found.problems[provider.name] = str(error).splitlines()[0]
                left.remove(provider)
        order = [provider.name for provider in left]
        found.rounds.append({name: runs[name] for name in order if name in runs})
    for name in found.problems:  # rows say either
        for runs in found.rounds:
            runs.pop(name, None)
    return found


def run(
    cells: Sequence[WeightCell],
    *,
    new_tokens: int,
    rounds: int,
    quick: bool,
    tell: Callable[[str], None],
    on_cell: Callable[[Found], None],
) -> None:
    """Measure cells one after another.

    Args:
        cells: of this machine.
        new_tokens: of every sequence.
        rounds: of each cell.
        quick: with tiny models.
        tell: called with what begins.
        on_cell: called with what each cell gave.
    """
    labs: dict[Preset, Lab] = {}
    with core_for_the_link():
        profile = load_or_measure()  # of this number of threads
        for cell in map(shrunk, cells) if quick else cells:
            tell(f"{cell.name}: {cell.question}")
            if cell.preset not in labs:
                labs.clear()  # models are large
                labs[cell.preset] = Lab(cell.preset)
            on_cell(measure(Bed(cell, labs[cell.preset], profile, new_tokens), rounds))


_COLUMNS = (
    ("step ms", "step_s", "{:.1f}", 1e3),
    ("tokens/s", "tokens_per_s", "{:.1f}", 1.0),
    ("weights MB", "weight_bytes", "{:.1f}", 1e-6),
    ("link MB", "h2d_bytes", "{:.1f}", 1e-6),
    ("bound ms", "bound_s", "{:.1f}", 1e3),
    ("of bound", "fraction_of_bound", "{:.3f}", 1.0),
    ("predicted ms", "predicted_step_s", "{:.1f}", 1e3),
    ("split", "split_fraction", "{:.2f}", 1.0),
    ("vs copy, wait", "speedup_over_copy_wait_compute", "{:.2f}x", 1.0),
    ("vs no recomp.", "speedup_over_no_recomputation", "{:.2f}x", 1.0),
    ("prefill s", "prefill_s", "{:.3f}", 1.0),
    ("passes", "prefill_weight_passes", "{:.2f}", 1.0),
    ("same", "same_tokens", "{:.2f}", 1.0),
)


def table(found: Found) -> Table:
    """A cell as people read it: medians."""
    made = Table(
        title=f"{found.bed.cell.name}: {device_and_threads()}, link {found.link_name}",
        title_justify="left",
        caption="; ".join(f"{name}: {why}" for name, why in found.problems.items()) or None,
        caption_justify="left",
    )
    made.add_column("provider", no_wrap=True)
    of_all = {name: found.samples(name) for name in found.providers}
    columns = [column for column in _COLUMNS if any(column[1] in samples for samples in of_all.values())]
    for name, *_ in columns:
        made.add_column(name, justify="right")
    for provider, samples in of_all.items():
        shown = [
            text.format(statistics.median(samples[metric][1]) * factor) if metric in samples else ""
            for _, metric, text, factor in columns
        ]
        made.add_row(provider, *shown)
    return made
