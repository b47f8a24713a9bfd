"""The fitted formula against operations measured by others, always predicted without the ones it is judged by."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import llmcompass
import pytest
from llmcompass import PEAKS, Interpolated, Row, elementwise_work, mean

from kvoffload.errors import ProfileError
from kvoffload.machine.fit import FIT_SCHEMA_VERSION, Fit, Work, gemm_work
from kvoffload.machine.fitting import MAX_SHAPES, Observation, choose_points, fit, fit_profile
from kvoffload.machine.hardware_profile import HardwareProfile

RECORDED = Path(__file__).parent / "data" / "profile_emulated_2_threads.json"


@cache
def left_out(kind: str) -> list[Row]:
    if kind in PEAKS:
        return llmcompass.leave_one_out(llmcompass.products(kind), kind)
    return llmcompass.leave_one_out(llmcompass.passes(kind))


def a100(observations: list[Observation]) -> Fit:
    return fit(observations, peak_flops_per_s=312e12, peak_bytes_per_s=2039e9)


def made(formula: Fit, works: list[Work]) -> list[Observation]:
    return [Observation(work, formula.seconds(work)) for work in works]


# ---- against measurements ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mean_limit", "worst_limit"),
    [
        ("A100", 0.05, 0.15),
        ("MI210", 0.05, 0.15),
        ("softmax", 0.09, math.inf),
        ("layernorm", 0.09, math.inf),
        ("gelu", 0.09, math.inf),
    ],
)
def test_every_operation_is_predicted_from_the_others_of_its_class(
    kind: str, mean_limit: float, worst_limit: float
) -> None:
    errors = [row.error for row in left_out(kind)]
    assert len(errors) >= 20
    assert mean(errors) <= mean_limit
    assert max(map(abs, errors)) <= worst_limit
    assert mean([row.roofline_error for row in left_out(kind)]) > 5 * mean(errors)


def test_all_reduces_are_interpolated_from_their_neighbours() -> None:
    assert mean([row.error for row in llmcompass.left_out_all_reduces()]) <= 0.05


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_operation_of_a_layer_is_predicted_from_single_operations(phase: str) -> None:
    rows = llmcompass.layer(phase)
    assert len(rows) == 12
    assert mean([row.error for row in rows]) <= 0.15  # of every operation by itself, so that nothing cancels
    assert mean([row.roofline_error for row in rows]) > 2 * mean([row.error for row in rows])


def test_ten_shapes_from_both_sides_of_the_ridge_predict_the_rest() -> None:
    for device, (flops_per_s, bytes_per_s) in PEAKS.items():
        everything = llmcompass.products(device)
        chosen = choose_points(everything, flops_per_s / bytes_per_s)
        computing = [one for one in chosen if one.work.flops > sum(one.work[1:3]) * flops_per_s / bytes_per_s]
        assert len(chosen) == len(set(chosen)) == MAX_SHAPES
        assert len(computing) == MAX_SHAPES // 2
        fitted = fit(chosen, peak_flops_per_s=flops_per_s, peak_bytes_per_s=bytes_per_s)
        errors = [fitted.seconds(one.work) / one.seconds - 1 for one in everything if one not in chosen]
        assert mean(errors) <= 0.05
        assert max(map(abs, errors)) <= 0.15


def test_both_sides_of_the_ridge_get_the_same_share_where_there_are_enough() -> None:
    works = [gemm_work(m, 4096, 4096) for m in (1, 2, 4, 8, 16, 1024, 2048, 4096, 8192, 16384, 32768)]
    chosen = choose_points([Observation(work, 1.0) for work in works], 153, limit=4)
    assert sorted(one.work.flops for one in chosen) == sorted(works[idx].flops for idx in (0, 4, 5, 10))
    few = choose_points([Observation(work, 1.0) for work in works[4:]], 153, limit=6)
    assert len(few) == 6  # the other side gives what one side lacks


def test_intervals_hold_about_as_often_as_they_say() -> None:
    rows = [row for kind in ("A100", "MI210", "softmax", "layernorm", "gelu") for row in left_out(kind)]
    assert 0.75 <= sum(row.is_inside for row in rows) / len(rows) <= 0.95  # said: 0.8
    assert sum(row.is_inside for row in left_out("A100")) >= 15  # of 20
    assert sorted(row.high_s / row.low_s for row in rows)[len(rows) // 2] < 1.25


@pytest.mark.timing
def test_the_whole_evaluation_takes_less_than_five_seconds() -> None:
    began = time.perf_counter()
    for kind in PEAKS:
        llmcompass.leave_one_out(llmcompass.products(kind), kind)
    for kind in ("softmax", "layernorm", "gelu"):
        llmcompass.leave_one_out(llmcompass.passes(kind))
    for phase in ("prefill", "decode"):
        llmcompass.layer(phase)
    assert time.perf_counter() - began < 5.0


# ---- the formula -------------------------------------------------------------------------------------------------


def test_the_formula_by_hand() -> None:
    one = Fit(overhead_s=1.0, flops_per_s=10.0, bytes_per_s=5.0, sharpness=2.0)
    assert one.seconds(Work(30.0, 20.0, 0.0)) == pytest.approx(1 + 5)  # 3 and 4 overlap
    assert one.seconds(Work(30.0, 20.0, 10.0)) == pytest.approx(1 + 5 + 2)  # the result is written behind
    assert one.seconds(Work(0.0, 0.0, 0.0)) == 1.0
    assert dataclasses.replace(one, host_s=7.0).seconds(Work(30.0, 20.0, 0.0)) == 7.0
    rows = dataclasses.replace(one, spill=0.5, row_fit_bytes=4.0, row_over_bytes=16.0)
    for row_bytes, factor in ((2.0, 1.0), (4.0, 1.0), (8.0, 1.25), (16.0, 1.5), (64.0, 1.5)):
        assert rows.seconds(Work(0.0, 10.0, 5.0, row_bytes)) == pytest.approx(1 + 3 * factor)


def test_the_work_of_a_product_and_of_a_pass() -> None:
    assert gemm_work(2, 3, 5, count=7, itemsize_bytes=4) == Work(2 * 7 * 30, 4 * 7 * (10 + 15), 4 * 7 * 6)
    assert elementwise_work(3, 5) == Work(0, 30, 30)
    assert elementwise_work(3, 5, reduces=True).row_bytes == 10


@pytest.mark.parametrize("sharpness", [1.2, 4.0])
def test_numbers_that_made_the_times_are_found_again(sharpness: float) -> None:
    truth = Fit(overhead_s=2e-5, flops_per_s=200e12, bytes_per_s=1.5e12, sharpness=sharpness)
    works = [gemm_work(m, n, n) for m in (8, 128, 512, 8192) for n in (512, 2048, 8192, 32768)]
    found = a100(made(truth, works))
    assert found.overhead_s == pytest.approx(truth.overhead_s, rel=0.02)
    assert found.flops_per_s == pytest.approx(truth.flops_per_s, rel=0.02)
    assert found.bytes_per_s == pytest.approx(truth.bytes_per_s, rel=0.02)
    assert found.seconds(gemm_work(64, 4096, 4096)) == pytest.approx(truth.seconds(gemm_work(64, 4096, 4096)), rel=0.05)
    assert (found.host_s, found.spill) == (0.0, 0.0)


def test_numbers_the_points_do_not_pay_for_are_left_out() -> None:
    extra = {
        kind: set(a100(llmcompass.passes(kind)).free) & {"host_s", "spill"} for kind in ("softmax", "layernorm", "gelu")
    }
    assert extra == {"softmax": {"spill"}, "layernorm": {"host_s", "spill"}, "gelu": {"host_s"}}
    assert len(a100(llmcompass.products("A100")).free) == 4


def test_a_floor_and_long_rows_are_found_where_the_times_have_them() -> None:
    truth = Fit(overhead_s=3e-5, flops_per_s=2e14, bytes_per_s=1.5e12, sharpness=2.0, host_s=6e-5)
    floor = a100(made(truth, [elementwise_work(1, 2**exponent) for exponent in range(10, 30)]))
    assert floor.host_s == pytest.approx(6e-5, rel=0.02)
    assert floor.overhead_s == pytest.approx(3e-5, rel=0.05)
    truth = dataclasses.replace(truth, host_s=0.0, spill=1.0, row_fit_bytes=2.0**14, row_over_bytes=2.0**15)
    works = [elementwise_work(4096, 2**exponent, reduces=True) for exponent in range(8, 17)]
    works += [elementwise_work(2**exponent, 4096, reduces=True) for exponent in range(8, 17)]
    rows = a100(made(truth, works))
    assert (rows.row_fit_bytes, rows.row_over_bytes) == (2.0**14, 2.0**15)
    assert rows.spill == pytest.approx(1.0, rel=0.05)


def test_no_share_of_a_peak_exceeds_one() -> None:
    truth = Fit(overhead_s=1e-6, flops_per_s=400e12, bytes_per_s=3e12, sharpness=2.0)  # faster than the datasheet
    found = a100(made(truth, [gemm_work(m, 4096, 4096) for m in (1, 16, 256, 4096, 16384)]))
    assert found.flops_per_s <= 312e12
    assert found.bytes_per_s <= 2039e9


def test_an_interval_grows_with_the_asked_coverage_and_far_from_what_was_measured() -> None:
    fitted = a100([one for one in llmcompass.products("A100") if one.work.flops > 1e12])  # all bound by computing
    near, far = gemm_work(8192, 12288, 12288), gemm_work(1, 12288, 12288)
    widths = [fitted.predict(near, coverage=share) for share in (0.5, 0.8, 0.95)]
    assert widths[0].high_s < widths[1].high_s < widths[2].high_s
    assert all(one.low_s < one.seconds < one.high_s for one in widths)
    ratio = [fitted.predict(work).high_s / fitted.predict(work).seconds for work in (near, far)]
    assert ratio[1] - 1 > 3 * (ratio[0] - 1)


@pytest.mark.parametrize(
    "work",
    [
        gemm_work(64, 4096, 4096),
        gemm_work(8192, 8192, 8192),
        Work(0.0, 1e6, 1e6, 2.0**15),
        Work(1e9, 0.0, 0.0),
        Work(0.0, 0.0, 1e6),
        Work(0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("host_s", [0.0, 1.0])
def test_the_slopes_behind_the_intervals_are_those_of_the_formula(work: Work, host_s: float) -> None:
    one = Fit(
        overhead_s=1e-5,
        flops_per_s=2e14,
        bytes_per_s=1.5e12,
        sharpness=2.5,
        host_s=host_s,
        spill=0.7,
        row_fit_bytes=2.0**14,
        row_over_bytes=2.0**16,
        free=("overhead_s", "flops_per_s", "bytes_per_s", "sharpness", "host_s", "spill"),
    )
    slopes = one._slopes(work)
    for name in one.free:
        moved = dataclasses.replace(one, **{name: getattr(one, name) * math.exp(1e-6)})
        assert slopes[name] == pytest.approx(math.log(moved.seconds(work) / one.seconds(work)) / 1e-6, abs=1e-4)


def test_times_between_sizes_follow_a_power_and_end_at_the_last_rate() -> None:
    some = Interpolated((1.0, 4.0, 16.0), (2.0, 2.0, 8.0))
    assert [some.seconds(size) for size in (0.5, 2.0, 4.0, 8.0, 32.0)] == pytest.approx([2.0, 2.0, 2.0, 4.0, 16.0])


# ---- a profile's own points, files and bad input -----------------------------------------------------------------


def test_a_profile_is_fitted_from_ten_of_its_points() -> None:
    fits = fit_profile(HardwareProfile.load(RECORDED))
    assert fits["gemm"].num_points == MAX_SHAPES
    assert 5e9 < fits["gemm"].flops_per_s < 5e11
    assert 1e9 < fits["attention"].bytes_per_s < 1e11
    preset = fit_profile(HardwareProfile.preset("a100-40gb-pcie4"))
    assert preset["gemm"].flops_per_s == pytest.approx(312e12, rel=0.05)


def test_a_fit_survives_the_way_through_a_file() -> None:
    fitted = a100(llmcompass.products("A100"))
    assert Fit.from_json(json.loads(json.dumps(fitted.to_json()))) == fitted


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data | {"schema_version": FIT_SCHEMA_VERSION + 1}, "my file has schema version 2.*reads 1"),
        (lambda data: [data], "my file has schema version None"),
        (lambda data: data | {"covariance": 3}, "my file is damaged"),
        (lambda data: {"schema_version": FIT_SCHEMA_VERSION}, "my file is damaged"),
    ],
)
def test_a_damaged_fit_is_named(damage: Callable[[object], object], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        Fit.from_json(damage(a100(llmcompass.products("A100")).to_json()), source="my file")


def test_what_cannot_be_fitted_is_refused() -> None:
    good = llmcompass.products("A100")
    with pytest.raises(ProfileError, match="3 timed operations or more, got 2"):
        a100(good[:2])
    for seconds in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ProfileError, match=f"taken {seconds!r} s"):
            a100([*good, Observation(good[0].work, seconds)])
    for peak in (0.0, -1.0, math.nan):
        with pytest.raises(ProfileError, match="above zero"):
            fit(good, peak_flops_per_s=peak, peak_bytes_per_s=1.0)
        with pytest.raises(ProfileError, match="above zero"):
            fit(good, peak_flops_per_s=1.0, peak_bytes_per_s=peak)
    with pytest.raises(ProfileError, match="coverage"):
        a100(good).predict(good[0].work, coverage=1.0)
    bare = dataclasses.replace(HardwareProfile.load(RECORDED), attention=HardwareProfile.load(RECORDED).gemm)
    empty = dataclasses.replace(bare.gemm, points=())
    with pytest.raises(ProfileError, match="0 matrix products"):
        fit_profile(dataclasses.replace(bare, gemm=empty))
    for sizes, times in (((), ()), ((1.0,), ()), ((2.0, 1.0), (1.0, 1.0)), ((1.0, 2.0), (1.0, 0.0))):
        with pytest.raises(ProfileError):
            Interpolated(sizes, times)
