"""All providers over the cells, most informative first, within a budget of time; every number becomes a row.

Owns the order, the budget, the resuming, and what is done with a cell that cannot run. Does not own the measurement of
one run (`serving`) or how it is made (`providers`).

Timeline of one cell:

    reference   on_device without a cap, a few tokens with logits             not timed
    provider    the same few tokens with logits, compared with the reference     warm-up
                rates of this process | `repeats` timed runs | rates again        ours only
                `repeats` timed runs                                              the others

On a GPU ours come first, and what a provider leaves cached is given back before the next one: PyTorch keeps the pinned
memory of transformers' offloaded cache for ever, which would be missing in what others may pin.

Whatever cannot run is a row that says why: the plan's reason, a missing tool, or memory that ran out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from campaign import rows
from campaign.cells import GB, Cell
from campaign.providers import Bed, DynamicCache, Ours, Provider
from campaign.serving import LatencyObjective, Outcome, Sameness, Samples, ServedGroup, samples
from kvoffload.advise.task import Task
from kvoffload.advise.utilization import decode_mbu, decode_mfu
from kvoffload.backend import free_pinned
from kvoffload.bench.lab import Lab, core_for_the_link
from kvoffload.errors import InfeasiblePlanError, KVOffloadError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.planning.rates import Rates
from kvoffload.profiler.energy import open_meter
from kvoffload.profiler.stored import load_or_measure

logger = logging.getLogger(__name__)

BENCH = "campaign"
SPEED = "decode_tokens_per_s"  # of all sequences: what providers are ranked by, in parts or not
CHECKED_TOKENS = 4
FLOAT32_TOLERANCE = 5e-6  # of logits, tests/test_matrix.py
GENEROUS = LatencyObjective(ttft_s=10.0, tpot_s=0.5)
Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a campaign is run.

    Args:
        budget_s: no cell is begun that would probably end later than this; None for no limit.
        repeats: timed runs of each provider in each cell.
        objective: what a sequence's latency must be to count in `goodput`.
        resumes: leave out what these versions at this commit have measured on this device.
    """

    budget_s: float | None = None
    repeats: int = 1
    objective: LatencyObjective = GENEROUS
    resumes: bool = True

    def config(self, cell: Cell) -> dict[str, Any]:
        """What rows of the cell say of how they were measured."""
        return cell.to_json() | {"repeats": self.repeats, "objective": self.objective._asdict()}


def run(cells: Sequence[Cell], providers: Sequence[Provider], path: Path, settings: Settings, tell: Tell) -> None:
    """Measure and save, cell by cell and provider by provider, so that an interruption loses one provider's runs.

    Args:
        cells: in this order, as far as the budget goes.
        providers: in this order.
        path: the CSV file, added to.
        settings: see there.
        tell: called with one line for everything that ends.

    Raises:
        ConfigError: rows cannot be added to the file; nothing was measured.
    """
    rows.check(path)
    began = time.perf_counter()
    slowest_s = 0.0  # of the cells so far: they come in no order of size
    profile: HardwareProfile | None = None
    with core_for_the_link():
        for cell in cells:
            left = [
                one for one in providers if not (settings.resumes and _is_done(path, settings.config(cell), cell, one))
            ]
            if not left:
                tell(f"{cell.name}: measured before")
                continue
            spent_s = time.perf_counter() - began
            if settings.budget_s is not None and spent_s + slowest_s > settings.budget_s:
                tell(f"{cell.name}: no time left in the budget of {settings.budget_s / 60:g} minutes")
                continue
            profile = profile or load_or_measure()
            start = time.perf_counter()
            _run_cell(cell, left, profile, path, settings, tell)
            slowest_s = max(slowest_s, time.perf_counter() - start)


def _is_done(path: Path, config: dict[str, Any], cell: Cell, provider: Provider) -> bool:
    return (BENCH, provider.name, cell.name, rows.config_text(config)) in rows.done(rows.load(path))


def _run_cell(
    cell: Cell, providers: Sequence[Provider], profile: HardwareProfile, path: Path, settings: Settings, tell: Tell
) -> None:
    try:
        _run_providers(cell, providers, profile, path, settings, tell)
    finally:
        if torch.cuda.is_available():
            _release_cached(keeps_ours=False)


