"""The benchmark of the host's time: what each chunk asks of the driver, and that its figures add up."""

from __future__ import annotations

import pytest

from campaign import host_time


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(host_time, "STEPS", 12)


def test_a_chunk_is_one_copy_one_wait_and_its_kernels() -> None:
    few, many = (host_time.offloaded_steps(2, chunks, "transfer") for chunks in (2, 6))
    num = 2 * 4 * few.num_steps
    calls = {name: (many.calls[name] - few.calls[name]) / num for name in many.calls}
    assert calls["kernel"] == 1  # attention
    assert calls["wait"] == 3  # the copy for the block and its slot, compute for the copy
    assert calls["timed event"] < 2  # of three stretches some are timed
    with_recomputation = host_time.offloaded_steps(2, 6, "recompute")
    assert with_recomputation.calls["kernel"] == 2 * 6 * few.num_steps + many.calls["kernel"]  # and a rotation


def test_nothing_of_the_driver_is_left_replaced() -> None:
    import torch

    before = (torch.cuda.Event, torch.cuda.Stream, torch.cuda.current_stream)
    with host_time.counting():
        assert torch.cuda.Event is not before[0]
    assert (torch.cuda.Event, torch.cuda.Stream, torch.cuda.current_stream) == before
