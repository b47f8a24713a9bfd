"""The CUDA backend and sessions on it, on a device that is not there (fake_cuda.py)."""

from __future__ import annotations

import gc
import inspect
import itertools
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import test_gpu
import torch
from fake_cuda import PAGE_BYTES, FakeCuda
from fake_cuda_kernels import use_twins
from fake_cuda_streams import Event, RealEvent, RealStream, Stream
from fake_cuda_tensors import DEVICE
from models import make_model
from modes import given

import kvoffload
from kvoffload.backend import CudaBackend, cuda
from kvoffload.config import GIB
from kvoffload.profiler import stored
from kvoffload.profiler.device import machine_key
from kvoffload.profiler.profile import METHOD

TOLERANCE = test_gpu.LOGIT_TOLERANCE
POLICIES: list[Any] = [("lazy",), ("eager",), ("lazy", "eager"), ("eager", "lazy")]  # of the H2D and D2H streams
H2D, D2H = 1, 2  # streams in the order the backend makes them


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A device whose copies come as late as may be; the twins stand in for the kernels, interpreted they are slow."""
    use_twins(monkeypatch)
    with fake_cuda.fake_cuda("lazy") as fake:
        yield fake


# ---- the fake ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fake", "real"), [(Event, RealEvent), (Stream, RealStream)])
def test_the_fakes_have_nothing_that_the_real_classes_lack(fake: type, real: type) -> None:
    in_cpp = {"stream_id", "device", "device_index", "device_type"}
    for name, value in vars(fake).items():
        if name.startswith("_") or name in in_cpp:
            continue
        assert list(inspect.signature(value).parameters) == list(inspect.signature(getattr(real, name)).parameters)
    with pytest.raises(AttributeError):
        getattr(fake, "elapsed")  # noqa: B009  (a name that neither has)


def test_what_stands_below_pytorchs_own_python_is_there_in_pytorch() -> None:
    stub = (Path(torch._C.__file__).parent / "_C" / "__init__.pyi").read_text()
    with fake_cuda.fake_cuda() as fake:
        assert len(fake.names) > 10
        assert [name for name in fake.names if f"def {name}(" not in stub] == []


def test_the_fake_tells_its_device_from_the_host(device: FakeCuda) -> None:
    before = device.memory.allocated_bytes
    ones = torch.ones(300, device="cuda")
    assert ones.is_cuda
    assert (2 * ones).sum().item() == 600
    assert device.memory.allocated_bytes == before + 1536  # 1200, rounded up
    with pytest.raises(RuntimeError, match="same device"):
        ones + torch.ones(300)
    del ones
    assert device.memory.allocated_bytes == before
    device.memory.fraction = 0.0
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(1, device="cuda")


# ---- the backend ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policies", POLICIES)
def test_copies_wait_for_their_events(policies: Any) -> None:
    with fake_cuda.fake_cuda(*policies) as fake:
        backend = CudaBackend(torch.device("cuda"))
        assert backend.device == DEVICE  # with its index
        host = backend.allocate_host(64).tensor
        out, back = (backend.allocate_device(64) for _ in range(2))
        out.fill_(7)
        written = backend.copy_to_host(host, out, [backend.release()])
        ready = backend.copy_to_device(back, host, [written, backend.release()])
        backend.compute_waits(ready)
        assert back.tolist() == [7] * 64
        backend.synchronize()
        for way in ("h2d", "d2h"):
            assert backend.link_use(way)[::2] == (64, 1)  # bytes and copies
            assert backend.link_use(way).busy_s > 0
        assert backend.span_seconds("exposed_wait") > 0
        assert fake.streams.log == [
            (D2H, "waits"),
            (D2H, "copies"),
            (H2D, "waits"),
            (H2D, "waits"),
            (H2D, "copies"),
            (0, "waits"),
        ]
        backend.close()


def test_a_copy_that_nobody_waited_for_has_not_happened(device: FakeCuda) -> None:
    backend = CudaBackend(DEVICE)
    source, target = backend.allocate_host(64).tensor.fill_(3), backend.allocate_device(64).fill_(0)
    event = backend.copy_to_device(target, source, [])
    assert backend.link_use("h2d").copies == 0  # which does not wait, either
    assert target.tolist() == [0] * 64
    backend.compute_waits(event)
    assert target.tolist() == [3] * 64
    backend.close()


def test_every_buffer_has_pages_of_its_own_and_gives_them_back(device: FakeCuda) -> None:
    backend = CudaBackend(DEVICE)
    buffers = [backend.allocate_host(num_bytes) for num_bytes in (1, 100, PAGE_BYTES, 3 * PAGE_BYTES + 1, 1000, 1000)]
    assert [buffer.pinned_bytes // PAGE_BYTES for buffer in buffers] == [1, 1, 1, 4, 1, 1]
    assert [buffer.tensor.numel() for buffer in buffers[:4]] == [1, 100, PAGE_BYTES, 3 * PAGE_BYTES + 1]
    assert all(buffer.tensor.data_ptr() % PAGE_BYTES == 0 for buffer in buffers)
    assert sorted(device.registered.values()) == sorted(buffer.pinned_bytes for buffer in buffers)
    backend.release_host(buffers[3])
    assert len(device.registered) == 5
    backend.close()
    assert device.registered == {}


def test_a_backend_that_nobody_closed_leaves_nothing_pinned(device: FakeCuda) -> None:
    backend = CudaBackend(DEVICE)
    backend.copy_to_device(backend.allocate_device(64), backend.allocate_host(64).tensor, [])
    assert device.registered
    del backend
    gc.collect()
    assert device.registered == {}
    assert device.streams.calls["synchronize"] == 1


def test_memory_that_cannot_be_pinned_is_told_once_and_is_nobody_elses_error(device: FakeCuda) -> None:
    device.lockable_bytes = PAGE_BYTES
    backend = CudaBackend(DEVICE)
    assert backend.allocate_host(10).pinned_bytes == PAGE_BYTES
    with pytest.warns(UserWarning, match=r"could not pin.*CUDA error 2"):
        pageable = backend.allocate_host(10)
    assert pageable.pinned_bytes == 0
    target = backend.allocate_device(10).fill_(1)  # the first kernel after the failed call
    backend.copy_to_host(pageable.tensor, target, [backend.release()])
    backend.allocate_host(10)  # is not told again
    backend.release_host(pageable)
    backend.close()
    assert pageable.tensor.tolist() == [1] * 10
    assert device.registered == {}


def test_a_recording_holds_what_ran_in_seconds_since_it_began(device: FakeCuda) -> None:
    backend = CudaBackend(DEVICE)
    host, target = backend.allocate_host(64).tensor, backend.allocate_device(64)
    backend.copy_to_device(target, host, [])
    backend.start_recording()
    backend.mark("step")
    ready = backend.copy_to_device(target, host, [])
    backend.compute_waits(ready)
    with backend.recording("attention"):
        target.fill_(0)
    backend.copy_to_host(host, target, [backend.release()])
    backend.stop_recording()
    backend.copy_to_host(host, target, [backend.release()])
    spans = backend.recorded()
    assert [(span.lane, span.num_bytes) for span in spans] == [
        *(("step", 0), ("h2d", 64), ("wait", 0), ("attention", 0), ("d2h", 64))
    ]
    assert all(0 <= span.start_s <= span.end_s < 10 for span in spans)
    assert all(before.start_s <= after.start_s for before, after in itertools.pairwise(spans[1:]))
    backend.stop_recording(keep=False)
    assert backend.recorded() == []
    backend.close()


def test_measurements_are_added_up_before_there_are_too_many(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MAX_OPEN_MEASUREMENTS", 3)
    backend = CudaBackend(DEVICE)
    for _ in range(10):
        backend.end_span(backend.start_span("recompute"))
    assert len(backend._pending["recompute"]) <= 3
    assert backend.span_seconds("recompute") > 0
    assert backend._totals["recompute"].copies == 10
    backend.close()


class _Sysfs:
    """Stands for `Path`: every file of the system's says which CPUs are near."""

    asked = ""

    def __init__(self, path: str) -> None:
        type(self).asked = path

    def read_text(self) -> str:
        return "0,4000-4001\n"


