"""The rates of a model: each curve of a profile is read at the size the runtime uses, against numbers by hand."""

from __future__ import annotations

import dataclasses

import pytest

from kvoffload.errors import ProfileError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.quantities import Curve, Point, Quantity
from kvoffload.model.shape import ModelShape
from kvoffload.planning.rates import least_chunk_bytes, rates_from_profile

SHAPE = ModelShape(
    num_layers=2,
    num_offloaded_layers=2,
    hidden_size=64,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=1000,
    kv_itemsize_bytes=2,
    activation_itemsize_bytes=2,
    weight_bytes=2 * (2 * 45_056 + 64_000),  # two bytes each
)
PROFILE = HardwareProfile(
    device_name="test",
    link_name="test link",
    emulated_link=False,
    key="test",
    h2d=Curve(unit="bytes", points=(Point((1024.0,), 1e-3, 0.0), Point((16384.0,), 4e-3, 0.0))),
    d2h=None,
    gemm=Curve(unit="m,n,k", points=(Point((4.0, 256.0, 64.0), 1e-6, 0.0), Point((64.0, 32.0, 64.0), 2e-6, 0.0))),
    attention=Curve(unit="bytes", points=(Point((1e4,), 1e-5, 0.0), Point((1e6,), 1e-4, 0.0))),
    device_copy_bytes_per_s=1e12,
    device_memory_bytes=10**9,
)


def test_rates_are_read_at_the_sizes_the_runtime_uses() -> None:
    rates = rates_from_profile(PROFILE, SHAPE, batch=4, block_tokens=8, chunk_blocks=2)
    assert rates.h2d_bytes_per_s["activation"] == pytest.approx(
        8192 / PROFILE.h2d.seconds(8192)
    )  # 16 tokens * 4 * 64 * 2
    assert rates.h2d_bytes_per_s["kv"] == pytest.approx(8192 / PROFILE.h2d.seconds(8192))  # 16 * 4 * 2 * 2 * 16 * 2
    assert rates.restore_s_per_token["activation"] == pytest.approx(4 * 2 * 64 * 64 / (2 * 64 * 32 * 64 / 2e-6))
    assert rates.attention_s_per_token == pytest.approx(4 * 128 / (1e6 / 1e-4))
    assert rates.dense_s == pytest.approx(4 * SHAPE.dense_flops / (2 * 4 * 256 * 64 / 1e-6))
    assert rates.head_s == pytest.approx(2 * 4 * 64_000 / (2 * 4 * 256 * 64 / 1e-6))
    assert (rates.gap_s, rates.host_s_per_layer) == (PROFILE.gap_s, PROFILE.host_s_per_layer)
    smaller = rates_from_profile(PROFILE, SHAPE, batch=4, block_tokens=8, chunk_blocks=1)
    assert smaller.h2d_bytes_per_s["kv"] == pytest.approx(4096 / PROFILE.h2d.seconds(4096))
    short = rates_from_profile(PROFILE, SHAPE, batch=4, block_tokens=8, chunk_blocks=1, cached_tokens=10)
    assert short.attention_s_per_token == pytest.approx(4 * 128 / (5120 / 1e-5))


def test_reading_the_weights_bounds_the_dense_part_and_the_head() -> None:
    slow = dataclasses.replace(PROFILE, device_copy_bytes_per_s=1e6)
    rates = rates_from_profile(slow, SHAPE, batch=4, block_tokens=8, chunk_blocks=2)
    assert rates.dense_s == pytest.approx(2 * 45_056 / 1e6)
    assert rates.head_s == pytest.approx(2 * 64_000 / 1e6)


