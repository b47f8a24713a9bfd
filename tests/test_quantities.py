"""Numbers that say what they are: units, spreads, provenances, and the line through the copies of a link."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kvoffload.errors import ProfileError
from kvoffload.types import Curve, HardwareProfile, Point, Quantity

RECORDED = Path(__file__).parent / "data" / "profile_emulated_2_threads.json"
SIZES = [4.0**step * 4096 for step in range(10)]


def copies(latency_s: float, bytes_per_s: float, provenance: Any = "measured", **changed: float) -> Curve:
    """Points on a line; `last`: a factor on the largest."""
    points = [Point((size,), latency_s + size / bytes_per_s, 0.01) for size in SIZES]
    points[-1] = points[-1]._replace(seconds=points[-1].seconds * changed.get("last", 1.0))
    return Curve(unit="bytes", points=tuple(points), provenance=provenance)


def test_a_large_copy_that_is_off_does_not_hide_the_latency_of_small_ones() -> None:
    line = copies(9e-6, 25e9, last=1.1).line()  # 4 ms off, 450 latencies
    assert line.latency_s == pytest.approx(9e-6, rel=0.1)
    assert line.bytes_per_s == pytest.approx(25e9, rel=0.1)
    assert 0.03 < line.error_fraction < 0.1
    assert line.seconds(2**20) == pytest.approx(9e-6 + 2**20 / 25e9, rel=0.1)


def test_a_latency_below_zero_is_none_and_one_point_is_a_rate() -> None:
    assert copies(-1e-9, 25e9).line().latency_s == 0.0
    assert copies(-1e-9, 25e9).line().bytes_per_s == pytest.approx(25e9, rel=0.01)
    alone = Curve(unit="bytes", points=(Point((100.0,), 2.0, 0.0),))
    assert alone.line() == (0.0, 50.0, 0.0)
    level = Curve(unit="bytes", points=(Point((100.0,), 2.0, 0.0), Point((200.0,), 2.0, 0.0)))
    assert level.line().latency_s == 0.0  # no bandwidth is infinite
    with pytest.raises(ProfileError, match="no points"):
        Curve(unit="bytes", points=()).line()


def profile(**changes: Any) -> HardwareProfile:
    recorded = HardwareProfile.load(RECORDED)
    quantities = recorded.quantities | {"host_read_bytes_per_s": Quantity(value=5e10, unit="bytes/s")}
    curves = {"both": copies(1e-5, 20e9), "host_attention_float32": copies(0.0, 1e10)}
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
    other = copies(0.0, 1e9, "assumed")
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
