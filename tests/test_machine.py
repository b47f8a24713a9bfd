"""Presets and files of the same form: complete, plausible, labelled; bad ones named with the way out."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvoffload.errors import ProfileError
from kvoffload.machine import datasheet
from kvoffload.machine.datasheet import Datasheet, preset, preset_names
from kvoffload.machine.dtypes import BITS
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.machine import find_machine, find_profile, machine_of

RECORDED = Path(__file__).parent / "data" / "profile_emulated_2_threads.json"
# figures a reader can check against the vendors' pages: half precision TFLOP/s dense, GB, GB/s, watts
KNOWN = {
    "v100-32gb-sxm2": (125, 32, 900, 300),
    "t4-16gb-pcie3": (65, 16, 320, 70),
    "a100-40gb-pcie4": (312, 40, 1555, 250),
    "a100-80gb-pcie4": (312, 80, 1935, 300),
    "a100-40gb-sxm4": (312, 40, 1555, 400),
    "a100-80gb-sxm4": (312, 80, 2039, 400),
    "a6000-48gb-pcie4": (154.8, 48, 768, 300),
    "l4-24gb-pcie4": (121, 24, 300, 72),
    "l40s-48gb-pcie4": (362, 48, 864, 350),
    "rtx3090-24gb-pcie4": (71, 24, 936, 350),
    "rtx4090-24gb-pcie4": (165.2, 24, 1008, 450),
    "rtx5090-32gb-pcie5": (209.5, 32, 1792, 575),
    "h100-80gb-pcie5": (756, 80, 2000, 350),
    "h100-80gb-sxm5": (989, 80, 3350, 700),
    "h200-pcie5": (989, 141, 4800, 700),
    "b200-180gb-pcie5": (2250, 180, 7700, 1000),
    "gh200-96gb-c2c": (989, 96, 4000, 1000),
    "mi210-64gb-pcie4": (181, 64, 1638, 300),
    "mi300x-192gb-pcie5": (1307.4, 192, 5300, 750),
}


def minimal(**changes: Any) -> dict[str, Any]:
    """A user's file, complete but for what may be left out."""
    data = preset("a100-40gb-pcie4").to_json()
    for name in ("provenance", "source", "price_per_hour", "link_generation", "link_lanes"):
        del data[name]
    return data | changes


def test_the_known_devices_are_there_with_their_figures() -> None:
    assert set(KNOWN) <= set(preset_names())
    for name, (tflops, memory_gb, memory_gb_per_s, power_w) in KNOWN.items():
        sheet = preset(name)
        assert sheet.peak_flops_per_s[sheet.dtype] == pytest.approx(tflops * 1e12)
        assert sheet.peak_flops_per_s["float16"] == pytest.approx(tflops * 1e12)
        assert sheet.memory_bytes == memory_gb * 10**9
        assert sheet.memory_bytes_per_s == pytest.approx(memory_gb_per_s * 1e9)
        assert sheet.power_w == power_w


@pytest.mark.parametrize("name", preset_names())
def test_every_number_of_a_preset_is_plausible_and_says_where_it_comes_from(name: str) -> None:
    sheet = preset(name)
    peaks = sheet.peak_flops_per_s
    assert peaks["float32"] < peaks["float16"]
    assert all(peaks[dtype] >= peaks["float16"] for dtype in peaks if BITS[dtype] <= 8 and "v100" not in name)
    assert ("bfloat16" in peaks) == (name.partition("-")[0] not in ("v100", "t4"))
    if sheet.link_generation is not None:
        assert sheet.link_lanes == 16
        assert sheet.link_name == f"PCIe {sheet.link_generation}.0 x16"
        assert sheet.link_nominal_bytes_per_s == 2 ** (sheet.link_generation - 3) * 16e9
    share = sheet.link_achievable_bytes_per_s / sheet.link_nominal_bytes_per_s
    assert 0.75 < share < 0.9
    named = {field.partition(".")[0] for field in sheet.provenance}
    numbers = {"peak_flops_per_s", "memory_bytes", "memory_bytes_per_s", "link_nominal_bytes_per_s", "power_w"}
    assert named >= numbers | {"link_achievable_bytes_per_s"}
    assert sheet.provenance_of("memory_bytes") == "datasheet"
    assert sheet.provenance_of("link_achievable_bytes_per_s") in ("measured", "assumed")
    assert sheet.source
    assert sheet.price_per_hour is None  # a user's number
    assert len(dataclasses.fields(sheet)) <= 14


