"""A GPU that cannot be measured is told in one line, with its numbers and the way out."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda_tensors import DEVICE

from kvoffload.errors import ConfigError
from kvoffload.profiler import environment, readiness
from kvoffload.profiler.device import resolve_device

SMI_ROW = ["NVIDIA A10", "470.82.01", "22731", "00000000:1B:00.0", "4", "4", "16", "16"]
TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver\nby ..."


@pytest.fixture
def device() -> Iterator[FakeCuda]:
    with fake_cuda.fake_cuda(total_bytes=24 * 10**9) as fake:
        yield fake


def test_nothing_is_said_of_a_device_that_can_be_measured_and_nothing_stays_of_the_question(device: FakeCuda) -> None:
    assert readiness.problems(DEVICE, needed_bytes=22 * 10**9) == []
    assert device.registered == {}
    assert device.memory.allocated_bytes == 0


def test_memory_that_other_processes_hold(device: FakeCuda) -> None:
    device.memory.others_bytes = 20 * 10**9
    (reason,) = readiness.problems(DEVICE, needed_bytes=22 * 10**9)
    assert "other processes hold 20.00 GB of the 24.00 GB of NVIDIA Fake, 22.00 GB must be free" in reason
    assert "nvidia-smi" in reason
    assert readiness.problems(DEVICE, needed_bytes=4 * 10**9) == []


def test_a_card_that_is_too_small(device: FakeCuda) -> None:
    (reason,) = readiness.problems(DEVICE, needed_bytes=25 * 10**9)
    assert reason == "NVIDIA Fake has 24.00 GB of memory, 25.00 GB are needed: take a larger card"


def test_host_memory_that_cannot_be_locked(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    device.lockable_bytes = 2**16
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**16, 2**16))
    (reason,) = readiness.problems(DEVICE, needed_bytes=0)
    assert "cannot be locked for NVIDIA Fake (`ulimit -l` allows 64.00 KiB): raise it with `ulimit -l unl" in reason
    assert device.registered == {}
    torch.ones(1, device="cuda").add_(1)  # the failed call is nobody else's error
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (reason,) = readiness.problems(DEVICE, needed_bytes=0)
    assert "no limit is set" in reason


def test_a_low_limit_does_not_matter_where_the_driver_pins_all_the_same(
    device: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**16, 2**16))
    assert readiness.problems(DEVICE, needed_bytes=0) == []


def test_a_card_without_bfloat16(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_cuda.Properties, "major", 7)
    monkeypatch.setattr(fake_cuda.Properties, "minor", 5)
    (reason,) = readiness.problems(DEVICE, needed_bytes=0)
    assert "compute capability 7.5, without bfloat16: the kernels need 8.0" in reason


# ---- no device at all ----------------------------------------------------------------------------------------------


def _without(monkeypatch: pytest.MonkeyPatch, *, smi: list[str] | None, cuda: str | None, error: str | None) -> str:
    """What is said where PyTorch sees no device."""

    def init() -> None:
        if error is not None:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(environment, "_nvidia_smi", lambda bus: smi)
    (reason,) = readiness.problems(DEVICE, needed_bytes=0)
    assert "\n" not in reason
    return reason


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = _without(monkeypatch, smi=SMI_ROW, cuda="13.0", error=TOO_OLD)
    assert reason.startswith("driver 470.82.01 of this NVIDIA A10 is too old for CUDA 13.0, which torch 2.")
    assert "update the driver" in reason


@pytest.mark.parametrize(
    ("smi", "cuda", "error", "message"),
    [
        (SMI_ROW, None, None, "was built without CUDA: install a build with CUDA for this NVIDIA A10"),
        (None, None, None, "was built without CUDA: install a build with CUDA"),
        (None, "13.0", None, "no CUDA device: `nvidia-smi` shows none"),
        (SMI_ROW, "13.0", "Unexpected error\nin two lines", "A10 (driver 470.82.01): Unexpected error"),
        (SMI_ROW, "13.0", None, "is CUDA_VISIBLE_DEVICES set to hide it?"),
    ],
)
def test_no_device(
    smi: list[str] | None, cuda: str | None, error: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in _without(monkeypatch, smi=smi, cuda=cuda, error=error)


def test_a_command_that_is_asked_for_cuda_says_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch, smi=SMI_ROW, cuda="13.0", error=TOO_OLD)
    with pytest.raises(ConfigError, match=r"too old for CUDA 13.0.*or use device='cpu' \(--device cpu\)"):
        resolve_device("cuda", "auto")