def test_a_device_that_is_the_cpu_pays_for_the_hosts_time_itself() -> None:
    sizes = {"batch": 4, "block_tokens": 8, "chunk_blocks": 2, "cached_tokens": 100}
    on_gpu = rates_from_profile(PROFILE, SHAPE, **sizes)
    on_cpu = rates_from_profile(dataclasses.replace(PROFILE, emulated_link=True), SHAPE, **sizes)
    issued_s = PROFILE.host_s_per_layer + 7 * PROFILE.host_s_per_chunk  # chunks of 16 tokens
    assert on_cpu.dense_s == pytest.approx(on_gpu.dense_s + issued_s)
    assert on_cpu.head_s == pytest.approx(on_gpu.head_s + PROFILE.gap_s)


@pytest.mark.parametrize(("emulated", "wanted"), [(False, 2**21), (True, 2**22)])
def test_a_chunk_is_long_enough_for_the_host_to_issue_the_next(emulated: bool, wanted: int) -> None:
    """10 us and 10 GB/s: the link is at 95 % of its speed from 2 MiB on, and a copy of 4 MiB takes 430 us."""
    link = Curve(unit="bytes", points=tuple(Point((size,), 1e-5 + size / 1e10, 0.0) for size in (1e3, 1e6, 1e9)))
    profile = dataclasses.replace(PROFILE, h2d=link, emulated_link=emulated, host_s_per_chunk=2e-5)
    assert least_chunk_bytes(profile, SHAPE, recomputes=False) == wanted
    slower = dataclasses.replace(profile, host_s_per_chunk=1e-4)
    longer = least_chunk_bytes(slower, SHAPE, recomputes=False)
    share = 0.05 if emulated else 0.25
    assert link.seconds(longer) >= 1e-4 / share > link.seconds(longer // 2)


def test_an_unpaced_link_has_no_rates_and_the_message_says_what_to_do() -> None:
    with pytest.raises(ProfileError, match="no bandwidth to plan with") as caught:
        rates_from_profile(dataclasses.replace(PROFILE, h2d=None), SHAPE, batch=1, block_tokens=8, chunk_blocks=2)
    for way in ("link=EmulatedLink(h2d_gb_per_s=...)", "--link-gb-per-s", "profile=...", "--hardware"):
        assert way in str(caught.value)
    assert "split" not in str(caught.value)  # no split is planned without a speed


def test_a_chunk_of_either_form_is_compared_with_the_copy_of_that_form() -> None:
    """10 GB/s: a copy of 1 MiB takes 105 us; an activation is half of its K and V, and takes the host longer."""
    shape = dataclasses.replace(SHAPE, num_kv_heads=4, hidden_size=64)
    assert shape.activation_row_bytes * 2 == shape.kv_row_bytes
    link = Curve(unit="bytes", points=tuple(Point((size,), size / 1e10, 0.0) for size in (1e3, 1e9)))
    gemm = Curve(unit="m,n,k", points=tuple(Point((m, 64.0, 64.0), m * 1e-9, 0.0) for m in (1.0, 1e6)))

    def least(recomputes: bool, **seconds: float) -> int:
        quantities = {name: Quantity(value=value, unit="s") for name, value in seconds.items()}
        profile = dataclasses.replace(PROFILE, h2d=link, gemm=gemm, host_s_per_chunk=9e-5, quantities=quantities)
        return least_chunk_bytes(profile, shape, recomputes=recomputes)

    forms = {"host_s_per_kv_chunk": 5e-5, "host_s_per_activation_chunk": 2e-4}
    for recomputes, form, share in ((False, "host_s_per_kv_chunk", 1.0), (True, "host_s_per_activation_chunk", 0.5)):
        found = least(recomputes, **forms)
        assert 0.25 * share * found / 1e10 >= forms[form] > 0.25 * share * found / 2 / 1e10
    assert least(True) == 2 * least(False)  # where the forms were not timed apart: half as many bytes


def test_a_model_whose_mlp_is_not_known_has_the_rates_of_its_projections() -> None:
    sizes = {"batch": 4, "block_tokens": 16, "chunk_blocks": 2}
    found = rates_from_profile(PROFILE, dataclasses.replace(SHAPE, intermediate_size=0), **sizes)
    assert 0 < found.dense_s < rates_from_profile(PROFILE, SHAPE, **sizes).dense_s
