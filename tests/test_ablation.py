"""The ablation: every variant is the product with one part off, and the factors multiply to the whole gain."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from campaign import ablation
from campaign.ablation import FACTORS, FULL, Found, Setting, Variant, factors, settings, variants
from kvoffload.bench import PRESETS, Lab
from kvoffload.machine.hardware_profile import HardwareProfile

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def measured() -> tuple[list[dict[str, str]], list[Any]]:
    """The quick ablation of the small shape, on a recorded machine."""
    recorded = HardwareProfile.load(Path(__file__).parent / "data" / "profile_emulated_2_threads.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "load_or_measure", lambda: recorded)
        return ablation.run("cpu-small", new_tokens=5, rounds=1, quick=True, tell=lambda _: None)


def _values(rows: list[dict[str, str]], metric: str, x: str) -> dict[str, float]:
    return {row["provider"]: float(row["p50"]) for row in rows if row["metric"] == metric and row["x"] == x}


def test_all_variants_are_measured_and_compared_with_everything_on(measured: Any) -> None:
    rows, tables = measured
    plain = rows[0]["x"]
    steps = _values(rows, "decode_step", plain)
    assert {variant.name for variant in variants(Lab(PRESETS["cpu-small"]))} < set(steps)
    ratio = _values(rows, "step_over_everything_on", plain)
    assert ratio[FULL] == 1
    assert ratio["scheduler off"] == pytest.approx(steps["scheduler off"] / steps[FULL], rel=1e-4)
    assert "gain over the traffic" in str(tables[0].caption)
    assert {row["x"] for row in rows} == {
        f"{link}, {memory} memory, {load} cores"
        for link, memory, load in (
            ("slow link", "min", "idle"),
            ("fast link", "min", "idle"),
            ("slow link", "half", "idle"),
            ("slow link", "min", "loaded"),
        )
    }


def test_one_token_blocks_are_written_at_every_step_and_whole_layers_in_both_directions(measured: Any) -> None:
    rows, _ = measured
    written = _values(rows, "d2h_bytes", rows[0]["x"])
    p = PRESETS["cpu-small"]
    token_bytes = p.layers * p.batch * 2 * p.hidden * 4  # keys and values, float32
    assert written["full_transfer"] == pytest.approx(p.cached_tokens * token_bytes, rel=1e-5)  # the prompt, in blocks
    assert written["whole_layer_fetched"] == pytest.approx(p.cached_tokens * token_bytes, rel=1e-5)
    steps = range(p.cached_tokens, p.cached_tokens + 5)
    assert written["whole_layer_both_ways"] == pytest.approx(sum(steps) * token_bytes, rel=1e-5)
    assert written["write-back per step"] != written[FULL]


def test_half_the_cache_on_the_device_shortens_the_step_of_a_link_bound_plan(measured: Any) -> None:
    rows, _ = measured
    moved = {x: _values(rows, "decode_step", x) for x in {row["x"] for row in rows}}
    assert moved["slow link, half memory, idle cores"][FULL] < moved["slow link, min memory, idle cores"][FULL]


def test_the_factors_multiply_to_the_whole_gain() -> None:
    def found(seconds: float) -> Found:
        return Found([seconds], None, None, None)

    steps = {"whole_layer_both_ways": 8.0, "whole_layer_fetched": 6.0, "full_transfer": 4.0, FULL: 2.0}
    shown = factors({name: found(seconds) for name, seconds in steps.items()})
    assert list(shown) == list(FACTORS)
    assert shown == {"write-back": 8.0 / 6.0, "overlap": 6.0 / 4.0, "split": 4.0 / 2.0}
    assert factors({FULL: found(1.0)}) == {}


def test_without_quick_every_combination_of_link_memory_and_load_is_measured() -> None:
    lab = Lab(PRESETS["cpu-small"])
    assert len(set(settings(lab, quick=False))) == 8
    assert settings(lab, quick=False)[0] == settings(lab, quick=True)[0] == Setting("slow link", "min", "idle")


def test_parts_are_off_as_their_names_say() -> None:
    changes = {one.name: (one.mode, one.changes) for one in variants(Lab(PRESETS["cpu-small"]))}
    assert changes[FULL] == ("planned", {})
    assert changes["profiler off"] == ("planned", {"split": 0.5})
    assert changes["scheduler off"] == ("sequential", {})
    assert changes["runtime off"] == ("sequential", {"slots": 1})
    assert changes["full_transfer"] == ("full_transfer", {})


def test_two_steps_are_not_counted_and_idle_is_what_is_not_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = SimpleNamespace(
        decode_step_s=[9.0, 9.0, 1.0, 2.0, 3.0], device_busy_fraction=0.25, link_utilization=0.9, d2h_bytes=5
    )
    monkeypatch.setattr(ablation, "steps", lambda *args: stats)
    lab: Any = SimpleNamespace(config=lambda *args, **kwargs: None)
    found = ablation._measure(lab, None, [Variant(FULL, "planned", {})], 5, 1, with_factors=False)  # type: ignore[arg-type]
    assert found == {FULL: Found([1.0, 2.0, 3.0], 0.75, 0.9, 5.0)}


def test_settings_have_their_link_their_memory_and_their_load(monkeypatch: pytest.MonkeyPatch) -> None:
    least_bytes, is_busy, seen = 1000, [False], []

    @contextlib.contextmanager
    def busy() -> Iterator[None]:
        is_busy[0] = True
        yield
        is_busy[0] = False

    def measure(lab: Lab, profile: Any, chosen: list[Variant], *args: Any, **kwargs: Any) -> dict[str, Found]:
        seen.append((lab.bytes_per_s, chosen[0].changes.get("device_gib"), is_busy[0]))
        half.append((least_bytes + ablation._cache_bytes(lab) / 2) / 2**30)
        return {}

    half: list[float] = []
    warm = SimpleNamespace(device_kv_peak_decode_bytes=least_bytes, device_kv_peak_prefill_bytes=10)
    monkeypatch.setattr(ablation, "load_or_measure", lambda: "recorded")
    monkeypatch.setattr(Lab, "config", lambda *args, **kwargs: None)
    monkeypatch.setattr(ablation, "steps", lambda *args: warm)
    monkeypatch.setattr(ablation, "_busy_cores", busy)
    monkeypatch.setattr(ablation, "_measure", measure)
    ablation.run("cpu-small", new_tokens=5, rounds=1, quick=True, tell=lambda _: None)
    slow, fast = seen[0][0], seen[1][0]
    assert fast == pytest.approx(3.3 * slow, abs=1e6)  # whole MB/s
    assert seen == [(slow, None, False), (fast, None, False), (slow, half[0], False), (slow, None, True)]


def test_loaded_means_a_busy_process_for_every_core_and_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        started.append(real(command))
        return started[-1]

    monkeypatch.setattr(ablation.subprocess, "Popen", start)
    with ablation._busy_cores():
        assert len(started) == os.cpu_count()
        assert all(process.poll() is None for process in started)
    assert all(process.poll() is not None for process in started)


def test_busy_cores_end_with_a_benchmark_that_is_killed() -> None:
    script = (
        "import os, signal, subprocess\n"
        "from campaign import ablation\n"
        "started, begin = [], subprocess.Popen\n"
        "ablation.subprocess.Popen = lambda *a, **k: started.append(begin(*a, **k)) or started[-1]\n"
        "with ablation._busy_cores():\n"
        "    print(*(one.pid for one in started), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=SCRIPTS) as killed:
        assert killed.stdout is not None
        alive = [int(word) for word in killed.stdout.readline().split()]
        assert killed.wait() == -signal.SIGKILL
    assert len(alive) == os.cpu_count()
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in alive if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive


def _runs(pid: int) -> bool:
    """Whether a process computes still; one that ended and was not waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
