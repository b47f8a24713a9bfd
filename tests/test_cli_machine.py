"""`kvoffload env` and `kvoffload profile`: what they show, and where a profile is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import DISTURBANCE, RECORDED, run, run_badly, run_well
from commands import cache_fixture as cache_fixture
from commands import model_fixture as model_fixture

from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.profiler import fact_rows, profile, stored


def test_env_shows_the_link_in_use_against_its_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvoffload.profiler import environment

    facts = {
        "gpu_name": "NVIDIA A100",
        "pcie_generation": 3,
        "pcie_generation_max": 4,
        "pcie_width": 8,
        "pcie_width_max": 16,
        "gpu_numa_node": 1,
    }
    monkeypatch.setattr(environment, "gpu_facts", lambda device=None: environment.NO_GPU | facts)
    text = run_well("env")
    assert "3 in use, 4 at most" in text
    assert "8 in use, 16 at most" in text
    assert "NUMA node of the GPU" in text
    assert "ulimit -l" in text or "no limit" in text
    data = json.loads(run_well("env", "--json"))
    assert data["pcie_width_max"] == 16
    assert data["gpu_numa_node"] == 1


def test_env_says_what_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvoffload.profiler import environment

    monkeypatch.setattr(environment, "gpu_facts", lambda device=None: dict(environment.NO_GPU))
    lines = [line for line in run_well("env").splitlines() if "PCIe" in line or "NUMA" in line]
    assert len(lines) == 3
    assert all("not available" in line and "in use" not in line for line in lines)
    assert json.loads(run_well("env", "--json"))["pcie_generation"] is None


def test_profile_prints_and_keeps_what_it_measured(cache: Path) -> None:
    text = run_well("profile", "--link-gb-per-s", 0.5, "--latency-us", 100)
    assert "emulated 0.5 GB/s" in text
    assert "(assumed)" in text
    assert "GFLOP/s" in text
    assert "PCIe lanes" in text
    assert len(list(cache.glob("*.json"))) == 1


def test_profile_as_json_is_a_profile_file(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.json"
    path.write_text(run_well("profile", "--json"))
    assert HardwareProfile.load(path).gemm == HardwareProfile.load(RECORDED).gemm


def test_profile_of_an_unpaced_link_says_it_has_no_speed(cache: Path) -> None:
    from kvoffload.config import EmulatedLink

    assert profile.with_link(HardwareProfile.load(RECORDED), EmulatedLink()).h2d is None
    unpaced = fact_rows.profile_rows(profile.with_link(HardwareProfile.load(RECORDED), EmulatedLink()))
    assert dict(unpaced)["H2D, D2H"].startswith("no speed")


def test_profile_goes_where_output_says_and_a_bad_place_is_an_error(cache: Path, tmp_path: Path) -> None:
    result = run("profile", "--output", tmp_path / "p.json")
    assert result.exit_code == 0
    assert result.stderr == f"stored in {tmp_path / 'p.json'}\n"  # and no progress bar: this is no terminal
    assert not cache.exists()
    assert HardwareProfile.load(tmp_path / "p.json").emulated_link
    assert "--output" in run_badly("profile", "--output", tmp_path / "p.json" / "below.json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("profile --output nowhere/p.json", "--output: cannot write nowhere/p.json: there is no folder nowhere"),
        ("profile --output .", "--output: cannot write .: Is a directory; choose another file"),
        ("profile", "cannot keep a profile in /proc/none/kvoffload: "),
        ("report --config CONFIG --measure --output nowhere/r.html", "--output: cannot write nowhere/r.html"),
        ("report --config CONFIG --measure --trace nowhere/t.json", "--trace: cannot write nowhere/t.json"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_measured(
    line: str, message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    monkeypatch.setattr(profile, "measure_hardware", measure)
    monkeypatch.setattr(stored, "measure_hardware", measure)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert message in run_badly(*line.replace("CONFIG", str(model)).split())
    assert not list(Path().iterdir())


def test_looking_whether_a_file_can_be_written_changes_nothing(model: Path, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("before")
    run_badly("profile", "--output", path, "--latency-us", 100)
    assert path.read_text() == "before"
    run_badly("profile", "--output", tmp_path / "new.json", "--latency-us", 100)
    assert not (tmp_path / "new.json").exists()


def test_profile_refuses_a_link_without_speed_and_an_unknown_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "above zero" in run_badly("profile", "--link-gb-per-s", 0)
    assert "'cuda'" in run_badly("profile", "--device", "toaster")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "use device='cpu' (--device cpu)" in run_badly("profile", "--device", "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    message = run_badly("profile", "--device", "cuda", "--link-gb-per-s", 1)
    assert "(--device cpu)" in message
    assert "(no --link-gb-per-s)" in message


def test_profile_measures_in_full_unless_it_shall_be_quick(cache: Path) -> None:
    assert json.loads(run_well("profile", "--json"))["extra"]["thoroughness"] == "full"
    assert json.loads(run_well("profile", "--quick", "--json"))["extra"]["thoroughness"] == "quick"


def test_a_latency_without_a_speed_is_refused_and_the_stored_profile_stays(cache: Path) -> None:
    run_well("profile", "--link-gb-per-s", 0.5)
    (path,) = cache.glob("*.json")
    before = path.read_text()
    message = run_badly("profile", "--latency-us", 100)
    assert "--latency-us 100 needs --link-gb-per-s" in message
    assert path.read_text() == before


def test_a_doubtful_profile_is_shown_but_not_stored(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_well("profile", "--link-gb-per-s", 0.5)
    (path,) = cache.glob("*.json")
    before = path.read_text()
    monkeypatch.setitem(DISTURBANCE, "other_cpu_load_fraction", 0.62)
    result = run("profile", "--link-gb-per-s", 2)
    assert result.exit_code == 2
    assert "emulated 2 GB/s" in result.stdout
    assert result.stderr.startswith("kvoffload: not stored, since other work kept 0.62 of the CPUs busy (at most 0.25")
    assert "--force" in result.stderr
    assert "--output" in result.stderr
    assert path.read_text() == before


def test_a_doubtful_profile_is_kept_on_demand_and_said_to_be_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DISTURBANCE, "noisy", [f"gemm {idx} (spread 0.90)" for idx in range(30)])
    for arguments, path in (
        (["--force"], None),
        (["--output", tmp_path / "p.json"], tmp_path / "p.json"),
    ):
        result = run("profile", *arguments)
        assert result.exit_code == 0
        assert "this profile is doubtful: the trials of 30 of" in result.stderr
        assert f"stored in {path or cache}" in result.stderr
    assert len(list(cache.glob("*.json"))) == 1


def test_the_latency_is_said_in_the_unit_it_is_given_in() -> None:
    message = run_badly("profile", "--link-gb-per-s", 1, "--latency-us", -1)
    assert "--latency-us must be a number of microseconds from 0 to 1e+06, got -1.0" in message
