"""Where a profile comes from: the cache, a measurement, a file or a preset; and what is told when it does not fit."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from kvoffload.config import EmulatedLink
from kvoffload.errors import ProfileError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.machine import find_profile
from kvoffload.profiler import stored
from kvoffload.profiler.device import machine_key, resolve_device
from kvoffload.profiler.profile import METHOD

RECORDED = Path(__file__).parent / "data" / "profile_emulated_2_threads.json"


@pytest.fixture
def key() -> str:
    return machine_key(resolve_device("cpu", "auto"))


@pytest.fixture
def mine(key: str) -> HardwareProfile:
    """A profile as if measured here, without the time it takes."""
    recorded = HardwareProfile.load(RECORDED)
    extra = recorded.extra | {"other_cpu_load_fraction": 0.0}
    return dataclasses.replace(recorded, key=key, h2d=None, d2h=None, extra=extra, method=METHOD)


@pytest.fixture
def measurements(mine: HardwareProfile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """An empty cache folder; counts the measurements made."""
    calls: list[object] = []

    def measure(device: object, link: object, *, thoroughness: str = "quick", **_options: object) -> HardwareProfile:
        assert thoroughness == "quick"  # the work waits for it
        calls.append(link)
        return mine

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stored, "measure_hardware", measure)
    return calls


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert stored.cache_folder() == tmp_path / "kvoffload"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert stored.cache_folder() == tmp_path / "home" / ".cache" / "kvoffload"


def test_a_machine_is_measured_once_with_a_message_and_read_afterwards(
    measurements: list[object], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = stored.load_or_measure("cpu")
    assert "measuring this machine once, up to 20 s" in caplog.text
    assert stored.profile_path(key).exists()
    caplog.clear()
    assert stored.load_or_measure("cpu") == first
    assert len(measurements) == 1
    assert not caplog.text
    assert [path.suffix for path in stored.cache_folder().iterdir()] == [".json"]  # nothing half-written


def test_an_emulated_link_is_put_before_the_stored_machine_and_not_stored(measurements: list[object], key: str) -> None:
    for speed in (0.5, 2.0):
        profile = stored.load_or_measure("cpu", EmulatedLink(h2d_gb_per_s=speed))
        assert profile.h2d is not None
        assert profile.h2d.rate(2**20) == pytest.approx(speed * 1e9)
    assert measurements == [EmulatedLink()]
    assert HardwareProfile.load(stored.profile_path(key)).h2d is None


def test_a_profile_of_another_version_is_told_kept_and_not_used(
    measurements: list[object], mine: HardwareProfile, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = dataclasses.replace(mine, key=key.rpartition(" | ")[0] + " | torch 1.0")
    old_path = stored.store(old)
    assert stored.load_or_measure("cpu").key == key
    assert len(measurements) == 1
    assert "is stale" in caplog.text
    assert "torch 1.0" in caplog.text
    assert HardwareProfile.load(old_path) == old


def test_a_profile_measured_in_an_earlier_way_is_told_and_measured_again(
    measurements: list[object], mine: HardwareProfile, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = mine.to_json()
    del data["method"]  # as in files from before there was a second way
    stored.profile_path(key).parent.mkdir()
    stored.profile_path(key).write_text(json.dumps(data))
    with pytest.raises(ProfileError, match="no profile of this machine"):
        stored.load("cpu")
    assert stored.load_or_measure("cpu").method == METHOD
    assert "is stale" in caplog.text
    assert stored.load_or_measure("cpu").method == METHOD
    assert len(measurements) == 1


def test_a_file_that_holds_another_machine_is_told_and_measured_again(
    measurements: list[object], mine: HardwareProfile, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = stored.profile_path(key)
    dataclasses.replace(mine, key="someone else's").save(path)
    assert stored.load_or_measure("cpu").key == key
    assert len(measurements) == 1
    assert "someone else's" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"gemm"', '"mmeg"'),
        lambda text: text.replace('"schema_version": 1', '"schema_version": 99'),
        lambda text: "[]",
    ],
    ids=["cut off", "field missing", "other schema", "no profile"],
)
def test_a_damaged_file_is_named_and_never_measured_over(
    damage: object, measurements: list[object], mine: HardwareProfile
) -> None:
    path = stored.store(mine)
    text = damage(path.read_text())  # type: ignore[operator]
    path.write_text(text)
    with pytest.raises(ProfileError, match="kvoffload profile") as caught:
        stored.load_or_measure("cpu")
    assert str(path) in str(caught.value)
    assert measurements == []
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written_is_told_and_does_not_stop_the_work(
    measurements: list[object], tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kvoffload").write_text("a file where the folder should be")
    assert stored.load_or_measure("cpu").key == key
    assert "could not store" in caplog.text


def test_a_measurement_that_other_work_disturbed_is_used_and_not_kept(
    measurements: list[object], mine: HardwareProfile, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    mine.extra["other_cpu_load_fraction"] = 0.8
    assert stored.load_or_measure("cpu") == mine
    assert "not stored, since other work kept 0.80 of the CPUs busy" in caplog.text
    assert "--force" in caplog.text
    assert not stored.profile_path(key).exists()


def test_a_measurement_with_too_many_noisy_points_is_not_kept_and_one_with_a_few_is(
    measurements: list[object], mine: HardwareProfile, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    num_points = len(mine.gemm.points) + len(mine.attention.points) + 2  # host times
    noisy = [f"gemm {idx} (spread 0.7{idx % 10})" for idx in range(num_points // 2)]
    mine.extra["noisy"] = noisy
    stored.load_or_measure("cpu")
    assert f"the trials of {len(noisy)} of {num_points} points disagree (gemm 0 (spread 0.70)" in caplog.text
    assert not stored.profile_path(key).exists()
    mine.extra["noisy"] = noisy[: num_points // 5]
    assert stored.reason_not_to_keep(mine) is None
    stored.load_or_measure("cpu")
    assert stored.profile_path(key).exists()


def test_other_work_on_the_host_does_not_disturb_the_measurement_of_a_gpu(mine: HardwareProfile) -> None:
    mine.extra["other_cpu_load_fraction"] = 0.8
    assert stored.reason_not_to_keep(mine) is not None
    assert stored.reason_not_to_keep(dataclasses.replace(mine, emulated_link=False)) is None


def test_a_profile_is_found_by_preset_name_or_by_path(tmp_path: Path) -> None:
    assert find_profile("a100-40gb-pcie4").link_name == "PCIe 4.0 x16"
    assert find_profile(RECORDED).emulated_link
    with pytest.raises(ProfileError, match="a100-40gb-pcie4"):
        find_profile("b300")
    with pytest.raises(ProfileError, match="no profile file"):
        find_profile(tmp_path / "missing.json")


def test_a_given_profile_is_taken_and_one_of_another_machine_is_told(
    measurements: list[object], caplog: pytest.LogCaptureFixture, mine: HardwareProfile, tmp_path: Path
) -> None:
    assert stored.resolve_profile(mine) is mine
    mine.save(tmp_path / "mine.json")
    assert stored.resolve_profile(tmp_path / "mine.json", "cpu") == mine
    assert not caplog.text
    stored.resolve_profile("a100-40gb-pcie4", "cpu")
    assert "another machine" in caplog.text
    assert measurements == []
    assert stored.resolve_profile("auto", "cpu") == mine
    assert len(measurements) == 1


def test_the_recorded_profile_is_labelled_and_can_plan() -> None:
    profile = HardwareProfile.load(RECORDED)
    assert profile.emulated_link
    assert profile.link_name == "emulated 0.15 GB/s"
    assert profile.h2d is not None
    assert profile.h2d.provenance == "assumed"
    assert profile.gemm.provenance == "measured"
    assert profile.extra["noisy"] == []
    assert 1e10 < profile.gemm_flops_per_s(512, 512, 512) < 1e12
    json.dumps(profile.to_json())


def test_nothing_is_logged_above_information_when_all_is_well(
    measurements: list[object], mine: HardwareProfile, caplog: pytest.LogCaptureFixture
) -> None:
    stored.store(mine)
    with caplog.at_level(logging.WARNING):
        stored.load_or_measure("cpu")
    assert caplog.records == []