def _run_providers(
    cell: Cell, providers: Sequence[Provider], profile: HardwareProfile, path: Path, settings: Settings, tell: Tell
) -> None:
    torch.manual_seed(0)
    lab: Lab | None = None
    try:
        lab = Lab(dataclasses.replace(cell.preset, batch=cell.batch * cell.num_beams))
        if cell.device_memory_gb is not None:
            cap_bytes = min(int(cell.device_memory_gb * GB), profile.device_memory_bytes)
            profile = dataclasses.replace(profile, device_memory_bytes=cap_bytes)
        bed = Bed(cell, lab, profile)
        reference = DynamicCache().run(bed, min(CHECKED_TOKENS, cell.new_tokens), keeps_logits=True)
    except AssertionError:
        raise
    except Exception as error:
        link = _link_without_a_lab(cell) if lab is None else lab.link_name
        why = f"the reference, on_device without a cap, did not run: {_reason(error)}"
        tell(f"{cell.name}: {why}")
        config = settings.config(cell)
        rows.save(path, [rows.skipped(BENCH, one.name, cell.name, config, link, why) for one in providers])
        return
    with _memory_cap(cell, lab.device):
        ordered = in_order(providers, lab.device)
        for idx, provider in enumerate(ordered):
            found = _measured(provider, bed, reference, settings)
            if lab.device.type == "cuda":
                _release_cached(keeps_ours=any(isinstance(one, Ours) for one in ordered[idx + 1 :]))
            rows.save(path, found)
            if found[0]["metric"] != rows.SKIPPED:
                tell(f"{cell.name}: {_line(provider, found)}")


def in_order(providers: Sequence[Provider], device: torch.device) -> list[Provider]:
    """Ours first on a GPU, else as they come."""
    return sorted(providers, key=lambda one: device.type == "cuda" and not isinstance(one, Ours))


def _release_cached(*, keeps_ours: bool) -> None:
    """Give back device and pinned memory that nobody uses any more, and unless `keeps_ours` what our sessions keep."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()
    if not keeps_ours:
        free_pinned()


def _measured(provider: Provider, bed: Bed, reference: Outcome, settings: Settings) -> list[rows.Row]:
    """All rows of one provider in one cell; one row that says why where there are none."""
    cell, link = bed.cell, bed.lab.link_name
    config = settings.config(cell)
    try:
        why = provider.problem(bed)
        if why is None:
            figures = _figures(provider, bed, reference, settings)
    except AssertionError:  # wrong tokens, or our own invariants: nothing measured here can be trusted
        raise
    except torch.OutOfMemoryError:
        why = f"ran out of device memory under a cap of {cell.device_memory_gb or 'all'} GB"
        torch.cuda.empty_cache()
    except Exception as error:  # of a library as well: the other providers still have their turn
        why = _reason(error)
    if why is not None:
        return [rows.skipped(BENCH, provider.name, cell.name, config, link, why)]
    return [
        rows.row(BENCH, provider.name, metric, unit, cell.name, values, config, link)
        for metric, (unit, values) in figures.items()
    ]


def _reason(error: Exception) -> str:
    """The plan's reason as it is, anything else with its type."""
    return str(error) if isinstance(error, KVOffloadError) else f"{type(error).__name__}: {error}"


def _link_without_a_lab(cell: Cell) -> str:
    return "emulated, not measured" if cell.preset.is_emulated else "not measured"


def _figures(provider: Provider, bed: Bed, reference: Outcome, settings: Settings) -> Samples:
    cell = bed.cell
    checked = provider.run(bed, min(CHECKED_TOKENS, cell.new_tokens), keeps_logits=True)
    sameness = Sameness.of(checked, reference)
    if provider.is_exact and cell.preset.dtype == torch.float32:
        _must_be_equal(provider, cell, sameness)
    before = bed.lab.rates(provider.mode) if isinstance(provider, Ours) else None
    meter = open_meter(bed.lab.device)
    joules_before = meter.joules()
    runs = [provider.run(bed, cell.new_tokens, keeps_logits=False) for _ in range(settings.repeats)]
    joules_after = meter.joules()
    after = bed.lab.rates(provider.mode) if isinstance(provider, Ours) else None
    found = samples(runs, bed.prompt_tokens, settings.objective)
    if joules_before is not None and joules_after is not None:
        new_tokens = sum(run.tokens.numel() for run in runs)
        found["energy_per_new_token"] = ("J", [(joules_after - joules_before) / new_tokens])
    if not math.isnan(sameness.max_abs_logit_difference):
        found["max_abs_logit_difference"] = ("", [sameness.max_abs_logit_difference])
        found["kl_divergence"] = ("nats", [sameness.kl_divergence])
    if sameness.first_differing_token is not None:
        found["first_differing_token"] = ("index", [float(sameness.first_differing_token)])
    if SPEED in found:
        found["mfu"] = ("fraction", [decode_mfu(bed.task, 1, 1 / per_s) for per_s in found[SPEED][1]])
        found["mbu"] = ("fraction", [_mbu(bed.task, run.groups) for run in runs])
    if isinstance(provider, Ours) and before is not None and after is not None:
        _add_bound(found, provider, bed, runs, (before, after))
    return found


