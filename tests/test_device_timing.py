"""Whatever times a GPU finds the device's rates where a launch takes longer than the work (fake_cuda_clock.py)."""

from __future__ import annotations

import contextlib
import runpy
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda_clock import Speeds
from fake_cuda_kernels import use_twins
from fake_cuda_tensors import DEVICE
from models import make_model

from kvoffload import HardwareProfile, OffloadConfig, offload
from kvoffload.backend import CudaBackend
from kvoffload.bench import PRESETS, Lab, current_rates
from kvoffload.kernels import tiles
from kvoffload.planning.rates import Rates
from kvoffload.profiler import compute, host
from kvoffload.profiler.link import measure_link
from kvoffload.profiler.workbench import Workbench
from kvoffload.session.session import Session

ROOT = Path(__file__).parents[1]
SPEEDS = Speeds(launch_s=80e-6, wait_s=30e-6, memory_bytes_per_s=50e9, flops_per_s=4e12, link_bytes_per_s=5e9)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    use_twins(monkeypatch)
    with fake_cuda.fake_cuda("lazy", speeds=SPEEDS) as fake:
        yield fake


def test_products_attention_and_copies_of_a_profile(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compute.POOL_BYTES, "cuda", 2**22)
    monkeypatch.setitem(compute.WEIGHTS, "cuda", ((128, 128),))
    monkeypatch.setitem(compute.ATTENTION_BYTES, "cuda", (2**19,))
    monkeypatch.setattr(compute, "ROWS", (256,))
    found = compute.measure_compute(DEVICE, torch.float32, budget_s=1.0)
    products, attention = (curve.points[0].seconds for curve in (found.gemm, found.attention))
    assert products == pytest.approx(4 * (256 * 128 + 128 * 128 + 256 * 128) / SPEEDS.memory_bytes_per_s, rel=0.05)
    query_bytes = 8 * 32 * (128 * 4 + 128 * 4 + 4)  # beside K and V: the queries, what they are given, its log-sum-exp
    assert attention == pytest.approx((2**19 + query_bytes) / SPEEDS.memory_bytes_per_s, rel=0.05)
    assert max(products, attention) < SPEEDS.launch_s
    assert found.device_copy.value == pytest.approx(SPEEDS.memory_bytes_per_s, rel=0.05)
    assert found.noisy == ()


def test_an_operation_of_several_launches(device: FakeCuda) -> None:
    bench = Workbench(DEVICE, torch.float32, 2**22)

    def work() -> None:
        for _ in range(5):
            bench.take(2**17).mul_(1.0)

    assert bench.time((), "five", work, 0.001).seconds == pytest.approx(5 * 2**19 / SPEEDS.memory_bytes_per_s, rel=0.05)


def test_small_copies_over_the_link(device: FakeCuda) -> None:
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        found = measure_link(backend, sizes_bytes=(2**12, 2**16), budget_s=0.05)
    for curve in (found.h2d, found.d2h, found.both):
        for point in curve.points:
            assert point.x[0] / point.seconds == pytest.approx(SPEEDS.link_bytes_per_s, rel=0.05)


def test_pageable_memory_is_timed_as_the_host_sees_it(device: FakeCuda) -> None:
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        found = measure_link(backend, sizes_bytes=(2**16,), budget_s=0.5, pageable=True)
    assert not found.pinned
    assert found.h2d.points[0].seconds > 2**16 / SPEEDS.link_bytes_per_s
    assert device.streams.calls["delay"] == 0


def test_the_hosts_time_for_a_chunk_of_either_form_is_that_of_all_it_launches(device: FakeCuda) -> None:
    tile = tiles.tile(host.WIDTH, 4, 1, tiles.capability(DEVICE))
    parts, _ = tiles.split(host.CHUNK_TOKENS["cuda"], tile.block_tokens, 1, tiles.processors(DEVICE))
    assert parts > 1  # which are merged
    with contextlib.closing(CudaBackend(DEVICE)) as backend:
        kv, activation, both = (
            host.measure_host_s_per_chunk(backend, forms=forms, budget_s=0.05).seconds
            for forms in (("kv",), ("activation",), ("activation", "kv"))
        )
    assert kv == pytest.approx(2 * SPEEDS.launch_s, rel=0.05)  # its copy and its attention
    # two products and a rotation; embeddings are read as they lie
    assert activation == pytest.approx(kv + 3 * SPEEDS.launch_s, rel=0.05)
    assert both == pytest.approx((kv + activation) / 2, rel=0.05)
    assert device.registered == {}


