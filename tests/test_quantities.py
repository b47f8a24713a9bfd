"""Numbers that say what they are: the line through the copies of a link."""

from __future__ import annotations

from typing import Any

import pytest

from kvoffload.errors import ProfileError
from kvoffload.machine.quantities import Curve, Point

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