def _mbu(task: Task, groups: Sequence[ServedGroup]) -> float:
    """Over the decoding of all groups: each moves its own bytes at every step, and a step may give several tokens."""
    moved = 0.0
    for group in groups:
        if steps := len(set(group.token_s)) - 1:
            moved += group.decode_s * decode_mbu(task, group.sequences, group.decode_s / steps)
    return moved / sum(group.decode_s for group in groups)


def _must_be_equal(provider: Provider, cell: Cell, sameness: Sameness) -> None:
    """A figure of wrong tokens is no figure."""
    distance = sameness.max_abs_logit_difference
    if sameness.first_differing_token is not None or not distance <= FLOAT32_TOLERANCE:  # NaN is no equality
        raise AssertionError(
            f"{provider.name} in {cell.name}: in float32 its logits differ by {distance:.2g} from on_device's "
            f"(first differing token: {sameness.first_differing_token}); its times mean nothing"
        )


def _add_bound(found: Samples, provider: Ours, bed: Bed, runs: Sequence[Outcome], rates: Sequence[Rates]) -> None:
    """The median step beside the cost model's at rates measured around the runs."""
    stats = [run.stats for run in runs if run.stats is not None]
    steps = [seconds for one in stats for seconds in one.decode_step_s[2:]]  # the first two are uneven, see `decode`
    plan = stats[-1].plan
    if not steps or plan.num_blocks < 1:
        return
    found["decode_step"] = ("s", steps)
    found["setup"] = ("s", [one.setup_s for one in stats])
    found["split_fraction"] = ("fraction", [plan.split_fraction])
    errors = [abs(one.prediction_error_fraction) for one in stats if one.prediction_error_fraction is not None]
    if errors:
        found["prediction_error"] = ("fraction", errors)
    if bed.cell.prompt_lookup_tokens is not None or bed.cell.num_beams > 1:
        return  # the bound is that of steps of one token, and of blocks that hold every row
    try:
        bound_s = min(bed.lab.bound_s(provider.mode, one, like=plan) for one in rates)
    except InfeasiblePlanError as error:
        logger.info("no bound for %s: %s", bed.cell.name, error)
        return
    found["bound_step"] = ("s", [bound_s])
    found["fraction_of_bound"] = ("fraction", [bound_s / statistics.median(steps)])


@contextlib.contextmanager
def _memory_cap(cell: Cell, device: torch.device) -> Iterator[None]:
    """At most `device_memory_gb` for this process, on a GPU."""
    if device.type != "cuda" or cell.device_memory_gb is None:
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, cell.device_memory_gb * GB / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _line(provider: Provider, found: list[rows.Row]) -> str:
    p50 = {one["metric"]: one["p50"] for one in found}
    bound = f", {float(p50['fraction_of_bound']):.3f} of the bound" if "fraction_of_bound" in p50 else ""
    if "tpot" not in p50:
        return f"{provider.name} {float(p50['total']):.2f} s"
    return f"{provider.name} {float(p50['tpot']) * 1e3:.1f} ms per token{bound}"


def summary(found: Sequence[rows.Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """cell -> provider -> metric -> median, and "note" for what was not measured.

    Of a cell that was measured in several configurations only the latest: those are other workloads.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    latest: dict[str, rows.Row] = {}
    for one in found:
        if one["x"] not in latest or one["date"] >= latest[one["x"]]["date"]:
            latest[one["x"]] = one
    for one in found:
        if one["config_json"] != latest[one["x"]]["config_json"]:
            continue
        figures = table.setdefault(one["x"], {}).setdefault(one["provider"], {})
        if one["metric"] == rows.SKIPPED:
            figures["note"] = one["note"]
        else:
            figures[one["metric"]] = float(one["p50"])
    return table