def test_provenance_may_differ_by_dtype() -> None:
    sheet = preset("v100-32gb-pcie3")
    assert sheet.provenance_of("peak_flops_per_s", "float16") == "datasheet"
    assert sheet.provenance_of("peak_flops_per_s", "int8") == "assumed"
    assert sheet.provenance_of("nothing said") == "assumed"


def test_a_preset_and_its_profile_are_the_same_machine() -> None:
    for name in preset_names():
        profile = HardwareProfile.preset(name)
        assert HardwareProfile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
        assert machine_of(profile) == find_machine(name)
        assert find_profile(name) == profile


def test_operands_narrower_than_any_unit_compute_at_the_next_wider_one() -> None:
    a100 = find_machine("a100-40gb-pcie4")
    assert [a100.flops_per_s(bits) / 1e12 for bits in (4, 8, 16, 32)] == [1248, 624, 312, 19.5]
    h200 = find_machine("h200-pcie5")
    assert [h200.compute_bits(bits) for bits in (3, 4, 6, 8, 12, 16, 64)] == [8, 8, 8, 8, 16, 16, 32]


def test_a_measured_profile_is_a_machine_with_fits(tmp_path: Path) -> None:
    machine = find_machine(RECORDED)
    assert set(machine.fits) == {"gemm", "attention"}
    profile = HardwareProfile.load(RECORDED)
    best = max(2 * math.prod(point.x) / point.seconds for point in profile.gemm.points)
    assert machine.peak_flops_per_s == {32: best}
    assert machine.link_bytes_per_s == pytest.approx(0.15e9, rel=0.01)
    assert machine.provenance["peak_flops_per_s"] == "measured"
    assert machine.provenance["link_bytes_per_s"] == "assumed"
    assert machine.power_w is None
    unpaced = dataclasses.replace(profile, h2d=None)
    assert machine_of(unpaced).link_bytes_per_s == math.inf
    assert not find_machine("h200-pcie5").fits


def test_a_users_file_has_the_form_of_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(minimal(device_name="Mine", price_per_hour=1.5)))
    machine = find_machine(path)
    assert (machine.device_name, machine.price_per_hour) == ("Mine", 1.5)
    assert machine.provenance["memory_bytes_per_s"] == "assumed"  # nothing was said
    products = find_profile(path).gemm
    assert products.points == HardwareProfile.preset("a100-40gb-pcie4").gemm.points
    assert products.provenance == "assumed"


