"""Tier 1 of the suite for a GPU: its steps, whatever becomes of one, and how long they would take."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_cuda
import gpu_suite
import pytest
import torch

from campaign.rows import load
from gpu import ready, rehearsal, smoke, steps, worker
from gpu.steps import STEPS, Step, Suite
from kvoffload.bench import presets
from kvoffload.kernels import reference
from kvoffload.machine.hardware_profile import HardwareProfile

ROOT = Path(__file__).parents[1]


def _suite(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "gpu_suite.sh"), *options]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


# ---- the list ------------------------------------------------------------------------------------------------------


def test_tier_1_comes_in_the_order_of_its_worth_and_leaves_time_for_tests() -> None:
    lines = _suite("--dry-run").stdout.splitlines()
    order = ("smoke", "profile", "opt-6.7b", "llama-3.1-8b", "llama-2-7b", "offloaded cache", "kernels", "tests")
    assert [line.split("  ")[-1].strip() for line in lines] == [*order, "sanitizer"]
    assert all(line.startswith("up to ") and " s  writes " in line for line in lines)
    measuring_s = sum(step.limit_s for step in STEPS if step.writes != "-")
    assert steps.START_S + measuring_s <= steps.TIER_1_S - 30
    files = {step.writes for step in STEPS} - {"-"} | {"steps.csv"}
    assert len(files) <= 8


@pytest.mark.parametrize(
    "options",
    [
        *(["--tier", "3"], ["--tier"], ["--wheels"], ["--nothing"]),
        *(["--quick"], ["--fresh", "--tier", "1"], ["--tier", "2", "--steps", "smoke"]),
    ],
)
def test_an_option_that_cannot_be_is_told_how_it_is_used(options: list[str]) -> None:
    done = _suite(*options)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: scripts/gpu_suite.sh")


def test_steps_that_are_not_there_and_a_folder_without_wheels_are_told(tmp_path: Path) -> None:
    done = _suite("--steps", "smoke,nothing", "--results", str(tmp_path))
    assert done.returncode == 2
    assert "unknown steps nothing; known: smoke, profile" in done.stderr
    done = _suite("--wheels", str(tmp_path))
    assert (done.returncode, done.stderr) == (2, f"gpu_suite: no wheels (*.whl) in {tmp_path}\n")


def test_a_device_that_cannot_be_measured_costs_no_minute(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_cuda.fake_cuda(total_bytes=24 * 10**9) as fake:
        assert ready.main() == 0
        fake.memory.others_bytes = 20 * 10**9
        fake.lockable_bytes = 0
        assert ready.main() == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[:3] for line in told] == [
        ["gpu_suite:", "other", "processes"],
        ["gpu_suite:", "host", "memory"],
    ]


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pulp", None)
    assert ready.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu_suite: the package pulp cannot be imported (")
    assert line.endswith("install it, or its wheel with --wheels DIR")


# ---- the watch -----------------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
steps, results, pipe = sys.argv[2].split(","), sys.argv[4], int(sys.argv[6])
open(results + "/workers", "a").write("began " + sys.argv[2] + chr(10))
def say(**message): os.write(pipe, (json.dumps(message) + chr(10)).encode())
for step in steps:
    if step == "not ready": sys.exit(2)
    if step == "no import": sys.exit(1)
    say(begin=step)
    open(f"{results}/{step}.csv", "w").write("a row")
    if step == "hangs":
        open(results + "/decode.partial", "w")
        if os.fork() == 0: open(results + "/child", "w").write(str(os.getpid()))
        time.sleep(60)
    if step == "crashes": os.kill(os.getpid(), 11)
    say(end=step, seconds=1.0, outcome="ValueError: so" if step == "fails" else "ended well")
    if step == "loses": sys.exit(3)
"""


def _watch(names: list[str], folder: Path, *, lasts_s: float = 60.0) -> tuple[int, dict[str, str], list[str]]:
    """Exit code, outcomes as steps.csv has them, and which workers were begun for what."""
    made = [Step(name, 0.3, "-", lambda suite: None) for name in names]
    watch = gpu_suite.Watch(made, folder, time.time() + lasts_s, [sys.executable, "-c", WORKER])
    code = watch.run()
    with (folder / "steps.csv").open(newline="") as file:
        outcomes = {row["step"]: row["outcome"] for row in csv.DictReader(file)}
    assert outcomes == watch.outcomes
    workers = folder / "workers"
    return code, outcomes, workers.read_text().splitlines() if workers.exists() else []


