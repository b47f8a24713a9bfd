"""A study with everything in it, made without measuring: for tests of the report."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import closed_forms
from configs import CONFIGS
from placements import changed

from campaign import rows
from kvoffload.config import OffloadConfig
from kvoffload.machine.machine import find_profile
from kvoffload.planning.workload import Workload
from kvoffload.profiler.drawing.study import MeasuredRun, Study, compared_rows, simulated, study

ROOT = Path(__file__).parents[1]
SHIPPED_ROWS = ROOT / "scripts" / "results" / "decode.csv"
HARDWARE = "a100-40gb-pcie4"
PRETENDED_STEPS = {  # by provider and shape: seconds measured, and by the cost model
    ("planned", "cpu-mha"): (0.30, 0.25),
    ("planned", "cpu-gqa"): (0.20, 0.20),
    ("full_transfer", "cpu-mha"): (0.66, 0.64),
}


def made(
    name: str = "opt-6.7b",
    batch: int = 64,
    prompt_tokens: int = 1024,
    new_tokens: int = 128,
    config: OffloadConfig = OffloadConfig(),  # noqa: B008, it is frozen
    **options: Any,
) -> Study:
    """The study of one of the recorded configurations on an A100."""
    workload = Workload(batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    return study(CONFIGS / f"{name}.json", workload, find_profile(HARDWARE), config, **options)


def pretended_run(found: Study) -> MeasuredRun:
    """A "measurement" whose steps are those of a link a little slower than planned."""
    assert found.advice is not None
    plan, inputs = found.advice.plan, found.task.inputs(found.task.workload.cached_tokens)
    rates = inputs.rates
    slower = changed(
        rates,
        h2d_kv_bytes_per_s=rates.h2d_bytes_per_s["kv"] / 1.1,
        h2d_activation_bytes_per_s=rates.h2d_bytes_per_s["activation"] / 1.1,
    )
    planned, step_s = simulated(plan, inputs, 2)
    measured, slower_s = simulated(plan, dataclasses.replace(inputs, rates=slower), 2)
    return MeasuredRun(
        shape="a pretended shape",
        device_name="a pretended device",
        link_name="emulated 1 GB/s",
        is_emulated=True,
        plan=plan,
        predicted_step_s=plan.predicted_step_s,
        predicted_range_s=(0.9 * plan.predicted_step_s, 1.1 * plan.predicted_step_s),
        simulated_step_s=step_s,
        step_s=(slower_s, slower_s, 1.01 * slower_s),
        planned=planned,
        measured=measured,
    )


def write_rows(path: Path) -> Path:
    """A results file of the benchmark, with rows of `PRETENDED_STEPS` among others, and one that was skipped."""
    found = []
    for (provider, shape), (measured_s, predicted_s) in PRETENDED_STEPS.items():
        where: Any = {"config": {"preset": shape}, "link": "emulated 0.1 GB/s", "device": "a pretended CPU (1 thread)"}
        found += [
            rows.row("decode", provider, "decode_step", "s", shape, [measured_s] * 3, **where),
            rows.row("decode", provider, "bound_step", "s", shape, [predicted_s], **where),
            rows.row("decode", provider, "link_utilization", "fraction", shape, [0.9], **where),
        ]
    found.append(rows.skipped("decode", "accelerate", "cpu-mha", {"preset": "cpu-mha"}, "emulated 0.1 GB/s", "no GPU"))
    rows.save(path, found)
    return path


def with_everything(name: str = "opt-6.7b") -> Study:
    """With rows and a run."""
    with tempfile.TemporaryDirectory() as folder:
        compared = compared_rows(write_rows(Path(folder) / "decode.csv"))
    return made(name, compared=compared, measured=pretended_run(made(name)))


def best_step_s(found: Study) -> float:
    """The fastest placement of the plan's problem, every one of them tried."""
    inputs = found.task.inputs(found.task.workload.cached_tokens)
    s, fastest = inputs.num_blocks, float("inf")
    for r in range(s + 1):
        for r_x in range(s + 1 - r):
            if closed_forms.device_bytes(inputs, r, r_x) > inputs.device_bytes:
                break
            for x in range(s + 1 - r - r_x):
                t = s - r - r_x - x
                if closed_forms.host_bytes(inputs, x, t) <= inputs.host_bytes:
                    fastest = min(fastest, closed_forms.predict_step_s(inputs, r, r_x, x, t)[0])
    return fastest
