"""The profiler, the benchmarks and the suite for a GPU, on a device that is not there (fake_cuda.py), at tiny sizes."""

from __future__ import annotations

import contextlib
import functools
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda_kernels import use_twins

from campaign import ablation, campaign, cells
from campaign.cells import Cell
from campaign.rows import load
from kvoffload.backend import clock
from kvoffload.bench import PRESETS, Lab, Preset, current_rates, decode, lab
from kvoffload.cli import measured_run
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.stored_facts import facts_of
from kvoffload.planning.workload import Workload
from kvoffload.profiler import budget, compute, energy, host_memory, stored, trials
from kvoffload.profiler.profile import measure_hardware
from kvoffload.session import measured_rates

ROOT = Path(__file__).parents[1]
CELLS = ("opt-6.7b 64x512+32", "llama-2-7b 3 beams 1x16384", "llama-3.1-8b 1x65536+32 24 GB")


def _tiny(preset: Preset) -> Preset:
    grouped = preset.kv_heads < preset.heads
    return replace(
        preset,
        hidden=64,
        heads=4,
        kv_heads=2 if grouped else 4,
        ffn=64,
        layers=2,
        batch=min(2, preset.batch),
        cached_tokens=32,
        vocab=96,
        dtype=torch.float32,
    )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeCuda]:
    """A device, and sizes and budgets that take the CPU a second."""
    use_twins(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, preset in PRESETS.items():
        if not preset.is_emulated:
            monkeypatch.setitem(PRESETS, name, _tiny(preset))
    chosen = {name: replace(cells.CELLS[name], preset=_tiny(cells.CELLS[name].preset), new_tokens=6) for name in CELLS}
    monkeypatch.setattr(cells, "CELLS", chosen)
    for name, full in budget.BUDGETS.items():
        seconds = {field: 0.03 if getattr(full, field) else 0.0 for field in full._fields if field.endswith("_s")}
        short = full._replace(**seconds)._replace(max_copy_s=0.05, sizes_bytes=(2**12, 2**16))
        monkeypatch.setitem(budget.BUDGETS, name, short)
    monkeypatch.setitem(compute.POOL_BYTES, "cuda", 2**22)
    monkeypatch.setitem(compute.WEIGHTS, "cuda", ((64, 64), (128, 64)))
    monkeypatch.setitem(compute.ATTENTION_BYTES, "cuda", (2**17, 2**18))
    monkeypatch.setattr(compute, "ROWS", (1, 4))
    monkeypatch.setitem(host_memory.measure_host_memory.__kwdefaults__, "pool_bytes", 2**22)
    for name, value in {"PRODUCT": 64, "POOL_BYTES": 2**20, "COPY_BYTES": 2**16, "BURST_S": 1e-3}.items():
        monkeypatch.setattr(energy, name, value)
    monkeypatch.setattr(trials, "MAX_UNCERTAINTY_FRACTION", 10.0)  # nothing here is steady
    monkeypatch.setattr(measured_rates, "CHECK_BUDGET_S", 0.01)
    monkeypatch.setattr(clock, "LEAST_CALLS", 1)  # nothing takes any time here
    monkeypatch.setattr(decode, "MAX_TRIES", 1)
    monkeypatch.setattr(ablation, "_busy_cores", contextlib.nullcontext)
    monkeypatch.setattr(lab, "step_s_without_cache", functools.cache(current_rates.step_s_without_cache))
    median_s = current_rates._median_s
    monkeypatch.setattr(
        current_rates, "_median_s", lambda work, device, budget_s, idle_s=0.0: median_s(work, device, 0.0, 0.0)
    )
    with fake_cuda.fake_cuda("lazy") as fake:
        yield fake


# ---- the profiler --------------------------------------------------------------------------------------------------


class _Nvml:
    """Stands for the module `pynvml`: a counter that goes on."""

    NVMLError = OSError

    def __init__(self) -> None:
        self.millijoules, self.asked = 0, b""

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> str:
        self.asked = bus
        return bus

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.millijoules += 5
        return self.millijoules


def _finds_everything(profile: HardwareProfile) -> None:
    assert profile.device_name == fake_cuda.NAME
    assert not profile.emulated_link
    assert profile.h2d is not None
    assert profile.d2h is not None
    assert profile.extra["pinned"] is True
    assert profile.device_memory_bytes == 2**34
    assert profile.dtype == "bfloat16"
    assert "both" in profile.curves
    assert min(profile.host_s_per_chunk, profile.host_s_per_layer) > 0
    assert {point.x for point in profile.gemm.points} >= {(1.0, 64.0, 64.0)}
    assert {point.x for point in profile.attention.points} >= {(2.0**17,)}


def test_a_full_profile(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = _Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    heard: list[str] = []
    profile = measure_hardware("cuda", thoroughness="full", progress=lambda what, share: heard.append(what))
    _finds_everything(profile)
    assert {"h2d_pageable", "d2h_pageable", "both_pageable"} <= set(profile.curves)
    assert {"gemm_power_w", "h2d_power_w"} <= set(profile.quantities)
    assert nvml.asked == "00000000:1b:00.0"
    assert {"link", "link, pageable memory", "energy"} <= set(heard)
    assert device.registered == {}
    assert device.memory.allocated_bytes == 0


def test_a_quick_profile_is_found_again_for_any_name_of_the_device(device: FakeCuda) -> None:
    profile = stored.load_or_measure()
    _finds_everything(profile)
    for name in ("auto", "cuda", "cuda:0", torch.device("cuda", 0)):
        assert stored.load_or_measure(name).created == profile.created
    assert not any(point.spread_fraction < 0 for point in profile.gemm.points)


@pytest.mark.slow
def test_a_profile_where_nothing_can_be_pinned(device: FakeCuda) -> None:
    device.lockable_bytes = 0
    with pytest.warns(UserWarning, match="could not pin"):
        profile = measure_hardware("cuda", thoroughness="full")
    assert profile.extra["pinned"] is False
    assert not any(name.endswith("_pageable") for name in profile.curves)  # that is what `h2d` is


# ---- the benchmarks ------------------------------------------------------------------------------------------------


def test_a_cap_on_memory_holds_during_a_cell_and_goes_with_it(device: FakeCuda) -> None:
    made = Lab(PRESETS["opt-6.7b"])
    cell: Cell = replace(cells.CELLS[CELLS[0]], device_memory_gb=4.0)
    with campaign._memory_cap(cell, made.device):
        assert device.memory.fraction == pytest.approx(4e9 / 2**34)
    assert device.memory.fraction == 1.0


def test_steps_are_measured_beside_what_was_planned(device: FakeCuda) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    dims = facts_of(config | {"num_hidden_layers": 2, "vocab_size": 96})
    found = measured_run.measure_run(dims, Workload(batch=2, prompt_tokens=64, new_tokens=8, num_beams=1))
    assert not found.is_emulated
    assert found.device_name == fake_cuda.NAME
    assert len(found.step_s) > 3
    assert {span.lane for span in found.measured.spans} >= {"h2d", "attention"}


def _commands(results: Path) -> list[list[str]]:
    """What scripts/gpu_suite.sh would run, after the interpreter."""
    run = subprocess.run(
        ["bash", "scripts/gpu_suite.sh", "--tier", "2", "--dry-run", "--quick", "--results", str(results)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line.split(" writes ")[1].split(maxsplit=1)[1])[1:] for line in run.stdout.splitlines()]


def _run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    is_module = arguments[0] == "-m"
    monkeypatch.setattr(sys, "argv", arguments[is_module:])
    program = arguments[is_module]
    with pytest.raises(SystemExit) as ended:
        (runpy.run_module if is_module else runpy.run_path)(program, run_name="__main__")
    assert not ended.value.code


@pytest.mark.slow  # the second tier; the first is run whole in tests/test_gpu_suite.py
def test_every_step_of_the_suite_for_a_gpu(
    device: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    commands = _commands(tmp_path)
    tests = [command for command in commands if command[1] == "pytest"]
    assert all((ROOT / word).is_file() for command in tests for word in command if word.startswith("tests/"))
    for command in commands:
        if command[1] != "pytest" and "scripts/bench_kernels.py" not in command:
            _run(command, monkeypatch)
    assert fake_cuda.NAME in capsys.readouterr().out
    rows = {name: load(tmp_path / f"{name}.csv") for name in ("transfer", "decode", "ablation")}
    for found in rows.values():
        assert {row["device"] for row in found} == {fake_cuda.NAME}
        assert all(row["link"].startswith("measured pinned") for row in found)
    assert {row["provider"] for row in rows["decode"]} >= {"full_transfer", "kvpr", "planned"}
    measured, skipped = {}, {}
    for row in load(tmp_path / "campaign.csv"):
        (skipped if row["metric"] == "skipped" else measured).setdefault(row["provider"], set()).add(row["x"])
    for name in ("on_device", "hf_offloaded", "full_transfer", "sequential", "kvpr", "planned"):
        assert measured[name] == set(CELLS), skipped.get(name)
    assert measured["whole_layer_both_ways"] == {CELLS[0], CELLS[2]}  # not for beams
    profile = HardwareProfile.load(tmp_path / "profile.json")
    assert profile.device_name == fake_cuda.NAME


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of infinities
def test_the_benchmark_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    script = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "bench_kernels.py"), run_name="bench_kernels"))
    scope: dict[str, Any] = script.measure.__globals__
    tiny = {"hidden": 32, "q_heads": 4, "head_dim": 16, "batch": 1, "cached_tokens": 16, "chunk_tokens": 16}
    shapes = {
        name: replace(shape, kv_heads=2 if shape.kv_heads < shape.q_heads else 4, **tiny)
        for name, shape in script.ON_CUDA.items()
    }
    timed = script.timed
    monkeypatch.setattr(clock, "LEAST_CALLS", 1)
    monkeypatch.setitem(scope, "ON_CUDA", shapes)
    monkeypatch.setitem(scope, "timed", lambda call, device, repeats: timed(call, device, 1))
    with fake_cuda.fake_cuda() as fake:
        found = script.measure("cuda", False)
        assert fake.streams.calls["kernel"] > 50
    assert {row["provider"] for row in found} == {"ours", "sdpa", "sdpa_token_major", "copy", "mm_rope", "fused", "mm"}
    assert {row["x"] for row in found} == set(shapes)
    assert {row["device"] for row in found} == {fake_cuda.NAME}
    assert script.table(found).row_count == len(found)
