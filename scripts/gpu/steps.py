"""Tier 1 of the suite for a GPU: what the first eight minutes on a device measure, most valuable first.

Owns the order, each step's time, and what a step calls. Does not own the clock that ends a step which runs over
(`scripts/gpu_suite.py`) nor the process that the steps share (`worker`). A capability that a device should prove adds
one line to `STEPS`.

Imports nothing but the standard library until a step runs, so that the list is there at once.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
TIER_1_S = 480.0
START_S = 60.0  # for the environment, imports and the device's context
NEEDED_BYTES = int(22e9)  # of device memory: the weights of llama-3.1-8b and a prefill of 32 prompts
DECODE_STEPS = 12


class OutOfTime(Exception):
    """A step ends itself, since what comes next would probably run over."""


@dataclass(slots=True)
class Suite:
    """What steps share.

    Args:
        results: the folder of rows.
        left_s: seconds until this step is ended.
    """

    results: Path
    left_s: Callable[[], float]

    def tell(self, text: str) -> None:
        """One line about what has ended."""
        print(f"   {text}", flush=True)

    def profile(self) -> Any:
        """This machine: as a step before has measured it, else as it is stored or measured now."""
        from kvoffload.machine.hardware_profile import HardwareProfile
        from kvoffload.profiler.stored import load_or_measure

        path = self.results / "profile.json"
        return HardwareProfile.load(path) if path.exists() else load_or_measure("cuda")


class Step(NamedTuple):
    """One line of the table."""

    name: str
    limit_s: float  # of wall time; what it leaves is the others'
    writes: str  # in the folder of results
    run: Callable[[Suite], None]


def smoke(suite: Suite) -> None:
    """Pinning, copies, each kernel beside its twin, and one generation beside plain `generate`."""
    from gpu import smoke as checks

    checks.run(suite.results / "smoke.csv", suite.tell)


def profile(suite: Suite) -> None:
    """What plans need to know of the machine, kept for the steps behind and for the user."""
    from kvoffload.profiler import stored
    from kvoffload.profiler.profile import measure_hardware

    measured = measure_hardware("cuda", thoroughness="quick")
    measured.save(suite.results / "profile.json")
    stored.store(measured)
    if doubt := stored.reason_not_to_keep(measured):
        suite.tell(f"kept, but doubtful: {doubt}")
    assert measured.h2d is not None
    suite.tell(f"{measured.link_name}: {measured.h2d.rate(2**26) / 1e9:.1f} GB/s for 64 MiB to the device")


def decode(preset: str, *modes: str) -> Callable[[Suite], None]:
    """Modes of one shape beside the bound of the cost model; a mode that would run over is left out."""

    def run(suite: Suite) -> None:
        from bench_decode import save_csv

        from kvoffload import bench

        left_s = [suite.left_s()]

        def on_row(row: dict[str, Any]) -> None:
            save_csv(preset, [row], suite.results / "decode.csv")
            suite.tell(f"{preset} {row['mode']}: {row['decode_step_s_p50'] * 1e3:.1f} ms a step")
            left_s.append(suite.left_s())
            longest_s = max(before - after for before, after in itertools.pairwise(left_s))
            if row["mode"] != modes[-1] and left_s[-1] < longest_s:
                raise OutOfTime(f"{left_s[-1]:.0f} s left, the modes of {preset} take up to {longest_s:.0f}")

        bench.run(preset, list(modes), DECODE_STEPS, profile=suite.profile(), max_tries=1, on_row=on_row)

    return run


def cell(name: str, *names: str) -> Callable[[Suite], None]:
    """One cell of the campaign, with some of its providers."""

    def run(suite: Suite) -> None:
        from campaign import campaign, cells
        from campaign.providers import providers

        suite.profile()  # stored, or measured and stored, for the campaign
        chosen = [providers()[one] for one in names]
        campaign.run([cells.CELLS[name]], chosen, suite.results / "campaign.csv", campaign.Settings(), suite.tell)

    return run


def kernels(suite: Suite) -> None:
    """Kernels of one shape beside what bounds each."""
    import bench_kernels

    from campaign import rows

    found = bench_kernels.measure("cuda", True, lambda new: rows.save(suite.results / "kernels.csv", new))
    suite.tell(f"{len(found)} rows of kernels")


def tests(*arguments: str) -> Callable[[Suite], None]:
    """Tests for a GPU in a process of their own, as far as time goes."""

    def run(suite: Suite) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, *arguments], cwd=ROOT, timeout=max(5.0, suite.left_s()), check=False)
        if done.returncode:
            raise AssertionError(f"pytest ended with {done.returncode}")

    return run


STEPS = (
    Step("smoke", 60, "smoke.csv", smoke),
    Step("profile", 30, "profile.json", profile),
    Step("opt-6.7b", 80, "decode.csv", decode("opt-6.7b-512", "full_transfer", "planned", "sequential")),
    Step("llama-3.1-8b", 50, "decode.csv", decode("llama-3.1-8b", "full_transfer", "planned")),
    Step("llama-2-7b", 60, "decode.csv", decode("llama-2-7b-512", "full_transfer", "planned")),
    Step(
        "offloaded cache",
        80,
        "campaign.csv",
        cell("llama-2-7b 12x1024+16 20 GB", "planned", "hf_offloaded", "full_transfer", "sub_batches"),
    ),
    Step("kernels", 20, "kernels.csv", kernels),
    Step("tests", 60, "-", tests("-k", "not sanitizer", "tests/test_gpu.py")),
    Step("sanitizer", 60, "-", tests("-k", "sanitizer", "tests/test_gpu.py")),
)


def lines() -> list[str]:
    """The table as people read it."""
    return [f"up to {step.limit_s:4.0f} s  writes {step.writes:14}  {step.name}" for step in STEPS]


def clock(limit_s: float) -> Callable[[], float]:
    """Seconds left of so many that begin now."""
    ends_s = time.monotonic() + limit_s
    return lambda: ends_s - time.monotonic()