def test_host_memory_is_touched_by_a_cpu_near_the_device(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "Path", _Sysfs)
    allowed: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: allowed.append(cpus))
    with cuda._near(DEVICE):
        assert allowed == [{0}]
    assert allowed == [{0}, {0, 1}]
    assert _Sysfs.asked == "/sys/bus/pci/devices/0000:1b:00.0/local_cpulist"

    def refused(pid: int, cpus: set[int]) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refused)
    with cuda._near(DEVICE):
        pass


# ---- sessions ------------------------------------------------------------------------------------------------------


def _generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    common = {"max_new_tokens": 14, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(ids, **common | options)


def _equal(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert test_gpu._distance(found, expected) <= TOLERANCE


def _ids(tokens: int = 45) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 90, (2, tokens), device="cuda")


SMALL: dict[str, Any] = {"block_tokens": 8, "chunk_blocks": 2, "device_gib": "min"}


@pytest.mark.parametrize(
    ("split", "policies"), [("transfer", ["lazy"]), (0.5, ["lazy"]), (0.5, ["eager"]), ("auto", ["lazy"])]
)
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_session_gives_the_tokens_and_the_memory_back(
    architecture: str, split: Any, policies: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_twins(monkeypatch)
    monkeypatch.setattr("kvoffload.session.measured_rates.CHECK_BUDGET_S", 0.01)
    with fake_cuda.fake_cuda(*policies) as fake:
        model, ids = make_model(architecture).cuda(), _ids()
        expected = _generate(model, ids)
        gc.collect()
        before, waits = fake.memory.allocated_bytes, fake.streams.calls["device to host, blocking"]
        config = kvoffload.OffloadConfig(split=split, profile="a100-40gb-pcie4", **SMALL)
        with kvoffload.offload(model, config) as session:
            assert isinstance(session.backend, CudaBackend)
            session.record_timeline()
            copies = fake.streams.calls["device to host, blocking"]
            found = _generate(model, ids)
            if split == "transfer":  # the others check what recomputation gives
                assert fake.streams.calls["device to host, blocking"] == copies + waits
                assert fake.streams.calls["synchronize"] == 1  # where the timeline begins
            _equal(found, expected)
            stats = session.stats
            assert stats is not None
            assert sum(fake.registered.values()) == stats.pinned_bytes > 0
            assert stats.h2d_bytes > 0
            assert stats.link_utilization is not None
            assert 0 < stats.link_utilization <= 1
            assert (stats.recomputed_tokens > 0) >= (split == 0.5)
            lanes = {span.lane for span in session.timeline().spans}
            assert {"h2d", "d2h", "attention"} <= lanes
        del found, stats, session
        gc.collect()
        assert fake.memory.allocated_bytes <= before + 512 * 20  # logits of `expected` are there in any case
        assert fake.registered == {}


def test_beams_and_whole_layers(device: FakeCuda) -> None:
    model, ids = make_model("llama").cuda(), _ids()
    expected = _generate(model, ids, num_beams=3)
    for attention in ("auto", "whole_layer"):
        with kvoffload.offload(model, kvoffload.OffloadConfig(split=0.5, attention=attention, **SMALL)):
            _equal(_generate(model, ids, num_beams=3), expected)


def test_a_given_split_uses_a_profile_that_is_stored_and_measures_none(
    device: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, ids = make_model("opt").cuda(), _ids()
    config = kvoffload.OffloadConfig(split=0.5, **SMALL)

    def predicted_s() -> float | None:
        with kvoffload.offload(model, config) as session:
            _generate(model, ids)
        assert session.stats is not None
        return session.stats.predicted_step_s

    assert predicted_s() is None  # there is none, and none is made
    assert not list(tmp_path.rglob("*.json"))
    preset = kvoffload.HardwareProfile.preset("a100-40gb-pcie4")
    path = stored.store(replace(preset, key=machine_key(DEVICE), method=METHOD))
    assert predicted_s() is not None
    path.write_text("{")
    assert predicted_s() is None
    assert "done without a profile" in caplog.text
    assert str(path) in caplog.text


def test_turns_and_a_prefill_in_chunks(device: FakeCuda) -> None:
    model, ids = make_model("opt").cuda(), _ids()
    first = _generate(model, ids)
    more = torch.cat([first.sequences, _ids(9)], dim=1)
    expected = _generate(model, more)
    with kvoffload.offload(model, kvoffload.OffloadConfig(split=0.5, **SMALL)) as session:
        cache = session.new_cache()
        _equal(_generate(model, ids, **given(cache), prefill_chunk_size=16), first)
        assert test_gpu._distance(_generate(model, more, **given(cache)), expected) <= TOLERANCE
        assert session.stats is not None
        assert session.stats.h2d_bytes > 0


def test_a_session_on_a_stream_of_the_users_own(device: FakeCuda) -> None:
    model, ids = make_model("llama").cuda(), _ids()
    expected = _generate(model, ids)
    with (
        torch.cuda.stream(torch.cuda.Stream()),
        kvoffload.offload(model, kvoffload.OffloadConfig(split="transfer", **SMALL)),
    ):
        _equal(_generate(model, ids), expected)
    assert (1, "waits") in device.streams.log  # what was waited for on that stream, not on the default one
    assert (0, "waits") not in device.streams.log


def test_a_session_while_another_device_is_the_current_one(device: FakeCuda) -> None:
    model, ids = make_model("llama").cuda(), _ids()
    expected = _generate(model, ids)
    device.streams.current_device = 1
    with kvoffload.offload(model, kvoffload.OffloadConfig(split=0.5, **SMALL | {"device_gib": "auto"})):
        _equal(_generate(model, ids), expected)
    assert device.streams.current_device == 1


def test_a_session_without_pinned_memory(device: FakeCuda) -> None:
    model, ids = make_model("llama").cuda(), _ids()
    expected = _generate(model, ids)
    device.lockable_bytes = 0
    with kvoffload.offload(model, kvoffload.OffloadConfig(split=0.5, **SMALL)) as session:
        with pytest.warns(UserWarning, match="could not pin"):
            _equal(_generate(model, ids), expected)
        assert session.stats is not None
        assert session.stats.pinned_bytes == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of infinities
def test_the_kernels_are_launched_on_the_devices_tensors() -> None:
    with fake_cuda.fake_cuda("lazy") as fake:
        model, ids = make_model("llama", num_hidden_layers=1).cuda(), _ids(20)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        expected = _generate(model, ids, attention_mask=mask, max_new_tokens=4, num_beams=2)
        with kvoffload.offload(model, kvoffload.OffloadConfig(split=0.5, **SMALL)):
            found = _generate(model, ids, attention_mask=mask, max_new_tokens=4, num_beams=2)
        _equal(found, expected)
        assert fake.streams.calls["kernel"] > 10


# ---- memory --------------------------------------------------------------------------------------------------------


def _wide() -> Any:
    return make_model("llama", hidden_size=128, head_dim=32, num_key_value_heads=4, max_position_embeddings=1024).cuda()


def test_auto_takes_what_is_free_and_prefills_in_chunks_where_that_is_little(device: FakeCuda) -> None:
    model, ids = _wide(), _ids(300)
    expected = _generate(model, ids, max_new_tokens=6)
    config = kvoffload.OffloadConfig(split="transfer", block_tokens=16)
    shares = []
    for room in (2**27, 5 * 2**20, 3 * 2**19):
        device.memory.others_bytes = device.memory.free_bytes + device.memory.others_bytes - room
        start = device.memory.allocated_bytes
        torch.cuda.reset_peak_memory_stats()
        with kvoffload.offload(model, config) as session:
            _equal(_generate(model, ids, max_new_tokens=6), expected)
            assert session.stats is not None
            plan = session.stats.plan
            shares.append(plan.resident_kv_blocks / plan.num_blocks)
        assert torch.cuda.max_memory_allocated() - start <= room
    assert shares[0] == 1
    assert shares[-1] < 0.5


def test_a_cap_on_the_process_is_kept(device: FakeCuda) -> None:
    model, ids = _wide(), _ids(300)
    expected = _generate(model, ids, max_new_tokens=6)
    cap_bytes = device.memory.allocated_bytes + 7 * 2**19
    torch.cuda.set_per_process_memory_fraction(cap_bytes / device.memory.total_bytes)
    with kvoffload.offload(model, kvoffload.OffloadConfig(split="transfer", block_tokens=16)) as session:
        _equal(_generate(model, ids, max_new_tokens=6), expected)
        assert session.stats is not None
        assert session.stats.h2d_bytes > 0


def test_memory_that_runs_out_in_the_prefill_leaves_the_session_usable(device: FakeCuda) -> None:
    model, ids = _wide(), _ids(300)
    expected = _generate(model, ids, max_new_tokens=6)
    with kvoffload.offload(
        model, kvoffload.OffloadConfig(split=0.5, block_tokens=16, device_gib=3.6 * 2**20 / GIB)
    ) as session:
        device.memory.others_bytes = device.memory.free_bytes - 3 * 2**20
        with pytest.raises(torch.OutOfMemoryError):
            _generate(model, ids, max_new_tokens=6)
        device.memory.others_bytes = 0
        _equal(_generate(model, ids, max_new_tokens=6), expected)
        assert session.stats is not None
        assert session.stats.h2d_bytes > 0
    assert device.registered == {}


# ---- what runs on a real device ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_logits_equal_those_without_offloading", ("qwen3", "recompute", 1, "auto")),
        ("test_logits_equal_those_without_offloading", ("mixtral", 0.5, 3, "whole_layer")),
        ("test_declared_accesses_are_ordered_by_events", (0.5, "auto")),
        ("test_bfloat16_distance_is_reported", ("transfer", "whole_layer", lambda name, value: None)),
        ("test_nothing_is_left_after_an_exception", ()),
    ],
)
def test_tests_for_a_gpu_run_on_the_fake(name: str, arguments: Any, device: FakeCuda) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "bfloat16")
        getattr(test_gpu, name)(*arguments)
    assert device.registered == {}