@pytest.fixture
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "GRACE_S", 0.2)


@pytest.mark.usefixtures("_no_grace")
def test_whatever_a_step_does_the_next_has_its_turn_and_what_it_wrote_stays(tmp_path: Path) -> None:
    names = ["one", "hangs", "two", "crashes", "fails", "loses", "three"]
    code, outcomes, workers = _watch(names, tmp_path)
    assert code == 1
    assert outcomes["hangs"].startswith("ended after ")
    assert outcomes["crashes"] == "its process died with -11"
    assert outcomes["fails"] == "ValueError: so"
    assert all(outcomes[name] == "ended well" for name in ("one", "two", "loses", "three"))
    assert workers == [
        *("began one,hangs,two,crashes,fails,loses,three", "began two,crashes,fails,loses,three"),
        *("began fails,loses,three", "began three"),
    ]
    assert all((tmp_path / f"{name}.csv").read_text() == "a row" for name in names)
    assert not list(tmp_path.glob("*.partial"))
    child = int((tmp_path / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()


def test_all_steps_that_end_well_share_one_process(tmp_path: Path) -> None:
    assert _watch(["one", "two", "three"], tmp_path)[::2] == (0, ["began one,two,three"])


def test_a_device_that_is_not_ready_ends_it_and_so_does_a_process_that_cannot_begin(tmp_path: Path) -> None:
    assert _watch(["not ready", "one"], tmp_path) == (2, {}, ["began not ready,one"])
    code, outcomes, workers = _watch(["no import", "one"], tmp_path)
    assert code == 2
    assert outcomes == {"no import": "no process can begin it, the last one died with 1"}
    assert len(workers) == 2


@pytest.mark.usefixtures("_no_grace")
def test_what_the_time_is_too_short_for_is_noted(tmp_path: Path) -> None:
    _, outcomes, workers = _watch(["one", "hangs", "two"], tmp_path, lasts_s=0.35)
    assert outcomes["two"] == "no time left"
    assert len(workers) <= 1


def test_rows_that_were_told_are_there_when_the_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from campaign import rows\n"
        "for n in range(10**6):\n"
        "    rows.save(Path(sys.argv[1]), [rows.row('smoke', f'p{n}', 'rate', 'GB/s', 'x', [1.0], {'n': n}, 'none')])\n"
        "    print(n, flush=True)\n"
    )
    path = tmp_path / "smoke.csv"
    command = [sys.executable, "-c", code, str(path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}", "KVOFFLOAD_COMMIT": "abc1234"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(12)]
        process.send_signal(signal.SIGKILL)
    found = load(path)
    assert [json.loads(row["config_json"])["n"] for row in found][: len(told)] == told
    assert {row["commit"] for row in found} == {"abc1234"}


# ---- the steps -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[float]], Path]:
    """Expected seconds, and the folder of rows."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return rehearsal.rehearse(STEPS, folder), folder


def test_tier_1_fits_into_eight_minutes_and_its_first_row_comes_in_time(rehearsed: Any) -> None:
    found = rehearsed[0]
    assert max(found["first row"]) < rehearsal.FIRST_ROW_S
    assert max(found["all"]) < steps.TIER_1_S
    assert {step.name: found[step.name] for step in STEPS if max(found[step.name]) > step.limit_s} == {}
    assert min(found["opt-6.7b"]) > 10, "17 GB are pinned and moved: it cannot be as short as this"
    assert found["opt-6.7b"][0] < found["opt-6.7b"][1], "half the link takes longer"


def test_every_step_leaves_its_rows(rehearsed: Any) -> None:
    folder = rehearsed[1]
    rows = {name: load(folder / f"{name}.csv") for name in ("smoke", "decode", "campaign", "kernels")}
    assert {row["device"] for found in rows.values() for row in found} == {fake_cuda.NAME}
    told = [row["provider"] for row in rows["smoke"]]
    assert told[:3] == ["pin", "h2d", "d2h"]
    assert {"attention", "attention of beams", "merge", "finish", "rope", "linear_rope", "generate"} <= set(told)
    found = {(row["x"], row["provider"]) for row in rows["decode"]}
    modes = ("full_transfer", "planned")
    assert found == {
        *(("opt-6.7b-512", mode) for mode in (*modes, "sequential")),
        *((preset, mode) for preset in ("llama-3.1-8b", "llama-2-7b-512") for mode in modes),
    }
    measured = {row["provider"] for row in rows["campaign"] if row["metric"] != "skipped"}
    assert measured >= {"planned", "hf_offloaded", "full_transfer"}
    assert {row["provider"] for row in rows["kernels"]} >= {"ours", "sdpa", "mm_rope", "fused"}
    assert HardwareProfile.load(folder / "profile.json").device_name == fake_cuda.NAME


def test_a_step_that_fails_is_told_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(suite: Suite) -> None:
        raise RuntimeError("so\nand more")

    said: list[dict[str, Any]] = []
    with fake_cuda.fake_cuda():
        made = [Step("one", 5, "-", fails), Step("two", 5, "-", lambda suite: suite.tell(f"{suite.left_s():.0f} s"))]
        worker.run(made, tmp_path, said.append)
        assert [(one.get("begin"), one.get("end"), one.get("outcome")) for one in said] == [
            ("one", None, None),
            (None, "one", "RuntimeError: so"),
            ("two", None, None),
            (None, "two", "ended well"),
        ]
        assert "5 s" in capsys.readouterr().out

        def lost() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr("torch.cuda.synchronize", lost)
        with pytest.raises(SystemExit) as ended:
            worker.run(made[1:], tmp_path, said.append)
        assert ended.value.code == gpu_suite.CONTEXT_LOST
        assert said[-1]["outcome"] == "ended well"  # told before


def test_a_wrong_kernel_fails_the_smoke_step_after_all_rows_were_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finish = reference.finish

    def wrong(out: Any, lse: Any, result: Any, sinks: Any = None) -> None:
        finish(out, lse, result, sinks)
        if result.dtype.itemsize == 2:
            result[0, 0, 0, 0] = float("nan")  # in bfloat16 alone: not in float64, which is the truth

    with rehearsal.device():
        monkeypatch.setattr(reference, "finish", wrong)
        with pytest.raises(AssertionError, match="finish is off by nan"):
            smoke.run(tmp_path / "smoke.csv", lambda text: None)
    found = [row["provider"] for row in load(tmp_path / "smoke.csv")]
    assert found[-2:] == ["generate with drafts on 4-bit copies", "generate with streamed weights"]


def test_models_of_random_weights_are_made_on_the_device() -> None:
    copies = []
    with fake_cuda.fake_cuda() as fake:
        for layers in (1, 3):
            preset = replace(smoke.TINY, layers=layers)
            before = fake.streams.calls["copy"]
            model = presets.make_model(preset, torch.device("cuda", 0))
            copies.append(fake.streams.calls["copy"] - before)
            assert all(weight.is_cuda for weight in model.parameters())
    assert copies[0] == copies[1] <= 4, "weights of a layer were made on the host and copied"


def test_a_mode_that_would_run_over_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds_left = iter([50.0, 20.0])
    asked: list[list[str]] = []

    def run(preset: str, modes: list[str], *args: Any, on_row: Any, **kwargs: Any) -> None:
        asked.append(modes)
        for mode in modes:
            on_row({"mode": mode, "decode_step_s_p50": 0.1})

    saved: list[str] = []
    monkeypatch.setattr("kvoffload.bench.run", run)
    monkeypatch.setattr("bench_decode.save_csv", lambda preset, found, path: saved.append(found[0]["mode"]))
    monkeypatch.setattr(Suite, "profile", lambda self: None)
    with pytest.raises(steps.OutOfTime, match="20 s left, the modes of opt-6.7b take up to 30"):
        steps.decode("opt-6.7b", "full_transfer", "planned", "sequential")(Suite(tmp_path, lambda: next(seconds_left)))
    assert saved == ["full_transfer"]
