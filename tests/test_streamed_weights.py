"""Tokens and logits with weights streamed from the host are those of plain `generate()`, and every byte is counted."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from matrix import FAST_LINK, checking_backend, pairwise, profile
from modes import KINDS, Shape, given, prompt
from streaming import (
    FACTORS,
    LAYERS,
    Cell,
    check_cell,
    config,
    full_product,
    kept_gib,
    run_streamed,
    sizes_of,
    streamable,
    weights_as_before,
)
from transformers import PreTrainedModel

import kvoffload
from kvoffload import ConfigError, EmulatedLink, KVOffloadError, OffloadConfig
from kvoffload.config import GIB
from kvoffload.machine.quantities import Curve, Point
from kvoffload.model.model_shape import model_shape
from kvoffload.planning.rates import rates_from_profile
from kvoffload.session.session import Session

CELLS = pairwise(FACTORS, Cell)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_tokens_and_logits_are_those_of_plain_generate(cell: Cell) -> None:
    run = check_cell(cell)
    per_forward = run.sizes.streamed_bytes(cell.num_resident)
    assert per_forward
    passes = sum(stats.weight_bytes for stats in run.stats) / per_forward
    if cell.mode == "prompt_lookup" and cell.split != "transfer":
        assert passes >= run.forwards  # a crop recomputes the block that it reopens, outside its layer's forward
    elif cell.pipeline != "drafts":  # which have forwards of their own
        assert passes == run.forwards
    for stats in run.stats:
        assert stats.device_weight_bytes == run.sizes.device_bytes(cell.num_resident) - run.sizes.outside
        assert stats.plan.weight_bytes_per_step == per_forward
        assert stats.plan.weight_device_bytes == stats.device_weight_bytes
        assert stats.h2d_bytes >= stats.weight_bytes


@pytest.mark.slow
@pytest.mark.parametrize("cell", list(full_product()), ids=str)
def test_the_full_product(cell: Cell) -> None:
    check_cell(cell)


@pytest.fixture
def model() -> PreTrainedModel:
    return streamable("llama")


@pytest.mark.parametrize("num_resident", [0, 2, 3])
def test_each_step_moves_each_streamed_layer_exactly_once(model: PreTrainedModel, num_resident: int) -> None:
    run = run_streamed(model, KINDS["greedy"](Shape()), config(model, num_resident))
    layers, slab = LAYERS - num_resident, sizes_of(model).slab
    assert run.stats[0].weight_bytes == run.forwards * layers * slab
    assert run.stats[0].h2d_bytes == run.stats[0].weight_bytes + sum(
        stats.h2d_bytes for stats in run_streamed(model, KINDS["greedy"](Shape()), config(model, LAYERS)).stats
    )


def test_no_weights_travel_for_a_step_that_never_comes(model: PreTrainedModel) -> None:
    for new_tokens in (1, 2, 5):
        with Session(model, config(model, 1, split="transfer", device_gib=0.01), checking_backend()) as session:
            model.generate(prompt(2, 20), max_new_tokens=new_tokens)
            session.backend.synchronize()
            carried = session.backend.link_use("h2d").copied_bytes
            kept = sizes_of(model).layers[0]
            assert carried == kept + new_tokens * 5 * sizes_of(model).slab


def test_the_statistics_say_what_the_link_carried_also_where_a_chunk_is_timed() -> None:
    model = streamable("opt")  # multi-head: "auto" times a chunk in the first forward
    options = config(model, 1, split="auto", device_gib="min")
    with Session(model, options, checking_backend()) as session:
        model.generate(prompt(2, 40), max_new_tokens=6)
        session.backend.synchronize()
        assert session.stats is not None
        kept = sizes_of(model).layers[0]
        timed = session.backend.link_use("h2d").copied_bytes - kept - session.stats.h2d_bytes
        assert timed == 0  # an emulated link is not timed, its speed is given


def test_device_memory_is_what_was_planned_and_none_is_taken_in_a_step(model: PreTrainedModel) -> None:
    backend, taken, forwards = checking_backend(), [], []

    def counted(original: Any) -> Any:
        def allocate(num_bytes: int) -> Any:
            taken.append(num_bytes)
            return original(num_bytes)

        return allocate

    backend.inner.allocate_device = counted(backend.inner.allocate_device)  # type: ignore[method-assign]
    backend.inner.allocate_host = counted(backend.inner.allocate_host)  # type: ignore[method-assign]
    model.register_forward_pre_hook(lambda *args: forwards.append(len(taken)))
    with Session(model, config(model, 2, device_gib=0.001), backend) as session:
        model.generate(prompt(2, 37), max_new_tokens=12)
        assert len(set(forwards[1:])) == 1, "memory was taken in a decode step"
        stats, sizes = session.stats, sizes_of(model)
        assert stats is not None
        slabs = [slab.bytes.numel() for slab in session.engine.weights._slabs]  # type: ignore[union-attr]
        assert slabs == [sizes.slab] * 2
        assert stats.device_weight_bytes == sum(slabs) + 2 * sizes.layers[0] == stats.plan.weight_device_bytes
        assert stats.device_kv_peak_decode_bytes <= 1.02 * 0.001 * GIB


def test_everything_on_the_device_changes_nothing(model: PreTrainedModel) -> None:
    for options in ({}, {"device_weights_gib": "all"}, {"device_weights_gib": 1.0}, {"device": "cpu"}):
        before = [(layer.forward, parameter.data_ptr()) for layer, parameter in _first(model)]
        with kvoffload.offload(model, OffloadConfig(link=FAST_LINK, **options)) as session:
            assert [(layer.forward, parameter.data_ptr()) for layer, parameter in _first(model)] == before
            assert session.engine.weights is None


def _first(model: Any) -> list[Any]:
    return [(layer, next(layer.parameters())) for layer in model.model.layers]


def test_a_plain_forward_works_while_offloaded(model: PreTrainedModel) -> None:
    ids = prompt(2, 9)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    with Session(model, config(model, 1), checking_backend()):
        assert torch.equal(model(ids, use_cache=False).logits, wanted)
        assert torch.equal(model(ids).logits, wanted)  # with a cache of transformers
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(model(ids).logits, wanted)


def test_a_custom_loop_and_a_crop_that_recomputes_outside_any_layer() -> None:
    model = streamable("opt")  # multi-head: activations are half of K and V
    ids = prompt(2, 30)
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
        with Session(model, config(model, 0, split="recompute"), checking_backend()) as session:
            cache = session.new_cache()
            model(ids, **given(cache))
            keys = cache.layers[1].keys  # read back: recomputed outside its layer
            assert keys is not None
            assert keys.shape[2] == 30
            cache.crop(-5)  # reopens a block of activations
            found = model(ids[:, 25:], **given(cache)).logits[:, -1]
            assert session.engine.weights is not None
    assert (found - wanted).abs().max() < 1e-5


def test_weights_that_change_between_calls_are_seen(model: PreTrainedModel) -> None:
    mode = KINDS["greedy"](Shape())
    with Session(model, config(model, 1), checking_backend()) as session:
        mode.run(model, session.new_cache)
        with torch.no_grad():
            for idx, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
                weight = layer.self_attn.q_proj.weight
                if idx % 2:
                    weight.neg_()
                else:
                    weight.data = -weight.data
        found = mode.run(model, session.new_cache)
    wanted = mode.run(model, None)
    assert torch.equal(found[0].sequences, wanted[0].sequences)


def test_the_timeline_shows_weights_in_a_lane_of_their_own(model: PreTrainedModel) -> None:
    with Session(model, config(model, 1, split="transfer", device_gib="min"), checking_backend()) as session:
        session.record_timeline()
        model.generate(prompt(2, 37), max_new_tokens=8)
        found = session.timeline()
        assert session.stats is not None
        weights = found.lane("weights")
        assert sum(span.num_bytes for span in weights) == session.stats.weight_bytes
        assert sum(span.num_bytes for span in found.lane("h2d")) == session.stats.h2d_bytes - session.stats.weight_bytes
        link = sorted([*weights, *found.lane("h2d")], key=lambda span: span.start_s)
        assert all(one.end_s <= other.start_s + 1e-9 for one, other in itertools.pairwise(link)), "one link, one order"


def test_chunks_of_a_layer_and_weights_of_the_next_travel_mixed() -> None:
    model = streamable("llama")
    options = config(model, 0, split="transfer", device_gib="min", chunk_blocks=1, slots=3)
    backend, order = checking_backend(), []
    original = backend.inner.copy_to_device

    def noted(dst: Any, src: Any, after: Any, *, lane: Any = "h2d") -> Any:
        order.append(lane)
        return original(dst, src, after, lane=lane)

    backend.inner.copy_to_device = noted  # type: ignore[method-assign]
    with Session(model, options, backend) as session:
        session.engine.weights._piece_bytes = 4096  # type: ignore[union-attr]
        model.generate(prompt(2, 61), max_new_tokens=6)
    half = order[len(order) // 2 : -20]  # decode steps; behind the last layer's chunks come no weights
    runs = [len(list(group)) for _, group in itertools.groupby(half)]
    assert {"h2d", "weights"} == set(half)
    assert max(runs) <= 4, "neither keeps the link to itself"


def test_weights_that_cannot_be_pinned_are_planned_at_the_rate_of_pageable_memory() -> None:
    machine = profile()
    slow = Curve(unit="bytes", points=tuple(Point((size,), size / 0.5e9, 0.0) for size in (1e3, 1e9)))
    measured = replace(machine, curves={**machine.curves, "h2d_pageable": slow})
    shape = model_shape(streamable("llama").config)
    for is_pinned, wanted in ((True, None), (False, 0.5e9)):
        rates = rates_from_profile(
            measured, shape, batch=1, block_tokens=4, chunk_blocks=2, weights_are_pinned=is_pinned
        )
        assert rates.weights_bytes_per_s == (None if wanted is None else pytest.approx(wanted))
        assert rates.weights_s(1e9) == pytest.approx(1e9 / (wanted or rates.h2d_bytes_per_s["kv"]))


def test_a_compiled_model_streams_between_its_graphs() -> None:
    model = streamable("llama")
    wanted = model.generate(prompt(2, 20), max_new_tokens=4)
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="is compiled"):
        session = Session(model, config(model, 1, attention="whole_layer"), checking_backend())
    with session:
        assert torch.equal(model.generate(prompt(2, 20), max_new_tokens=4), wanted)
        assert session.stats is not None
        assert session.stats.weight_bytes == 4 * session.stats.plan.weight_bytes_per_step


# ---- failures --------------------------------------------------------------------------------------------------------


class _InTheMiddle(Exception):
    pass


@pytest.mark.parametrize("error", [_InTheMiddle, KeyboardInterrupt])
@pytest.mark.parametrize("layer_idx", [0, 2, 5])
def test_an_interrupt_in_the_middle_of_a_step_leaves_the_model_usable(
    model: PreTrainedModel, layer_idx: int, error: type[BaseException]
) -> None:
    ids, forwards = prompt(2, 20), 0

    def interrupt(*args: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 3:
            raise error

    wanted = model.generate(ids, max_new_tokens=8)
    layers: Any = model.model.layers  # type: ignore[union-attr]
    with weights_as_before(model):
        with Session(model, config(model, 1), checking_backend()):
            handle = layers[layer_idx].mlp.register_forward_pre_hook(interrupt)
            with pytest.raises(error):
                model.generate(ids, max_new_tokens=8)
            handle.remove()
            assert torch.equal(model.generate(ids, max_new_tokens=8), wanted)
        assert torch.equal(model.generate(ids, max_new_tokens=8), wanted)


def test_an_interrupt_while_a_layer_waits_for_its_weights_leaves_the_session_usable(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, waits = checking_backend(), 0
    wait = backend.inner.compute_waits

    def interrupted(event: Any) -> None:
        nonlocal waits
        waits += 1
        if waits == 9:
            raise KeyboardInterrupt
        wait(event)

    wanted = model.generate(prompt(2, 20), max_new_tokens=8)
    with weights_as_before(model), Session(model, config(model, 0, split="transfer"), backend):
        monkeypatch.setattr(backend.inner, "compute_waits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt(2, 20), max_new_tokens=8)
        assert torch.equal(model.generate(prompt(2, 20), max_new_tokens=8), wanted)


def test_what_a_forward_that_failed_brought_ahead_is_not_what_generate_reads(model: PreTrainedModel) -> None:
    def fail(*args: Any) -> None:
        raise _InTheMiddle

    layers: Any = model.model.layers  # type: ignore[union-attr]
    with torch.no_grad(), Session(model, config(model, 0), checking_backend()):
        handle = layers[0].mlp.register_forward_pre_hook(fail)
        with pytest.raises(_InTheMiddle):
            model(prompt(2, 9))  # the second layer is on its way by then
        handle.remove()
        layers[0].self_attn.q_proj.weight.data.neg_()
        layers[1].self_attn.q_proj.weight.data.neg_()
        found = model.generate(prompt(2, 20), max_new_tokens=8)
    assert torch.equal(found, model.generate(prompt(2, 20), max_new_tokens=8))


@pytest.mark.parametrize("way", ["in place", "replaced"])
def test_weights_that_change_between_forwards_of_ones_own_are_seen(model: PreTrainedModel, way: str) -> None:
    ids = prompt(2, 9)
    with torch.no_grad(), Session(model, config(model, 2), checking_backend()) as session:
        model(ids)
        for layer in model.model.layers:  # type: ignore[union-attr]
            weight = layer.self_attn.q_proj.weight
            if way == "in place":
                weight.data.neg_()
            else:
                weight.data = -weight.data
        found, cached = model(ids).logits, model(ids, **given(session.new_cache())).logits
    with torch.no_grad():
        wanted = model(ids).logits
    assert torch.equal(found, wanted)
    assert torch.equal(cached, wanted)


def test_a_model_whose_dtype_changed_stays_as_it_was_changed(model: PreTrainedModel) -> None:
    with Session(model, config(model, 2), checking_backend()):
        model.half()
        with pytest.raises(KVOffloadError, match=r"close\(\) the session before"):
            model.generate(prompt(1, 4), max_new_tokens=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_training_through_streamed_weights_is_refused(model: PreTrainedModel) -> None:
    model.train()
    with (
        Session(model, config(model, 0), checking_backend()),
        pytest.raises(KVOffloadError, match="gradients do not flow"),
    ):
        model(prompt(1, 4))
    model.eval()


def test_gradients_are_refused_where_they_are_asked_for(model: PreTrainedModel) -> None:
    ids = prompt(2, 9)
    with torch.no_grad():
        wanted = model(ids).logits
    with Session(model, config(model, 2), checking_backend()):
        found = model(ids, labels=ids)
        assert torch.equal(found.logits, wanted)
        with pytest.raises(KVOffloadError, match="gradients do not flow"):
            found.loss.backward()
        model.requires_grad_(False)
        head: Any = model.lm_head
        head.weight.grad = None
        head.requires_grad_(True)  # of what comes behind all layers they are right
        model(ids, labels=ids).loss.backward()
        assert head.weight.grad is not None
    expected = head.weight.grad.clone()
    head.weight.grad = None
    model(ids, labels=ids).loss.backward()
    assert torch.allclose(head.weight.grad, expected, atol=1e-6)


def test_an_error_while_weights_are_moved_leaves_the_model_as_it_was(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, made = checking_backend(), 0
    allocate = backend.inner.allocate_host

    def fails(num_bytes: int) -> Any:
        nonlocal made
        made += 1
        if made == 3:
            raise MemoryError("no more")
        return allocate(num_bytes)

    monkeypatch.setattr(backend.inner, "allocate_host", fails)
    own = set(vars(model))
    with weights_as_before(model), pytest.raises(MemoryError):
        Session(model, config(model, 1), backend)
    assert set(vars(model)) == own
    ids = prompt(1, 5)
    assert model.generate(ids, max_new_tokens=3).shape == (1, 8)


def test_a_second_thread_in_a_forward_is_refused(model: PreTrainedModel) -> None:
    refused: list[BaseException] = []

    def other() -> None:
        try:
            model(prompt(1, 3))
        except KVOffloadError as error:
            refused.append(error)

    def in_between(*args: Any) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    layers: Any = model.model.layers  # type: ignore[union-attr]
    with Session(model, config(model, 0), checking_backend()):
        handle = layers[1].mlp.register_forward_pre_hook(in_between)
        model(prompt(1, 3))
        handle.remove()
        assert "another thread" in str(refused[0])
        model(prompt(1, 3))


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_too_little_memory_for_two_slabs_is_refused_with_the_numbers(model: PreTrainedModel) -> None:
    least = sizes_of(model).least
    too_little = (least - 1) / GIB
    with weights_as_before(model), pytest.raises(ConfigError, match=r"at least .* two slabs of .* more"):
        kvoffload.offload(model, OffloadConfig(device_weights_gib=too_little, link=FAST_LINK))
    with kvoffload.offload(model, OffloadConfig(device_weights_gib=least / GIB, link=FAST_LINK)) as session:
        assert session.engine.weights is not None


@pytest.mark.parametrize("value", ["most", -1, 0, True, float("nan")])
def test_device_weights_gib_is_checked(value: Any) -> None:
    with pytest.raises(ConfigError, match="device_weights_gib"):
        OffloadConfig(device_weights_gib=value)


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "gpu", 3, ""])
def test_a_device_that_is_none_is_refused(device: Any, model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="device"):
        kvoffload.offload(model, OffloadConfig(device=device))


def test_parameters_without_values_are_refused_with_the_way_out(model: PreTrainedModel) -> None:
    model.model.layers[2].to("meta")  # type: ignore[union-attr]
    with pytest.raises(KVOffloadError, match=r"kvoffload\.load"):
        kvoffload.offload(model, OffloadConfig(device_weights_gib=1.0))


def test_host_memory_that_is_too_small_is_refused_with_the_numbers(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvoffload.machine.system_memory.available_bytes", lambda: 1000)
    with weights_as_before(model), pytest.raises(KVOffloadError, match=r"more host memory, .* are free"):
        kvoffload.offload(model, OffloadConfig(device_weights_gib=kept_gib(model, 2), host_gib=0.1, link=FAST_LINK))


def test_a_link_without_a_speed_streams_as_well(model: PreTrainedModel) -> None:
    wanted = model.generate(prompt(2, 20), max_new_tokens=8)
    options = OffloadConfig(device_weights_gib=kept_gib(model, 1), link=EmulatedLink())
    with kvoffload.offload(model, options) as session:
        assert torch.equal(model.generate(prompt(2, 20), max_new_tokens=8), wanted)
        assert session.stats is not None
        assert session.stats.weight_bytes > 0
