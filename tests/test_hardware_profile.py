"""A machine's profile: every number labelled, the same after a file, another link, and products between its shapes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kvoffload.errors import ProfileError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.quantities import Curve, Point, Quantity

RECORDED = Path(__file__).parent / "data" / "profile_emulated_2_threads.json"


def copies(bytes_per_s: float, provenance: Any = "measured") -> Curve:
    points = tuple(Point((size,), 1e-5 + size / bytes_per_s, 0.01) for size in (2.0**12, 2.0**20, 2.0**28))
    return Curve(unit="bytes", points=points, provenance=provenance)


def profile(**changes: Any) -> HardwareProfile:
    recorded = HardwareProfile.load(RECORDED)
    quantities = recorded.quantities | {"host_read_bytes_per_s": Quantity(value=5e10, unit="bytes/s")}
    curves = {"both": copies(20e9), "host_attention_float32": copies(1e10)}
    return dataclasses.replace(recorded, quantities=quantities, curves=curves, **changes)


def test_every_number_of_a_profile_file_has_a_unit_a_spread_and_a_provenance() -> None:
    data = json.loads(json.dumps(profile().to_json()))
    quantities = data["quantities"]
    assert {"device_copy_bytes_per_s", "host_s_per_chunk", "gap_s", "h2d_latency_s", "both_bytes_per_s"} <= set(
        quantities
    )
    for name, one in quantities.items():
        assert one["unit"], name
        assert one["provenance"] in ("measured", "datasheet", "assumed"), name
        assert "spread_fraction" in one, name
    assert quantities["host_s_per_chunk"]["provenance"] == "measured"
    assert quantities["host_s_per_chunk"]["spread_fraction"] > 0
    assert quantities["gap_s"] == {"value": 2e-3, "unit": "s", "spread_fraction": None, "provenance": "assumed"}
    assert quantities["h2d_bytes_per_s"]["provenance"] == "assumed"  # of an emulated link
    for curve in (data["h2d"], data["gemm"], data["attention"], *data["curves"].values()):
        assert curve["columns"] == [curve["unit"], "s", "spread_fraction"]
        assert curve["provenance"]


def test_a_profile_with_all_of_it_survives_the_way_through_a_file(tmp_path: Path) -> None:
    one = profile()
    one.save(tmp_path / "profile.json")
    again = HardwareProfile.load(tmp_path / "profile.json")
    assert again == one
    assert again.all_quantities() == one.all_quantities()


def test_a_file_from_before_quantities_keeps_its_labels() -> None:
    data = json.loads(RECORDED.read_text())
    assert "quantities" not in data
    assert "curves" not in data
    old = HardwareProfile.load(RECORDED)
    assert old.quantity("host_s_per_layer") == Quantity(
        value=data["host_s_per_layer"],
        unit="s",
        spread_fraction=data["extra"]["spread_fraction"]["host_s_per_layer"],
        provenance="measured",
    )
    assert old.quantity("gap_s").provenance == "assumed"
    assert old.curves == {}
    assert HardwareProfile.from_json(old.to_json()) == old


def test_a_number_that_was_changed_is_no_longer_measured() -> None:
    one = profile()
    assert one.quantity("device_copy_bytes_per_s").provenance == "measured"
    changed = dataclasses.replace(one, device_copy_bytes_per_s=1e9)
    assert changed.quantity("device_copy_bytes_per_s") == Quantity(value=1e9, unit="bytes/s", provenance="assumed")
    with pytest.raises(KeyError):
        one.quantity("number_of_wheels")


def test_behind_another_link_nothing_of_the_old_one_is_left() -> None:
    other = copies(1e9, "assumed")
    one = profile()
    one.quantities["h2d_power_w"] = Quantity(value=90.0, unit="W")
    moved = one.behind("another", other, other)
    assert moved.link_name == "another"
    assert set(moved.curves) == {"host_attention_float32"}
    assert moved.all_quantities()["h2d_bytes_per_s"].value == pytest.approx(1e9)
    assert not {"both_bytes_per_s", "h2d_power_w"} & set(moved.all_quantities())
    assert "host_read_bytes_per_s" in moved.all_quantities()


@pytest.mark.parametrize(
    "damage",
    [
        {"quantities": {"power_w": {"value": 1.0, "unit": "W", "spread_fraction": None, "provenance": "guessed"}}},
        {
            "quantities": {
                "power_w": {"value": float("nan"), "unit": "W", "spread_fraction": 0, "provenance": "assumed"}
            }
        },
        {"quantities": {"power_w": 3.0}},
        {"quantities": []},
        {"curves": {"both": {"unit": "bytes", "points": [[[1.0], -1.0, 0.0]], "provenance": "measured"}}},
        {"curves": {"both": {"unit": "bytes", "points": [], "provenance": "guessed"}}},
    ],
    ids=["provenance", "nan", "bare number", "list", "negative duration", "provenance of a curve"],
)
def test_damage_to_the_numbers_is_named(damage: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match="my file is damaged"):
        HardwareProfile.from_json(profile().to_json() | damage, source="my file")


@pytest.mark.parametrize(
    ("name", "peak", "memory_rate", "link_rate"),
    [("a100-40gb-pcie4", 312e12, 1555e9, 25.6e9), ("h200-pcie5", 989e12, 4.8e12, 55e9)],
)
def test_a_preset_is_what_its_datasheet_figures_say(
    name: str, peak: float, memory_rate: float, link_rate: float
) -> None:
    preset = HardwareProfile.preset(name)
    assert preset.h2d is not None
    assert preset.gemm.provenance == preset.attention.provenance == "datasheet"
    assert preset.h2d.provenance == "assumed"  # what pinned copies achieve stands in no datasheet
    labels = {name: one.provenance for name, one in preset.all_quantities().items()}
    assert labels["device_copy_bytes_per_s"] == labels["device_memory_bytes"] == "datasheet"
    assert labels["gap_s"] == labels["host_s_per_chunk"] == labels["h2d_bytes_per_s"] == "assumed"
    assert preset.h2d.rate(2**24) == pytest.approx(link_rate)
    assert preset.gemm_flops_per_s(8192, 4096, 4096) == pytest.approx(peak)
    assert preset.gemm_seconds(1, 4096, 4096) == pytest.approx(2 * 4096 * 4096 / memory_rate, rel=1e-3)  # reads weights
    assert "achieve" in preset.extra["note"]
    assert not preset.emulated_link


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ProfileError, match=r"a100-40gb-pcie4.*h200-pcie5"):
        HardwareProfile.preset("a100")


def test_a_product_between_measured_shapes_is_linear_in_rows_and_in_the_weight() -> None:
    points = tuple(Point((m, n, n), s, 0.0) for m, n, s in ((4.0, 8.0, 1.0), (8.0, 8.0, 3.0), (4.0, 64.0, 7.0)))
    some = HardwareProfile.preset("a100-40gb-pcie4")
    one = HardwareProfile.from_json(
        some.to_json() | {"gemm": {"unit": "m,n,k", "points": points, "provenance": "measured"}}
    )
    assert one.gemm_seconds(6, 8, 8) == pytest.approx(2.0)
    assert one.gemm_seconds(1, 8, 8) == pytest.approx(1.0)  # reading the weight takes as long for one row
    assert one.gemm_seconds(16, 8, 8) == pytest.approx(6.0)
    assert one.gemm_seconds(6, 16, 8) == pytest.approx(4.0)
    assert one.gemm_seconds(4, 64, 32) == pytest.approx(3.5)
    assert one.gemm_seconds(8, 24, 24) == pytest.approx(27.0)  # of the nearer weight only four rows were measured
    assert one.gemm_flops_per_s(6, 8, 8) == pytest.approx(2 * 6 * 64 / 2.0)
