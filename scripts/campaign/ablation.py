"""What each part of the runtime is worth: everything on, then one part off at a time.

Owns the variants, the settings they are repeated at, and the factors between transformers' traffic and ours. Does not
own the runtime: every variant is an `OffloadConfig`, the two baselines are providers.

    everything on           planned split, overlap, write-back by block
    profiler off            a fixed split of one half
    scheduler off           copy, wait, compute
    runtime off             the same with a single staging buffer
    write-back per step     blocks of one token: every step writes
    slots n, chunk n        the ring and the chunk at other sizes than planned

The factors go from the traffic of transformers' offloaded cache to ours in three steps, each one the ratio of two
measured steps:

    write-back   whole layers both ways       -> whole layers fetched, nothing written back
    overlap      whole layers, one ahead      -> chunks in one pipeline (full transfer)
    split        full transfer                -> everything on

Variants are measured in turns, so that a busy minute of the machine meets all of them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from rich.table import Table

from campaign import rows
from campaign.cells import Cell
from campaign.providers import Bed, WholeLayerBothWays
from kvoffload.bench.decode import NUM_UNEVEN_STEPS, steps
from kvoffload.bench.lab import Lab, core_for_the_link, device_and_threads
from kvoffload.bench.presets import PRESETS
from kvoffload.config import GIB
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.profiler.stored import load_or_measure

BENCH = "ablation"
FULL = "everything on"
FACTORS = {
    "write-back": ("whole_layer_both_ways", "whole_layer_fetched"),
    "overlap": ("whole_layer_fetched", "full_transfer"),
    "split": ("full_transfer", FULL),
}
SLOW, FAST = "slow link", "fast link"


class Variant(NamedTuple):
    """One set of options."""

    name: str
    mode: str
    changes: dict[str, Any]


class Setting(NamedTuple):
    """Where all variants are compared."""

    link: str
    memory: str  # "min", or "half": that and room for half of the cache
    load: str  # "idle", or "loaded": a busy process for every core

    def __str__(self) -> str:
        return f"{self.link}, {self.memory} memory, {self.load} cores"


class Found(NamedTuple):
    """One variant at one setting."""

    decode_step_s: list[float]
    device_idle_fraction: float | None
    link_utilization: float | None
    d2h_bytes: float | None

    @property
    def p50_s(self) -> float:
        """The median step."""
        return statistics.median(self.decode_step_s)


def variants(lab: Lab) -> list[Variant]:
    """All of them, the complete one first."""
    found = [
        Variant(FULL, "planned", {}),
        Variant("profiler off", "planned", {"split": 0.5}),
        Variant("scheduler off", "sequential", {}),
        Variant("runtime off", "sequential", {"slots": 1}),
        Variant("write-back per step", "planned", {"block_tokens": 1, "chunk_blocks": lab.chunk_tokens}),
        Variant("full_transfer", "full_transfer", {}),
    ]
    found += [Variant(f"slots {slots}", "planned", {"slots": slots}) for slots in (1, 2, 4)]
    sizes = sorted({1, 2 * lab.chunk_blocks, 4 * lab.chunk_blocks} - {lab.chunk_blocks})
    found += [Variant(f"chunk {size * lab.block_tokens}", "planned", {"chunk_blocks": size}) for size in sizes]
    return found


def settings(lab: Lab, quick: bool) -> list[Setting]:
    """The plain one first; without `quick` every combination."""
    links = [SLOW, FAST] if lab.preset.is_emulated else ["own link"]
    memories, loads = ["min", "half"], ["idle", "loaded"]
    if quick:
        plain = Setting(links[0], memories[0], loads[0])
        others = [*(plain._replace(link=link) for link in links[1:]), plain._replace(memory=memories[1])]
        return [plain, *others, plain._replace(load=loads[1])]
    return [Setting(*one) for one in itertools.product(links, memories, loads)]


def run(
    preset_name: str, *, new_tokens: int, rounds: int, quick: bool, tell: Callable[[str], None]
) -> tuple[list[rows.Row], list[Table]]:
    """Rows and tables of every setting.

    Args:
        preset_name: one of `PRESETS`.
        new_tokens: decoded per measurement; two steps of each are not counted.
        rounds: passes over all variants of a setting.
        quick: only the plain setting has all variants, and its neighbours the first four.
        tell: called with what begins.
    """
    profile = load_or_measure()
    found_rows: list[rows.Row] = []
    tables: list[Table] = []
    with core_for_the_link():
        lab = Lab(PRESETS[preset_name])
        warm = steps(lab, lab.config("planned", profile), new_tokens)
        least_bytes = max(warm.device_kv_peak_decode_bytes, warm.device_kv_peak_prefill_bytes)
        speeds = {SLOW: lab.bytes_per_s, FAST: 3.3 * lab.bytes_per_s}  # 0.7 and 0.7 * 3.3 = 1 / 0.43 of the link time
        for turn, setting in enumerate(settings(lab, quick)):
            tell(str(setting))
            if setting.link in speeds:
                lab.set_link_bytes_per_s(speeds[setting.link])
            chosen = variants(lab) if turn == 0 or not quick else variants(lab)[:4]
            memory = {"device_gib": (least_bytes + _cache_bytes(lab) / 2) / GIB} if setting.memory == "half" else {}
            chosen = [variant._replace(changes=memory | variant.changes) for variant in chosen]
            with _busy_cores() if setting.load == "loaded" else contextlib.nullcontext():
                found = _measure(lab, profile, chosen, new_tokens, rounds, with_factors=turn == 0)
            found_rows += _rows(lab, preset_name, setting, found)
            tables.append(_table(lab, preset_name, setting, found))
    return found_rows, tables


def _cache_bytes(lab: Lab) -> int:
    return lab.preset.batch * lab.preset.cached_tokens * lab.preset.layers * lab.shape.kv_row_bytes


def _measure(
    lab: Lab,
    profile: HardwareProfile,
    chosen: Sequence[Variant],
    new_tokens: int,
    rounds: int,
    with_factors: bool,
) -> dict[str, Found]:
    gathered: dict[str, list[Found]] = {}
    for _ in range(rounds):
        for variant in chosen:
            stats = steps(lab, lab.config(variant.mode, profile, **variant.changes), new_tokens)
            busy = stats.device_busy_fraction
            gathered.setdefault(variant.name, []).append(
                Found(
                    stats.decode_step_s[NUM_UNEVEN_STEPS:],
                    None if busy is None else 1 - busy,
                    stats.link_utilization,
                    float(stats.d2h_bytes),
                )
            )
        if with_factors:
            for provider in (WholeLayerBothWays(), WholeLayerBothWays(writes_back=False)):
                gathered.setdefault(provider.name, []).append(_baseline(provider, lab, profile, new_tokens))
    return {name: _pooled(found) for name, found in gathered.items()}


def _baseline(provider: WholeLayerBothWays, lab: Lab, profile: HardwareProfile, new_tokens: int) -> Found:
    cell = Cell(name=BENCH, group="cpu", rank=0, question="", preset=lab.preset, new_tokens=new_tokens)
    outcome = provider.run(Bed(cell, lab, profile), new_tokens, keeps_logits=False)
    times = outcome.groups[0].token_s
    step_s = [after - before for before, after in itertools.pairwise(times)][NUM_UNEVEN_STEPS:]
    return Found(step_s, None, None, float(outcome.d2h_bytes or 0))


def _pooled(found: Sequence[Found]) -> Found:
    def median(name: str) -> float | None:
        values = [getattr(one, name) for one in found if getattr(one, name) is not None]
        return statistics.median(values) if values else None

    step_s = [seconds for one in found for seconds in one.decode_step_s]
    return Found(step_s, median("device_idle_fraction"), median("link_utilization"), median("d2h_bytes"))


def factors(found: dict[str, Found]) -> dict[str, float]:
    """How many times faster each step of the way makes a decode step; their product is the whole gain."""
    return {
        name: found[before].p50_s / found[after].p50_s
        for name, (before, after) in FACTORS.items()
        if before in found and after in found
    }


def _rows(lab: Lab, preset_name: str, setting: Setting, found: dict[str, Found]) -> list[rows.Row]:
    config = {"preset": preset_name, **setting._asdict()}
    made: list[rows.Row] = []

    def add(provider: str, metric: str, unit: str, samples: list[float]) -> None:
        made.append(rows.row(BENCH, provider, metric, unit, str(setting), samples, config, lab.link_name))

    for name, one in found.items():
        add(name, "decode_step", "s", one.decode_step_s)
        add(name, "decode_tokens_per_s", "1/s", [lab.preset.batch / seconds for seconds in one.decode_step_s])
        add(name, "step_over_everything_on", "ratio", [one.p50_s / found[FULL].p50_s])
        for metric, unit in (
            ("device_idle_fraction", "fraction"),
            ("link_utilization", "fraction"),
            ("d2h_bytes", "bytes"),
        ):
            value = getattr(one, metric)
            if value is not None:
                add(name, metric, unit, [value])
    for name, factor in factors(found).items():
        add(f"factor: {name}", "speedup", "ratio", [factor])
    return made


def _table(lab: Lab, preset_name: str, setting: Setting, found: dict[str, Found]) -> Table:
    table = Table(title=f"{preset_name}, {setting}: {device_and_threads()}, link {lab.link_name}", title_justify="left")
    table.add_column("variant", no_wrap=True)
    for name in ("step ms", "tokens/s", "vs everything on", "device idle", "link busy", "written MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in found.items():
        table.add_row(
            name,
            f"{one.p50_s * 1e3:.1f}",
            f"{lab.preset.batch / one.p50_s:.1f}",
            f"{one.p50_s / found[FULL].p50_s:.2f}x the time",
            "" if one.device_idle_fraction is None else f"{one.device_idle_fraction:.2f}",
            "" if one.link_utilization is None else f"{one.link_utilization:.2f}",
            "" if one.d2h_bytes is None else f"{one.d2h_bytes / 1e6:.1f}",
        )
    shown = factors(found)
    if len(shown) == len(FACTORS):
        text = " x ".join(f"{name} {factor:.2f}" for name, factor in shown.items())
        whole = found["whole_layer_both_ways"].p50_s / found[FULL].p50_s
        table.caption = f"gain over the traffic of transformers' offloaded cache: {text} = {whole:.2f}x"
        table.caption_justify = "left"
    return table


# Looks for its parent now and then: a benchmark that is killed leaves no busy core behind.
_COMPUTE = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def _busy_cores() -> Iterator[None]:
    """One process for every core that does nothing but compute."""
    command = [sys.executable, "-c", _COMPUTE, str(os.getpid())]
    busy = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
        for process in busy:
            process.wait()


def default_preset() -> str:
    """What is measured on this kind of machine."""
    return "opt-6.7b" if torch.cuda.is_available() else "cpu-mha"
