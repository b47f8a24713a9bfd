"""Measuring: valid, complete, in time, and what is given is not measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from kvoffload.backend import EmulatedBackend
from kvoffload.backend.base import HostBuffer
from kvoffload.config import EmulatedLink
from kvoffload.errors import ConfigError, ProfileError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.quantities import Curve, Point, Quantity
from kvoffload.profiler import compute, host, host_memory, link, profile, trials, workbench
from kvoffload.profiler.profile import measure_hardware, with_link

pytestmark = pytest.mark.timing
QUICK_S, FULL_S = 15.0, 60.0
GIVEN = EmulatedLink(h2d_gb_per_s=0.5, d2h_gb_per_s=0.25, latency_s=1e-4)


class Measured(NamedTuple):
    profile: HardwareProfile
    took_s: float
    told: list[tuple[str, float]]
    same_random_numbers: bool


@pytest.fixture(scope="module")
def measured() -> Measured:
    told: list[tuple[str, float]] = []
    before = torch.random.get_rng_state()
    began = time.perf_counter()
    result = measure_hardware("cpu", GIVEN, progress=lambda what, share: told.append((what, share)))
    took_s = time.perf_counter() - began
    return Measured(result, took_s, told, torch.equal(before, torch.random.get_rng_state()))


# ---- trials ------------------------------------------------------------------------------------------------------


def test_trials_report_the_median_and_how_far_the_middle_lies_apart() -> None:
    result = trials.summarize([1.0, 2.0, 2.0, 2.0, 2.0, 4.0])
    assert result.seconds == 2.0
    assert result.spread_fraction == 0.0
    assert result.is_valid
    assert not trials.summarize([1.0, 1.0, 2.0, 3.0, 3.0]).is_valid


def test_many_trials_make_up_for_their_spread_but_not_for_two_different_speeds() -> None:
    spread = [1.0 + 0.04 * step for step in range(50)]  # p80 - p20 is 0.6 of the median
    assert trials.summarize(spread).is_valid
    assert not trials.summarize(spread[::12]).is_valid
    assert not trials.summarize([1.0] * 30 + [4.0] * 20).is_valid


def test_two_trials_are_never_valid() -> None:
    assert not trials.summarize([1.0, 1.0]).is_valid


def test_the_first_run_is_thrown_away_and_short_work_is_repeated_within_a_trial() -> None:
    asked: list[int] = []

    def burst(n: int) -> float:
        asked.append(n)
        return 100.0 if len(asked) == 1 else n * 1e-4

    result = trials.time_trials(burst, trial_s=2e-3, budget_s=0.01)
    assert result.seconds == pytest.approx(1e-4)
    assert asked[:2] == [1, 1]
    assert set(asked[2:]) == {20}
    assert trials.MIN_TRIALS <= result.num_trials <= trials.MAX_TRIALS


def test_of_two_rounds_the_undisturbed_one_is_kept() -> None:
    slow, fast = trials.Trials(2.0, 0.0, 5), trials.Trials(1.0, 0.1, 5)
    assert trials.better(slow, fast) is trials.better(fast, slow) is fast


# ---- the link ----------------------------------------------------------------------------------------------------


class CountingBackend(EmulatedBackend):
    """Counts host buffers that were not given back."""

    held = 0

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        self.held += 1
        return super().allocate_host(num_bytes)

    def release_host(self, buffer: HostBuffer) -> None:
        self.held -= 1


@pytest.fixture
def slow_link() -> Iterator[CountingBackend]:
    backend = CountingBackend(EmulatedLink(h2d_gb_per_s=0.1, d2h_gb_per_s=0.05))
    yield backend
    backend.close()


def test_the_measured_copy_rates_are_those_of_the_link_in_each_direction(slow_link: CountingBackend) -> None:
    curves = link.measure_link(slow_link, sizes_bytes=(2**18, 2**20), budget_s=2.0)
    for curve, asked_bytes_per_s in ((curves.h2d, 1e8), (curves.d2h, 5e7)):
        assert curve.provenance == "measured"
        assert [point.x for point in curve.points] == [(2.0**18,), (2.0**20,)]
        for point in curve.points:
            assert 0.8 * asked_bytes_per_s < point.x[0] / point.seconds < 1.01 * asked_bytes_per_s
    assert not curves.pinned
    assert slow_link.held == 0


def test_copies_that_would_take_too_long_are_left_out(slow_link: CountingBackend) -> None:
    curves = link.measure_link(slow_link, sizes_bytes=(2**18, 2**24), budget_s=8.0)  # 16 MiB: 0.17 s
    assert [point.x for point in curves.h2d.points] == [(2.0**18,)]


def test_copies_come_from_all_of_the_host_buffer(slow_link: CountingBackend) -> None:
    sources: set[int] = set()
    copy = slow_link.copy_to_device

    def spy(dst: torch.Tensor, src: torch.Tensor, after: object) -> object:
        sources.add(src.storage_offset())
        return copy(dst, src, ())

    slow_link.copy_to_device = spy  # type: ignore[method-assign, assignment]
    link.measure_link(slow_link, sizes_bytes=(2**14,), budget_s=0.2, rotation_bytes=2**16)
    assert sources == {0, 2**14, 2 * 2**14, 3 * 2**14}


# ---- compute and host --------------------------------------------------------------------------------------------


def test_operands_rotate_through_the_whole_pool() -> None:
    bench = workbench.Workbench(torch.device("cpu"), torch.float32, 4 * 2**18)  # 2**18 float32
    starts = [bench.take(2**16).data_ptr() for _ in range(5)]
    assert len(set(starts[:4])) == 4
    assert starts[4] == starts[0]


def test_points_whose_trials_disagree_are_timed_again_and_named_if_they_still_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(compute.POOL_BYTES, "cpu", 4 * 2**20)
    monkeypatch.setitem(compute.WEIGHTS, "cpu", ((64, 32),))
    monkeypatch.setitem(compute.ATTENTION_BYTES, "cpu", (2**17,))
    monkeypatch.setattr(compute, "ROWS", (1,))
    rounds: list[int] = []

    def noisy(burst: object, **_options: object) -> trials.Trials:
        rounds.append(1)
        return trials.Trials(1e-4, 9.0, 5)

    monkeypatch.setattr(workbench, "time_trials", noisy)
    result = compute.measure_compute(torch.device("cpu"), torch.float32)
    assert len(result.noisy) == 3
    assert any("gemm 1x64x32" in name and "9.00" in name for name in result.noisy)
    assert len(rounds) == 3 * workbench.MAX_ROUNDS


def test_the_host_costs_something_per_layer_and_per_chunk_more_than_queueing_its_copy() -> None:
    backend = EmulatedBackend(EmulatedLink())
    try:
        memory = backend.allocate_host(64).tensor
        began = time.thread_time()
        for _ in range(1000):
            backend.compute_waits(backend.copy_to_device(memory, memory, ()))
        queueing_s = (time.thread_time() - began) / 1000
        chunk = host.measure_host_s_per_chunk(backend, budget_s=0.1)
        layer = host.measure_host_s_per_layer(torch.device("cpu"), budget_s=0.1)
    finally:
        backend.close()
    assert 0 < layer.seconds < 0.1
    assert queueing_s < chunk.seconds < 0.01


# ---- the profile -------------------------------------------------------------------------------------------------


def test_a_quick_measurement_takes_less_than_fifteen_seconds_and_says_how_far_it_is(measured: Measured) -> None:
    assert measured.took_s < QUICK_S
    shares = [share for _, share in measured.told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.slow
def test_a_full_measurement_takes_less_than_a_minute_and_finds_more() -> None:
    began = time.perf_counter()
    full = measure_hardware("cpu", GIVEN, thoroughness="full")
    assert time.perf_counter() - began < FULL_S
    assert full.curves["h2d_achieved"].points[-1].x[0] >= 2**22
    assert len(full.curves["host_attention_float32"].points) >= 3
    assert full.extra["thoroughness"] == "full"


def test_the_users_random_numbers_are_left_alone(measured: Measured) -> None:
    assert measured.same_random_numbers


def test_every_duration_is_positive_and_larger_work_takes_longer(measured: Measured) -> None:
    gemm, attention = measured.profile.gemm, measured.profile.attention
    assert gemm.provenance == attention.provenance == "measured"
    assert all(point.seconds > 0 and point.spread_fraction >= 0 for point in (*gemm.points, *attention.points))
    weights = {point.x[1:] for point in gemm.points}
    assert len(weights) >= 4
    for weight in weights:
        rows = [point for point in gemm.points if point.x[1:] == weight]
        assert rows[0].seconds < rows[-1].seconds
        assert [point.x[0] for point in rows] == sorted(point.x[0] for point in rows)
    assert len(attention.points) >= 3
    assert attention.points[0].seconds < attention.points[-1].seconds


def test_a_profile_is_labelled_and_says_where_its_numbers_come_from(measured: Measured) -> None:
    result = measured.profile
    assert result.emulated_link
    assert result.link_name == "emulated 0.5 GB/s"
    assert result.dtype == "float32"
    assert torch.__version__ in result.key
    assert result.device_name in result.key
    assert result.device_memory_bytes > 0
    assert result.device_copy_bytes_per_s > 0
    labels = {name: (one.unit, one.provenance) for name, one in result.all_quantities().items()}
    assert labels["gap_s"] == ("s", "assumed")
    assert labels["host_s_per_chunk"] == labels["host_s_per_layer"] == ("s", "measured")
    assert labels["device_copy_bytes_per_s"] == labels["host_read_bytes_per_s"] == ("bytes/s", "measured")
    assert labels["h2d_bytes_per_s"] == ("bytes/s", "assumed")
    assert 0 < result.extra["measured_in_s"] <= measured.took_s + 0.01  # rounded
    assert result.extra["environment"]["pcie_generation"] is None or torch.cuda.device_count()


def test_the_speed_of_an_emulated_link_is_given_not_measured(measured: Measured) -> None:
    for curve, bytes_per_s in ((measured.profile.h2d, 5e8), (measured.profile.d2h, 2.5e8)):
        assert curve is not None
        assert curve.provenance == "assumed"
        for size in (2**12, 2**20 + 17, 2**30):
            assert curve.seconds(size) == pytest.approx(1e-4 + size / bytes_per_s, rel=1e-9)


def test_what_copies_over_an_emulated_link_achieve_stands_beside_what_it_was_given(measured: Measured) -> None:
    curves = measured.profile.curves
    for name, bytes_per_s in (("h2d_achieved", 5e8), ("d2h_achieved", 2.5e8), ("both_achieved", 2.5e8)):
        assert curves[name].provenance == "measured"
        last = curves[name].points[-1]
        assert last.x[0] >= 2**20
        assert 0.7 * bytes_per_s < last.x[0] / (last.seconds - 1e-4) < 1.01 * bytes_per_s  # the latency is given
    assert {"h2d_achieved_bytes_per_s", "both_achieved_latency_s"} <= set(measured.profile.all_quantities())
    other = with_link(measured.profile, EmulatedLink(h2d_gb_per_s=2.0))
    assert not any(name.endswith("_achieved") for name in other.curves)  # of the link before


def test_host_memory_is_read_and_attended_to(measured: Measured) -> None:
    read = measured.profile.quantity("host_read_bytes_per_s")
    assert read.unit == "bytes/s"
    assert read.value > 1e9
    assert read.spread_fraction is not None
    for dtype in ("float32", "bfloat16"):
        curve = measured.profile.curves[f"host_attention_{dtype}"]
        assert curve.points
        assert curve.points[-1].x[0] / curve.points[-1].seconds < 1.5 * read.value  # it reads them all


def test_products_have_the_shapes_of_recomputation_and_of_an_mlp(measured: Measured) -> None:
    ratios = {point.x[1] / point.x[2] for point in measured.profile.gemm.points}  # n / k
    assert {1, 2, 0.25, 4} <= ratios


def test_energy_that_cannot_be_had_is_said(measured: Measured) -> None:
    assert measured.profile.extra["energy"].startswith("not available: ")
    assert "gemm_power_w" not in measured.profile.quantities


def test_a_single_point_that_disagrees_is_told_as_one(caplog: pytest.LogCaptureFixture) -> None:
    profile._tell(["gemm 0 (spread 0.70)"], 0.1)
    assert "the trials of 1 point disagree (gemm 0 (spread 0.70))" in caplog.text


def test_what_the_meter_tells_stands_in_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = Curve(unit="bytes", points=(Point((1.0,), 1.0, 0.0),))
    rate = Quantity(value=1.0, unit="bytes/s", spread_fraction=0.0)
    power = Quantity(value=240.0, unit="W", spread_fraction=0.02)
    found = compute.ComputeCurves(curve, curve, rate, ())
    monkeypatch.setattr(profile, "measure_compute", lambda *_, **__: found)
    monkeypatch.setattr(profile, "measure_host_memory", lambda **_: host_memory.HostRates(rate, {}, ()))
    monkeypatch.setattr(profile.energy, "measure_energy", lambda *_: {"gemm_power_w": power})
    full = measure_hardware("cpu", thoroughness="full")
    assert full.quantities["gemm_power_w"] == power
    assert full.extra["energy"] is None
    assert "gemm_power_w" not in measure_hardware("cpu", thoroughness="quick").quantities


def test_a_thoroughness_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="'quick' or 'full', got 'slow'"):
        measure_hardware("cpu", thoroughness="slow")  # type: ignore[arg-type]


def test_an_unpaced_link_has_no_curves_and_another_speed_needs_no_measuring(measured: Measured) -> None:
    unpaced = with_link(measured.profile, EmulatedLink())
    assert unpaced.h2d is None
    assert unpaced.d2h is None
    assert unpaced.link_name == "emulated unpaced"
    faster = with_link(unpaced, EmulatedLink(h2d_gb_per_s=2.0))
    assert faster.h2d is not None
    assert faster.h2d == faster.d2h
    assert faster.h2d.rate(2**20) == pytest.approx(2e9)
    assert faster.gemm == measured.profile.gemm


def test_a_profile_survives_the_way_through_a_file(measured: Measured, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "folder" / "profile.json"
    measured.profile.save(path)
    assert HardwareProfile.load(path) == measured.profile


def test_a_gpus_own_link_cannot_be_replaced_by_an_emulated_one() -> None:
    with pytest.raises(ProfileError, match=r"PCIe 4\.0 x16"):
        with_link(HardwareProfile.preset("a100-40gb-pcie4"), EmulatedLink(h2d_gb_per_s=1.0))


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_a_device_that_cannot_be_measured_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="'cpu'"):
        measure_hardware(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_asking_for_a_missing_gpu_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="no CUDA device|built without CUDA"):
        measure_hardware("cuda")


def test_noise_and_other_work_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    curve = Curve(unit="bytes", points=(Point((1.0,), 1.0, 0.0),))
    rate = Quantity(value=1.0, unit="bytes/s", spread_fraction=0.0)
    noisy = ("gemm 1x1x1 (spread 3.00)",)
    monkeypatch.setattr(profile, "measure_compute", lambda *_, **__: compute.ComputeCurves(curve, curve, rate, noisy))
    result = measure_hardware("cpu")
    assert "gemm 1x1x1" in caplog.text
    assert set(noisy) <= set(result.extra["noisy"])

    caplog.clear()
    monkeypatch.setattr(profile, "measure_compute", lambda *_, **__: compute.ComputeCurves(curve, curve, rate, ()))
    everything = iter([(0.0, 0.0), (1e6, 0.0)])
    monkeypatch.setattr(profile.environment, "cpu_seconds", lambda: next(everything))
    assert measure_hardware("cpu").extra["other_cpu_load_fraction"] > 1
    assert "without other work" in caplog.text


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured_with_its_own_link() -> None:
    began = time.perf_counter()
    result = measure_hardware("cuda")
    assert time.perf_counter() - began < QUICK_S
    assert not result.emulated_link
    assert result.h2d is not None
    assert result.d2h is not None
    assert result.h2d.provenance == "measured"
    assert result.h2d.points[-1].x == (2.0**26,)
    assert result.h2d.rate(2**26) > 1e9
    assert result.gemm_flops_per_s(4096, 4096, 4096) > 1e12
    assert result.extra["environment"]["gpu_name"]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured_in_full_from_pinned_and_pageable_memory() -> None:
    began = time.perf_counter()
    result = measure_hardware("cuda", thoroughness="full")
    assert time.perf_counter() - began < FULL_S
    for name in ("both", "h2d_pageable", "d2h_pageable", "both_pageable"):
        assert result.curves[name].points[-1].x[0] >= 2**28
    found = result.all_quantities()
    assert 1e-7 < found["h2d_latency_s"].value < 1e-4
    assert found["h2d_bytes_per_s"].value > 0.95 * found["h2d_pageable_bytes_per_s"].value
    assert found["both_bytes_per_s"].value < 1.05 * found["h2d_bytes_per_s"].value
    power = result.quantities.get("gemm_power_w")
    assert (power is None) == str(result.extra["energy"]).startswith("not available: ")
    assert power is None or power.value > 20
