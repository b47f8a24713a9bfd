"""Machines that are not here: a profile from a handful of datasheet figures, the form of `presets.json`.

Owns the arithmetic from figures to curves. Does not claim achieved rates: every curve has provenance "datasheet", so a
plan made from it is an upper bound on the device's side. The link is the exception that matters most: nominal PCIe
bandwidth is never reached, so the *achievable* pinned-memory bandwidth is used and said beside the nominal one.

    GEMM       max(2*m*n*k / peak, bytes of both operands and the result / memory bandwidth)
    attention  bytes of K/V / memory bandwidth
    copies     bytes / achievable link bandwidth, no latency

Source: the roofline model (Williams et al. 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.profiler.compute import ATTENTION_BYTES, ROWS, WEIGHTS
from kvoffload.profiler.link import GIVEN_SIZES_BYTES
from kvoffload.types import Curve, HardwareProfile, Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Datasheet:
    """The figures a profile is made from. Bandwidths are bytes/s in each direction."""

    device_name: str
    link_name: str
    dtype: str
    itemsize_bytes: int
    peak_flops_per_s: float  # dense, at `dtype`
    memory_bytes: int
    memory_bytes_per_s: float
    link_nominal_bytes_per_s: float
    link_achievable_bytes_per_s: float
    source: str


def datasheet_profile(sheet: Datasheet) -> HardwareProfile:
    """The profile of a machine that does what its datasheet says, over its link as pinned copies achieve it."""

    def gemm_s(m: int, n: int, k: int) -> float:
        moved_bytes = (m * k + k * n + m * n) * sheet.itemsize_bytes
        return max(2 * m * n * k / sheet.peak_flops_per_s, moved_bytes / sheet.memory_bytes_per_s)  # multiply-add

    def curve(sizes: tuple[int, ...], bytes_per_s: float) -> Curve:
        return Curve(
            unit="bytes", points=tuple(_point(size, size / bytes_per_s) for size in sizes), provenance="datasheet"
        )

    link = curve(GIVEN_SIZES_BYTES, sheet.link_achievable_bytes_per_s)
    gemm = tuple(
        Point((float(m), float(size), float(size)), gemm_s(m, size, size), 0.0)
        for size in WEIGHTS["cuda"]
        for m in ROWS
    )
    return HardwareProfile(
        device_name=sheet.device_name,
        link_name=sheet.link_name,
        emulated_link=False,
        key=f"{sheet.device_name} | datasheet",
        h2d=link,
        d2h=link,
        gemm=Curve(unit="m,n,k", points=gemm, provenance="datasheet"),
        attention=curve(ATTENTION_BYTES["cuda"], sheet.memory_bytes_per_s),
        device_copy_bytes_per_s=sheet.memory_bytes_per_s,
        device_memory_bytes=sheet.memory_bytes,
        dtype=sheet.dtype,
        extra={
            "provenance": {
                "device_copy_bytes_per_s": "datasheet",
                "host_s_per_layer": "assumed",
                "host_s_per_chunk": "assumed",
                "gap_s": "assumed",
            },
            "peak_flops_per_s": sheet.peak_flops_per_s,
            "itemsize_bytes": sheet.itemsize_bytes,
            "link_nominal_bytes_per_s": sheet.link_nominal_bytes_per_s,
            "link_achievable_bytes_per_s": sheet.link_achievable_bytes_per_s,
            "note": "peaks are the datasheet's; the link curve is the bandwidth that pinned copies achieve "
            f"({sheet.link_achievable_bytes_per_s / 1e9:g} GB/s of {sheet.link_nominal_bytes_per_s / 1e9:g} nominal)",
            "source": sheet.source,
        },
    )


def datasheet_of(profile: HardwareProfile) -> Datasheet:
    """Inverse of `datasheet_profile`."""
    return Datasheet(
        device_name=profile.device_name,
        link_name=profile.link_name,
        dtype=profile.dtype,
        itemsize_bytes=profile.extra["itemsize_bytes"],
        peak_flops_per_s=profile.extra["peak_flops_per_s"],
        memory_bytes=profile.device_memory_bytes,
        memory_bytes_per_s=profile.device_copy_bytes_per_s,
        link_nominal_bytes_per_s=profile.extra["link_nominal_bytes_per_s"],
        link_achievable_bytes_per_s=profile.extra["link_achievable_bytes_per_s"],
        source=profile.extra["source"],
    )


def _point(size: int, seconds: float) -> Point:
    return Point((float(size),), seconds, 0.0)
