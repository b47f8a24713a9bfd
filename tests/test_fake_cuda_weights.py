"""A model in host memory and a CUDA device that is not there (fake_cuda.py): weights stream there, and come back."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from commands import run
from fake_cuda import FakeCuda
from fake_cuda_kernels import use_twins
from fake_cuda_tensors import DEVICE
from interrupting import interrupted, lines_of
from streaming import kept_gib, sizes_of, streamable, weights_as_before
from test_callbacks import tokenizer
from transformers import PreTrainedModel

import kvoffload
from kvoffload import InfeasiblePlanError, OffloadConfig
from kvoffload.backend import CudaBackend
from kvoffload.cli import answering
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.session import memory_limits
from kvoffload.session.model_weights import ModelWeights

LAYERS = 6
SMALL: dict[str, Any] = {"block_tokens": 8, "chunk_blocks": 2, "split": "transfer", "profile": "a100-40gb-pcie4"}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    use_twins(monkeypatch)
    with fake_cuda.fake_cuda("lazy") as fake:
        yield fake


@pytest.fixture
def model() -> PreTrainedModel:
    return streamable("llama")


def config(gib: Any = "auto", **options: Any) -> OffloadConfig:
    return OffloadConfig(device="cuda", device_weights_gib=gib, **{**SMALL, **options})


def _ids(rows: int = 2, tokens: int = 21) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + tokens)
    return torch.randint(3, 90, (rows, tokens), generator=generator)


def _generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(ids.to(model.device), max_new_tokens=10, do_sample=False, **options)
    return found.cpu()


def _limit(device: FakeCuda, free_bytes: int) -> None:
    """That much is free on the device now."""
    device.memory.others_bytes = device.memory.total_bytes - device.memory.allocated_bytes - free_bytes


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["slabs", "some", "all", "auto"])
@pytest.mark.parametrize("kind", ["llama", "opt", "tied", "int8"])
def test_tokens_are_those_of_the_cpu_and_everything_comes_back(kind: str, kept: str, device: FakeCuda) -> None:
    model, ids = streamable(kind), _ids()
    wanted = _generate(model, ids)
    gib = {"slabs": kept_gib(model, 0), "some": kept_gib(model, 2)}.get(kept, kept)
    sizes = sizes_of(model)
    with weights_as_before(model):
        with kvoffload.offload(model, config(gib)) as session:
            assert isinstance(session.backend, CudaBackend)
            assert model.device == DEVICE
            assert model.get_input_embeddings().weight.device == DEVICE
            assert torch.equal(_generate(model, ids), wanted)
            assert session.stats is not None
            streams = kept in ("slabs", "some")
            assert (session.stats.weight_bytes > 0) == streams
            if streams:
                number = {"slabs": 0, "some": 2}[kept]
                assert session.stats.device_weight_bytes == sizes.device_bytes(number) - sizes.outside
                layers: Any = session._offloaded._weights._layers
                pinned = sum(-(-layer.num_bytes // 4096) * 4096 for layer in layers)
                assert sum(device.registered.values()) == session.stats.pinned_bytes + pinned
        assert device.registered == {}
        assert torch.equal(_generate(model, ids), wanted)
    del session
    gc.collect()
    assert device.memory.allocated_bytes == 0


@pytest.mark.parametrize("gib", ["slabs", "all"])
def test_everything_comes_back_after_an_exception(model: PreTrainedModel, gib: str, device: FakeCuda) -> None:
    ids, forwards = _ids(), 0
    wanted = _generate(model, ids)

    def fails(*args: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 3:
            raise ValueError("in the middle")

    layers: Any = model.model.layers
    handle = layers[2].mlp.register_forward_pre_hook(fails)
    options = config(kept_gib(model, 0) if gib == "slabs" else gib)
    with weights_as_before(model):
        with pytest.raises(ValueError, match="in the middle"), kvoffload.offload(model, options):
            _generate(model, ids)
        handle.remove()
    assert torch.equal(_generate(model, ids), wanted)
    gc.collect()
    assert device.registered == {}
    assert device.memory.allocated_bytes == 0


def test_values_that_were_changed_on_the_device_come_back(model: PreTrainedModel, device: FakeCuda) -> None:
    layers: Any = model.model.layers
    changed = [model.get_input_embeddings().weight, *(layers[idx].mlp.up_proj.weight for idx in (0, 1))]
    wanted = [-one.detach().clone() for one in changed]
    with kvoffload.offload(model, config(kept_gib(model, 3))), torch.no_grad():
        for one in changed:
            one.neg_()
    for one, values in zip(changed, wanted, strict=True):
        assert one.device.type == "cpu"
        assert torch.equal(one, values)


@pytest.mark.parametrize("gib", ["slabs", "all"])
def test_an_expanded_buffer_comes_back_as_it_was(model: PreTrainedModel, gib: str, device: FakeCuda) -> None:
    buffer = torch.ones(1, 4).expand(3, 4)
    model.model.register_buffer("expanded", buffer, persistent=False)  # type: ignore[union-attr]
    with weights_as_before(model):
        with kvoffload.offload(model, config(kept_gib(model, 1) if gib == "slabs" else gib)):
            assert model.model.expanded.device == DEVICE  # type: ignore[union-attr]
        assert model.model.expanded.data_ptr() == buffer.data_ptr()  # type: ignore[union-attr, operator]


def test_parameters_over_one_memory_come_back_over_one_memory(model: PreTrainedModel, device: FakeCuda) -> None:
    model.lm_head.weight.data = model.get_input_embeddings().weight.data  # type: ignore[union-attr, operator]
    with kvoffload.offload(model, config(kept_gib(model, 1))):
        assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()  # type: ignore[union-attr, operator]
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()  # type: ignore[union-attr, operator]


def test_a_model_whose_dtype_changed_comes_back_in_the_new_one(model: PreTrainedModel, device: FakeCuda) -> None:
    with kvoffload.offload(model, config(kept_gib(model, 2))):
        model.half()
    assert {(one.device.type, one.dtype) for one in model.parameters()} == {("cpu", torch.float16)}


def test_a_close_that_was_interrupted_anywhere_gives_everything_back(model: PreTrainedModel, device: FakeCuda) -> None:
    options, files = config(kept_gib(model, 1)), ("session/model_weights.py", "store/layer_weights.py")
    total = lines_of(kvoffload.offload(model, options).close, files)
    for at in range(0, total, total // 12):
        with weights_as_before(model):
            session = kvoffload.offload(model, options)
            assert interrupted(session.close, files, at)
            session.close()
            assert device.registered == {}
        del session
        gc.collect()
        assert device.memory.allocated_bytes == 0


# ---- how much stays --------------------------------------------------------------------------------------------------


def _wide() -> PreTrainedModel:
    """Weights beside which caches of a few rows are large."""
    return streamable("llama", 8, hidden_size=64, intermediate_size=256, head_dim=16)


def test_auto_leaves_all_weights_on_a_device_with_room_and_streams_on_one_without(device: FakeCuda) -> None:
    model = _wide()
    sizes = sizes_of(model)
    for free_bytes, streams in ((2 * sizes.total, False), (sizes.total, True)):
        _limit(device, free_bytes)
        with weights_as_before(model), kvoffload.offload(model, config()) as session:
            assert (session.engine.weights is not None) == streams
        del session
        gc.collect()


def test_under_auto_a_generate_says_how_many_layers_stay(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _wide()
    sizes = sizes_of(model)
    wanted = {rows: _generate(model, _ids(rows)) for rows in (1, 3)}
    _limit(device, int(1.1 * sizes.total))
    changes: list[int] = []
    keep = ModelWeights.keep

    def noted(self: ModelWeights, number: int) -> None:
        changes.append(number)
        keep(self, number)

    monkeypatch.setattr(ModelWeights, "keep", noted)
    with weights_as_before(model), kvoffload.offload(model, config()) as session:
        weights = session._offloaded._weights
        assert weights.num_resident == 0  # nobody knows yet what a cache takes
        kept: list[int] = []
        held: list[int] = []
        for rows in (1, 3, 3, 1, 1):
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            assert torch.equal(_generate(model, _ids(rows)), wanted[rows])
            assert torch.cuda.max_memory_allocated() <= device.memory.total_bytes - device.memory.others_bytes
            kept.append(weights.num_resident)
            held.append(device.memory.allocated_bytes)
            assert session.stats is not None
            assert session.stats.weight_bytes > 0
        few, more = min(kept), max(kept)
        assert 0 < few < more < 8
        assert kept == [more, few, few, more, more]
        assert held[4] == held[3] == held[0]  # slabs of other sizes and numbers of layers are gone
        assert changes == [0, more, few, more]
    gc.collect()
    assert device.memory.allocated_bytes == 0


def test_a_prefill_is_planned_in_slices_where_the_layers_allow_them(
    device: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, slices = _wide(), []
    monkeypatch.setattr("kvoffload.planning.memory.BUSY_TOKENS", 2 * 21)
    slice_rows = ModelWeights.slice_rows

    def noted(self: ModelWeights, rows: int | None) -> None:
        slices.append(rows)
        slice_rows(self, rows)

    monkeypatch.setattr(ModelWeights, "slice_rows", noted)
    with kvoffload.offload(model, config(kept_gib(model, 1))):
        _generate(model, _ids(6))
        layers: Any = model.model.layers
        layers[3].mlp.register_forward_hook(lambda *args: None)
        _generate(model, _ids(6))
    assert slices == [2, None, 6, None]


def test_a_device_that_fills_up_between_two_calls_costs_one_of_them(device: FakeCuda) -> None:
    model = _wide()
    sizes, wanted = sizes_of(model), _generate(model, _ids(1))
    _limit(device, int(1.2 * sizes.total))
    with weights_as_before(model), kvoffload.offload(model, config()) as session:
        assert torch.equal(_generate(model, _ids(1)), wanted)
        session._offloaded._weights.keep(1)
        free = device.memory.free_bytes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory_limits, "free_device_bytes", lambda _: free)
            _limit(device, 2 * sizes.slab)
            with pytest.raises(torch.OutOfMemoryError):
                _generate(model, _ids(1))
        assert session._offloaded._weights.num_resident == 0
        assert torch.equal(_generate(model, _ids(1)), wanted)
        device.memory.others_bytes = 0
        assert torch.equal(_generate(model, _ids(1)), wanted)
        assert session._offloaded._weights.num_resident == 8
    gc.collect()
    assert device.memory.allocated_bytes == 0


def test_a_little_more_room_moves_no_layer(model: PreTrainedModel, device: FakeCuda) -> None:
    model = streamable("llama", 32)
    with kvoffload.offload(model, config(kept_gib(model, 5))) as session:
        weights = session._offloaded._weights
        weights._config = config("auto")
        stays = [layer for layer in weights._layers if layer.is_resident]
        for number, kept in ((6, 5), (7, 5), (8, 8), (7, 7), (9, 7)):
            room = weights.sizes.device_bytes(number) - weights.sizes.outside
            weights.fit(lambda room=room: room)
            assert weights.num_resident == kept
            if kept == 5:
                assert [layer for layer in weights._layers if layer.is_resident] == stays


def test_a_cap_on_the_process_is_kept(device: FakeCuda) -> None:
    model = _wide()
    sizes = sizes_of(model)
    torch.cuda.set_per_process_memory_fraction(1.35 * sizes.total / device.memory.total_bytes)
    with kvoffload.offload(model, config()) as session:
        assert session.engine.weights is not None
        _generate(model, _ids(1))
        assert session._offloaded._weights.num_resident > 0


def test_a_device_that_is_too_small_for_two_slabs_is_refused(model: PreTrainedModel, device: FakeCuda) -> None:
    _limit(device, sizes_of(model).least)  # of which a tenth is left alone
    with weights_as_before(model), pytest.raises(InfeasiblePlanError, match=r"at least .* are missing"):
        kvoffload.offload(model, config())
    gc.collect()
    assert device.memory.allocated_bytes == 0
    assert device.registered == {}


def test_a_device_that_fills_up_while_weights_move_leaves_the_model_as_it_was(device: FakeCuda) -> None:
    model, ids = _wide(), _ids(1)
    wanted, sizes = _generate(model, ids), sizes_of(model)
    for gib, free_bytes in (("all", sizes.total // 2), (kept_gib(model, 4), sizes.device_bytes(2))):
        _limit(device, free_bytes)
        with weights_as_before(model), pytest.raises(torch.OutOfMemoryError):
            kvoffload.offload(model, config(gib))
        gc.collect()
        assert device.memory.allocated_bytes == 0
        assert device.registered == {}
        assert torch.equal(_generate(model, ids), wanted)


# ---- pinned memory ---------------------------------------------------------------------------------------------------


def test_memory_of_weights_is_unpinned_and_not_kept_for_other_sessions(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_twins(monkeypatch)
    with fake_cuda.fake_cuda("lazy", keeps_pinned=True) as fake:
        with kvoffload.offload(model, config(kept_gib(model, 0), device_gib="min")) as session:
            _generate(model, _ids())
            slabs = {layer.source.data_ptr() for layer in session._offloaded._weights._layers}
            assert slabs <= set(fake.registered)
            of_the_cache = set(fake.registered) - slabs
            assert of_the_cache
        layers: Any = model.model.layers
        assert all({one.data_ptr() for one in layer.parameters()} & slabs for layer in layers)  # theirs for good
        assert set(fake.registered) == of_the_cache
        values = [one.detach().clone() for one in model.parameters()]
        other = streamable("opt").cuda()
        with kvoffload.offload(other, OffloadConfig(**SMALL, device_gib="min")):
            _generate(other, _ids())
        assert all(torch.equal(one, value) for one, value in zip(model.parameters(), values, strict=True))
        assert not slabs & set(fake.registered)


def test_weights_that_cannot_be_pinned_stream_from_pageable_memory(model: PreTrainedModel, device: FakeCuda) -> None:
    ids = _ids()
    wanted = _generate(model, ids)
    device.lockable_bytes = 3 * 4096 * (1 + sizes_of(model).slab // 4096)
    with weights_as_before(model):
        with pytest.warns(UserWarning, match="pin") as told:
            session = kvoffload.offload(model, config(kept_gib(model, 0)))
        messages = [str(one.message) for one in told if "pin" in str(one.message)]
        assert len(messages) == 1, "told once"
        assert "could not pin" in messages[0]
        assert "ulimit -l" in messages[0]
        assert 0 < len(device.registered) < LAYERS
        with session:
            assert torch.equal(_generate(model, ids), wanted)
        assert device.registered == {}


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["--device", "cuda"], "into host memory for cuda"),
        (["--device", "cuda:0", "--device-weights-gib", "all"], "into host memory for cuda:0"),
        (["--device", "cuda", "--device-weights-gib"], "into host memory for cuda"),
        (["--device-weights-gib"], "into host memory for cuda"),
        ([], "on cuda"),
    ],
)
def test_generate_loads_into_host_memory_and_offloads_to_the_device(
    options: list[str], where: str, device: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamable("llama").bfloat16()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    streams = options[-1:] == ["--device-weights-gib"]
    options = [*options, str(1.2 * kept_gib(model, 1))] if streams else options
    began: list[tuple[str, OffloadConfig]] = []
    offload = answering.offload

    def noted(model: Any, config: OffloadConfig) -> Any:
        began.append((str(model.device), config))
        return offload(model, replace(config, profile="a100-40gb-pcie4", split="transfer"))

    preset = HardwareProfile.preset("a100-40gb-pcie4")
    monkeypatch.setattr("kvoffload.profiler.stored.load_or_measure", lambda *_args, **_named: preset)
    monkeypatch.setattr(answering, "offload", noted)
    result = run("generate", "w5 w6 w7", "--model", tmp_path, "--max-new-tokens", 4, "--compare", "--json", *options)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[0] == f"loading {tmp_path} {where}"
    assert began[0][0] == ("cuda:0" if where == "on cuda" else "cpu")
    assert (began[0][1].device is None) == (where == "on cuda")
    found = json.loads(result.stdout)
    assert found["tokens_equal"] is True
    assert (found["stats"]["weight_bytes"] > 0) == streams
