"""Measuring a link, in simulated time: what a curve says of it, what is left out, and what is told."""

from __future__ import annotations

import pytest
import torch
from replay import ReplayedLink

from kvoffload.backend import EmulatedBackend
from kvoffload.config import EmulatedLink
from kvoffload.profiler import copies, link
from kvoffload.profiler.budget import BUDGETS, ProgressParts, lengths

PCIE = {"h2d": 25e9, "d2h": 20e9}


def steps(told: list[tuple[str, float]] | None = None) -> ProgressParts:
    parts = lengths(BUDGETS["full"], has_link=True, is_paced=True, has_meter=False)
    return ProgressParts(lambda what, share: told.append((what, share)) if told is not None else None, parts)


def measure(backend: ReplayedLink, **options: object) -> link.LinkCurves:
    full = {"sizes_bytes": link.ALL_SIZES_BYTES, "budget_s": 9.0, "max_copy_s": 0.5, "clock": backend.clock}
    return link.measure_link(backend, **(full | options))  # type: ignore[arg-type]


def test_the_line_through_the_copies_of_each_direction_is_the_links_latency_and_bandwidth() -> None:
    backend = ReplayedLink(PCIE, latency_s=9e-6)
    found = measure(backend)
    for way, curve in (("h2d", found.h2d), ("d2h", found.d2h)):
        assert [point.x[0] for point in curve.points] == [4.0**step * 4096 for step in range(10)]  # to 1 GiB
        line = curve.line()
        assert line.latency_s == pytest.approx(9e-6)
        assert line.bytes_per_s == pytest.approx(PCIE[way])
        assert line.error_fraction < 1e-6
    assert found.pinned
    assert found.noisy == ()
    assert backend.num_held == 0


@pytest.mark.parametrize(("is_shared", "seconds"), [(False, 2**30 / 20e9), (True, 2**30 / 20e9 + 2**30 / 25e9)])
def test_both_at_once_takes_as_long_as_the_slower_direction_or_as_both_where_they_share(
    is_shared: bool, seconds: float
) -> None:
    found = measure(ReplayedLink(PCIE, is_shared=is_shared))
    assert found.both.points[-1].x == (2.0**30,)
    assert found.both.points[-1].seconds == pytest.approx(seconds)
    assert found.h2d.points[-1].seconds == pytest.approx(2**30 / 25e9)  # each alone


def test_both_at_once_keeps_sources_and_destinations_apart() -> None:
    backend = ReplayedLink(PCIE)
    measure(backend, sizes_bytes=(2**14,), rotation_bytes=2**16)
    assert backend.offsets == {0, 2**14, 2 * 2**14, 3 * 2**14}  # all of it is used
    copier = link._Copier(backend, "both", torch.zeros(2**16, dtype=torch.uint8), torch.zeros(2), lambda: 0.0)
    assert copier.sources.storage_offset() + copier.sources.numel() == copier.destinations.storage_offset()


def test_the_budget_holds_and_sizes_that_would_not_fit_in_it_are_left_out() -> None:
    backend = ReplayedLink({"h2d": 1e8, "d2h": 5e7})
    found = measure(backend, budget_s=3.0, max_copy_s=60.0)
    assert backend.now_s < 3.5
    assert 2**18 <= found.h2d.points[-1].x[0] < 2**26  # 64 MiB take 0.67 s
    assert backend.largest_bytes == max(found.h2d.points[-1].x[0], found.d2h.points[-1].x[0])


def test_copies_that_take_long_are_left_out_however_much_time_there_is() -> None:
    found = measure(ReplayedLink({"h2d": 1e8, "d2h": 5e7}), budget_s=600.0, max_copy_s=0.05)
    assert found.h2d.points[-1].x == (2.0**22,)  # 16 MiB would take 0.17 s
    assert found.d2h.points[-1].x == (2.0**20,)