def test_a_users_file_may_be_like_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"schema_version": 1, "like": "a100-40gb-pcie4", "memory_bytes": 20e9}))
    machine = find_machine(path)
    assert machine == dataclasses.replace(find_machine("a100-40gb-pcie4"), memory_bytes=20 * 10**9)
    assert datasheet.read(json.loads(path.read_text()), source="it").provenance_of("memory_bytes") == "assumed"
    with pytest.raises(ProfileError, match="unknown hardware preset 'a101'"):
        datasheet.read({"schema_version": 1, "like": "a101"}, source="it")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("a100", "near: a100-40gb-pcie4, a100-40gb-sxm4, a100-80gb-pcie4, a100-80gb-sxm4; known: "),
        ("H100", "near: h100-80gb-pcie5, h100-80gb-sxm5; known: "),
        ("rtx4090", "near: rtx4090-24gb-pcie4"),
        ("h200-pcie4", "near: h200-pcie5"),
        ("xyz", "preset 'xyz'; known: a100-40gb-pcie4"),
    ],
)
def test_an_unknown_preset_lists_the_near_ones(name: str, near: str) -> None:
    with pytest.raises(ProfileError) as caught:
        find_machine(name)
    assert near in str(caught.value)
    assert "path of a file" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "rtx4090-24gb-pcie4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24gb-pcie4"),
        ("l4", "l4-24gb-pcie4"),  # not the L40S
        ("A100 40GB PCIe", "a100-40gb-pcie4"),
        ("H100 PCIe", "h100-80gb-pcie5"),
        ("h200", "h200-pcie5"),
        ("v100-32gb-sxm2", "v100-32gb-sxm2"),
    ],
)
def test_a_person_may_leave_out_of_a_name_what_no_other_preset_has(text: str, name: str) -> None:
    assert datasheet.preset_named(text) == name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a100", "several presets like 'a100'; near: a100-40gb-pcie4, a100-40gb-sxm4, a100-80gb-pcie4, a100-80gb-sxm4"),
        ("h10", "unknown hardware preset 'h10'; known: a100-40gb-pcie4, "),  # no beginning of h100
        ("h200-pcie4", "near: h200-pcie5, h100-80gb-pcie5, a100-80gb-pcie4; `kvoffload hardware` lists them all"),
        ("", "unknown hardware preset ''; known: "),
    ],
)
def test_what_means_no_preset_or_several_lists_the_near_ones(text: str, told: str) -> None:
    with pytest.raises(ProfileError) as caught:
        datasheet.preset_named(text)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (minimal(schema_version=2), "schema version 2, this release reads 1"),
        ({"like": "a100-40gb-pcie4"}, "schema version None"),
        (minimal(colour="green"), "unknown fields colour; known: device_name"),
        ({"schema_version": 1, "peak_flops_per_s": {"float16": 1e14}}, "lacks device_name, dtype"),
        (minimal(memory_bytes_per_s=1555), "memory_bytes_per_s is 1555, but must be bytes per second"),
        (minimal(memory_bytes=4e16), "memory_bytes is 4e+16, but must be bytes"),
        (minimal(memory_bytes=-1), "memory_bytes is -1, but must be bytes"),
        (minimal(power_w=0), "power_w is 0, but must be watts"),
        (minimal(power_w="250 W"), "power_w is '250 W'"),
        (minimal(power_w=True), "power_w is True"),
        (minimal(price_per_hour=-2), "price_per_hour is -2"),
        (minimal(memory_bytes_per_s=math.nan), "memory_bytes_per_s is nan"),
        (minimal(peak_flops_per_s={"float16": 312}), "peak_flops_per_s.float16 is 312, but must be operations"),
        (minimal(peak_flops_per_s=312e12), "must give a peak by dtype"),
        (minimal(peak_flops_per_s={}), "must give a peak by dtype"),
        (minimal(peak_flops_per_s={"float16": 1e14, "int3": 1e14}), "unknown dtypes int3; known: float32"),
        (minimal(dtype="bfloat17"), "dtype is 'bfloat17', but peak_flops_per_s gives no peak for it"),
        (minimal(link_achievable_bytes_per_s=33e9), "exceeds link_nominal_bytes_per_s"),
        (minimal(provenance={"power_w": "guessed"}), "provenance of power_w is 'guessed'; known: measured"),
        (minimal(provenance="guessed"), "provenance must name"),
        ([1], "neither a profile"),
        ({"schema_version": 1}, "is damaged"),
        ({"schema_version": 1, "gemm": 1}, "is damaged"),
        ({"schema_version": 7, "gemm": 1}, "schema version 7, this release reads 1"),
    ],
)
def test_a_bad_file_is_named_with_the_way_out(data: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    for find in (find_machine, find_profile):
        with pytest.raises(ProfileError) as caught:
            find(path)
        assert str(path) in str(caught.value)
        assert message in str(caught.value)


def test_an_unreadable_or_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    with pytest.raises(ProfileError, match="no profile file .*mine.json"):
        find_machine(path)
    path.write_text("{")
    with pytest.raises(ProfileError, match="cannot read the hardware profile .*mine.json"):
        find_machine(path)
    with pytest.raises(ProfileError, match="must hold an object"):
        Datasheet.from_json([], source="it")


def test_finding_a_preset_loads_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; from kvoffload.machine.machine import find_machine; find_machine('h200-pcie5'); "
        "print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