def _lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A small one, whose rates are each the median of five stretches."""
    median_s = current_rates._median_s
    monkeypatch.setattr(
        current_rates, "_median_s", lambda work, device, budget_s, idle_s=0.0: median_s(work, device, 0.0)
    )
    preset = replace(
        PRESETS["opt-6.7b"], hidden=64, heads=4, kv_heads=4, ffn=64, layers=2, batch=2, cached_tokens=64, vocab=96
    )
    return Lab(replace(preset, dtype=torch.float32))


def test_rates_of_the_benchmarks(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = _lab(monkeypatch)
    assert lab.bytes_per_s == pytest.approx(SPEEDS.link_bytes_per_s, rel=0.05)
    tokens = lab.chunk_tokens * lab.preset.batch
    found = lab.rates("planned")
    width = 64
    product_s = 4 * (tokens * width + width * width + tokens * width) / SPEEDS.memory_bytes_per_s
    copy_s = 4 * 2 * tokens * width / SPEEDS.memory_bytes_per_s  # of a product with a bias to its strided half
    assert found.restore_s_per_token["activation"] * lab.chunk_tokens == pytest.approx(
        2 * (product_s + copy_s), rel=0.1
    )
    assert found.restore_s_per_token["activation"] * lab.chunk_tokens < SPEEDS.launch_s / 4
    kv_s = tokens * 2 * width * 4 / SPEEDS.memory_bytes_per_s
    assert found.attention_s_per_token * lab.chunk_tokens == pytest.approx(kv_s, rel=0.2)  # and the queries


def test_a_step_that_waits_for_its_host_is_the_hosts_and_not_the_heads(
    device: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = _lab(monkeypatch)
    step_s = current_rates.step_s_without_cache(lab.model, lab.ids)
    before = device.streams.clock.host_busy_s
    with torch.no_grad():
        lab.model(lab.ids[:, :1], use_cache=False)
    issue_s = device.streams.clock.host_busy_s - before
    assert step_s >= issue_s  # of which there is nothing in what the device does
    found = lab.rates("planned")
    assert found.head_s < 0.05 * step_s
    assert found.host_s_per_layer * lab.preset.layers == pytest.approx(step_s, rel=0.2)
    slow = replace(found, host_s_per_layer=0.0)
    assert lab.bound_s("planned", found) == pytest.approx(step_s, rel=0.2)
    assert lab.bound_s("planned", slow) < 0.5 * step_s


FAST_HOST = Speeds(launch_s=1e-6, memory_bytes_per_s=1e9, flops_per_s=1e12, link_bytes_per_s=50e9)


def _run(speeds: Speeds, monkeypatch: pytest.MonkeyPatch, pause_s: float = 0.0, split: Any = "transfer") -> Session:
    """A generation on a device of these speeds, with a pause of the host after each token."""
    use_twins(monkeypatch)

    def pause(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(pause_s)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    with fake_cuda.fake_cuda("lazy", speeds=speeds):
        model: Any = make_model("opt", hidden_size=64, ffn_dim=64, word_embed_proj_dim=64).cuda()
        ids = torch.randint(3, 90, (2, 45), device="cuda")
        preset = HardwareProfile.preset("a100-40gb-pcie4")
        profile = replace(preset, device_copy_bytes_per_s=speeds.memory_bytes_per_s)
        config = OffloadConfig(split=split, block_tokens=8, chunk_blocks=2, device_gib="min", profile=profile)
        with offload(model, config) as session:
            model.generate(ids, max_new_tokens=14, do_sample=False, stopping_criteria=[pause])
    return session


def test_a_device_that_waits_for_its_host_is_not_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = []
    for changes in ({"memory_bytes_per_s": 2e7}, {"launch_s": 200e-6, "memory_bytes_per_s": 1e12}):
        speeds = replace(FAST_HOST, **changes)
        stats = _run(speeds, monkeypatch).stats
        assert stats is not None
        assert stats.device_busy_fraction is not None
        busy.append(stats.device_busy_fraction)
        assert stats.exposed_wait_s < 0.1 * sum(stats.decode_step_s)  # neither waits for the link
    assert busy[0] > 0.8
    assert busy[1] < 0.4


def test_the_gap_between_steps_is_that_of_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assumed_s = HardwareProfile.preset("a100-40gb-pcie4").gap_s
    for pause_s in (0.0, 3 * assumed_s):
        session = _run(FAST_HOST, monkeypatch, pause_s)
        gap_s = session.planner.measured.gap_s
        assert gap_s is not None
        assert 0.9 * pause_s <= gap_s < pause_s + 0.75 * assumed_s
        current_rates = Rates(
            h2d_bytes_per_s={"activation": 1.0, "kv": 1.0},
            restore_s_per_token={"activation": 0.0},
            attention_s_per_token=0.0,
            dense_s=0.0,
            gap_s=assumed_s,
        )
        assert session.planner.measured.correct(current_rates, 1).gap_s == gap_s


def test_a_link_without_pinned_memory_is_not_called_pinned(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _lab(monkeypatch).link_name == "measured pinned 5.000 GB/s"
    device.lockable_bytes = 0
    with pytest.warns(UserWarning, match="could not pin"):
        assert _lab(monkeypatch).link_name.startswith("measured pageable ")


def test_rows_of_the_kernels(device: FakeCuda) -> None:
    script = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "bench_kernels.py"), run_name="bench_kernels"))
    tiny = {"hidden": 64, "q_heads": 4, "kv_heads": 4, "head_dim": 16, "batch": 4}
    shape = script.Shape(**tiny, cached_tokens=256, chunk_tokens=64, rotary=False)
    with torch.no_grad():
        attention: Any = {one[0]: one for one in script.attention(shape, torch.float32, "cuda", 5)}
        recompute: Any = {one[0]: one for one in script.recompute(shape, torch.float32, "cuda", 5)}
    assert statistics.median(attention["copy"][3]) == pytest.approx(SPEEDS.memory_bytes_per_s / 1e9, rel=0.05)
    assert statistics.median(attention["ours"][3]) == pytest.approx(SPEEDS.memory_bytes_per_s / 1e9, rel=0.15)
    assert len(attention["ours"][3]) == 5
    m, product_bytes = 64 * 4, 4 * (2 * 64 * 4 * 64 + 64 * 64)
    tflops = 2 * m * 64 * 64 / (product_bytes / SPEEDS.memory_bytes_per_s) / 1e12
    assert statistics.median(recompute["mm"][3]) == pytest.approx(tflops, rel=0.05)