def test_a_size_whose_trials_disagree_is_named() -> None:
    backend = ReplayedLink(PCIE)
    backend.slowed = [1.0, 9.0] * 500
    found = measure(backend, sizes_bytes=(2**28,), budget_s=0.3)
    assert any(name.startswith("h2d 268435456 bytes (spread") for name in found.noisy)
    assert found.h2d.points[0].spread_fraction > 0.5


def test_pageable_memory_is_not_the_backends_and_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ReplayedLink(PCIE, can_pin=False)
    monkeypatch.setattr(link, "_pageable", backend.allocate_device)
    backend.slowed = [1.0, 9.0] * 500
    found = measure(backend, pageable=True, sizes_bytes=(2**28,), budget_s=0.3)
    assert backend.host_bytes == []
    assert not found.pinned
    assert found.noisy[0].startswith("h2d pageable 268435456 bytes")
    assert set(found.named("_pageable")) == {"h2d_pageable", "d2h_pageable", "both_pageable"}


def test_host_memory_is_given_back_where_the_device_has_none() -> None:
    backend = ReplayedLink(PCIE, is_full=True)
    with pytest.raises(torch.OutOfMemoryError):
        measure(backend)
    assert backend.host_bytes
    assert backend.num_held == 0


# ---- which copies are made ---------------------------------------------------------------------------------------


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory on both sides, and simulated time for every measurement."""
    monkeypatch.setattr(copies.system_memory, "available_bytes", lambda: 2**36)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    monkeypatch.setattr(link, "_pageable", lambda num: torch.empty(num, dtype=torch.uint8, device="meta"))
    real = link.measure_link
    monkeypatch.setattr(copies, "measure_link", lambda one, **options: real(one, **options, clock=one.clock))


@pytest.mark.usefixtures("plenty")
def test_in_full_a_gpu_is_measured_from_pinned_and_pageable_memory_up_to_one_gibibyte() -> None:
    told: list[tuple[str, float]] = []
    found = copies.measure_copies(ReplayedLink(PCIE), BUDGETS["full"], steps(told))
    assert set(found.others) == {"both", "h2d_pageable", "d2h_pageable", "both_pageable"}
    assert found.h2d is not None
    for curve in (found.h2d, *found.others.values()):
        assert curve.points[-1].x == (2.0**30,)
        assert curve.provenance == "measured"
    assert [what for what, _ in told] == ["link"] * 4 + ["link, pageable memory"] * 4
    assert [share for _, share in told] == sorted(share for _, share in told)


@pytest.mark.usefixtures("plenty")
def test_quickly_only_what_plans_need_is_measured() -> None:
    found = copies.measure_copies(ReplayedLink(PCIE), BUDGETS["quick"], steps())
    assert set(found.others) == {"both"}
    assert found.h2d is not None
    assert found.h2d.points[-1].x == (2.0**26,)


@pytest.mark.usefixtures("plenty")
def test_where_nothing_can_be_pinned_the_pageable_rate_is_the_links_and_measured_once() -> None:
    found = copies.measure_copies(ReplayedLink(PCIE, can_pin=False), BUDGETS["full"], steps())
    assert not found.pinned
    assert set(found.others) == {"both"}


@pytest.mark.usefixtures("plenty")
def test_copies_leave_most_of_the_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 2**36))
    backend = ReplayedLink(PCIE)
    copies.measure_copies(backend, BUDGETS["full"], steps())
    assert backend.largest_bytes == 2**26


def test_a_slow_emulated_link_is_measured_with_small_copies_and_a_hopeless_one_not_at_all() -> None:
    slow, _ = copies.given_curves(EmulatedLink(h2d_gb_per_s=1e-3))
    assert slow is not None
    assert copies._emulated_sizes(slow, slow) == [2**12, 2**14]  # 64 KiB take 0.066 s
    backend = EmulatedBackend(EmulatedLink(h2d_gb_per_s=1.0, latency_s=1.0))
    try:
        found = copies.measure_copies(backend, BUDGETS["full"], steps())
        assert backend.link_use("h2d").copies == 0
    finally:
        backend.close()
    assert found.others == {}
    assert found.h2d is not None
    assert found.h2d.provenance == "assumed"
