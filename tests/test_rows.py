"""What a person reads of a profile: rates with their spread, latencies, and what was not measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.quantities import Curve, Point, Quantity
from kvoffload.profiler.fact_rows import profile_rows

RECORDED = Path(__file__).parent / "data" / "profile_emulated_2_threads.json"


def copies(bytes_per_s: float, latency_s: float, spread: float) -> Curve:
    sizes = [4.0**step * 4096 for step in range(10)]
    points = tuple(Point((size,), latency_s + size / bytes_per_s, spread) for size in sizes)
    return Curve(unit="bytes", points=points)


def rows(**changes: Any) -> dict[str, str]:
    return dict(profile_rows(dataclasses.replace(HardwareProfile.load(RECORDED), **changes)))


def test_a_gpus_link_reads_as_bandwidth_with_spread_and_latency() -> None:
    curves = {
        "both": copies(20e9, 12e-6, 0.03),
        "h2d_pageable": copies(4.2e9, 15e-6, 0.2),
        "host_attention_bfloat16": copies(0.02e9, 0.0, 0.0),
    }
    extra = HardwareProfile.load(RECORDED).extra | {"pinned": True}
    shown = rows(
        emulated_link=False,
        link_name="PCIe 4.0 x16",
        h2d=copies(25.1e9, 9e-6, 0.02),
        d2h=copies(26e9, 9.4e-6, 0.004),
        curves=curves,
        extra=extra,
    )
    assert shown["pinned H2D"] == "25.1 GB/s ± 1 %, latency 9.0 us (4 KiB to 1 GiB)"
    assert shown["pinned D2H"] == "26.0 GB/s ± 0.2 %, latency 9.4 us (4 KiB to 1 GiB)"
    assert shown["pinned both at once"] == "20.0 GB/s ± 2 % each way, latency 12 us (4 KiB to 1 GiB)"
    assert shown["pageable H2D"] == "4.20 GB/s ± 10 %, latency 15 us (4 KiB to 1 GiB)"
    assert shown["attention on the host, bfloat16"] == "0.0200 GB/s ± 0.1 % over 1 GiB of K/V"
    assert "pageable D2H" not in shown


def test_what_is_given_is_not_shown_as_measured() -> None:
    shown = rows(curves={"h2d_achieved": copies(0.148e9, 2e-4, 0.01)})
    assert shown["link"] == "emulated 0.15 GB/s"
    assert shown["emulated H2D"] == "0.15 GB/s, latency 0 us (assumed)"
    assert shown["emulated H2D, achieved"].startswith("0.15 GB/s ± 0.5 %, latency 200 us (4 KiB")
    assert "2 ms (assumed) between steps" in shown["host time"]
    assert "±" in shown["matrix product"]
    assert "at recompute, MLP shapes" not in shown  # none was measured then
    points = (*HardwareProfile.load(RECORDED).gemm.points, Point((64.0, 1024.0, 512.0), 1e-5, 0.02))
    shown = rows(gemm=Curve(unit="m,n,k", points=points))
    assert shown["at recompute, MLP shapes"] == "6.7 TFLOP/s ± 1 % at 64x1024x512, float32"
    assert "GFLOP/s" in shown["matrix product"]
    assert rows(h2d=None, d2h=None)["H2D, D2H"].startswith("no speed")
    assert "pinned" not in "".join(name for name, _ in profile_rows(HardwareProfile.load(RECORDED)) if "H2D" in name)


def test_a_line_that_does_not_fit_says_so() -> None:
    bent = copies(25e9, 9e-6, 0.02)
    points = tuple(point._replace(seconds=point.seconds * (1 + idx % 2)) for idx, point in enumerate(bent.points))
    shown = rows(curves={"h2d_achieved": dataclasses.replace(bent, points=points)})
    assert "a line within" in shown["emulated H2D, achieved"]
    assert shown["emulated H2D, achieved"].endswith("; 12.5 GB/s at 1 GiB)")  # what large copies get all the same


def test_energy_is_watts_or_the_reason_there_are_none() -> None:
    recorded = HardwareProfile.load(RECORDED)
    power = Quantity(value=243.6, unit="W", spread_fraction=0.04)
    copying = Quantity(value=88.0, unit="W", spread_fraction=0.02)
    shown = rows(quantities=recorded.quantities | {"gemm_power_w": power, "h2d_power_w": copying})
    assert shown["energy"] == "244 W ± 2 % for matrix products, 88 W ± 1 % for copies to the device"
    assert rows(extra=recorded.extra | {"energy": "not available: no GPU"})["energy"] == "not available: no GPU"
    assert rows()["energy"] == "not measured"  # a file from before


def test_a_long_list_of_noisy_points_is_cut_and_counted() -> None:
    recorded = HardwareProfile.load(RECORDED)
    assert rows()["noisy"] == "nothing"
    noisy = [f"gemm {idx} (spread 1.00)" for idx in range(9)]
    shown = rows(extra=recorded.extra | {"noisy": noisy})["noisy"]
    assert shown.endswith("gemm 4 (spread 1.00); and 4 more")


def test_a_preset_can_be_shown_as_well() -> None:
    shown = dict(profile_rows(HardwareProfile.preset("a100-40gb-pcie4")))
    assert shown["pinned H2D"] == "25.6 GB/s, latency 0 us (assumed)"
    assert "±" not in "".join(shown.values())
