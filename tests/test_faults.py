"""Exceptions from anywhere, at any moment, and use after the end: a clear error, and nothing lost.

After every fault the model generates plainly, and the same as before; no hook, thread or memory of ours is left.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faults import config, generate, num_hooks
from faults import model_fixture as model_fixture
from faults import nothing_is_left as nothing_is_left
from faults import wanted_fixture as wanted_fixture
from matrix import TOLERANCE, checking_backend, distance
from models import make_model
from modes import COMMON, MODES, Outcome, given, outcome, prompt
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import kvoffload
from kvoffload import EmulatedLink, KVOffloadError
from kvoffload.backend import EmulatedBackend
from kvoffload.session.session import Session

# ---- exceptions from anywhere ----------------------------------------------------------------------------------------


class Planted(Exception):
    pass


class BrokenStreamer(BaseStreamer):
    def __init__(self) -> None:
        self.num_tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.num_tokens += 1
        if self.num_tokens == 5:
            raise Planted

    def end(self) -> None:
        pass


def failing_at(step: int, error: type[BaseException]) -> Callable[..., Any]:
    calls = []

    def callback(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == step:
            raise error
        return scores

    return callback


def check_after(session: Session, model: PreTrainedModel, wanted: Outcome) -> None:
    """The session serves the next call, and holds no memory of the failed one."""
    session.new_cache()
    assert session.pool.used_bytes == 0
    assert distance(outcome([generate(model)]), wanted) <= TOLERANCE


@pytest.mark.parametrize("error", [Planted, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("step", [1, 2, 7])
def test_an_exception_in_a_logits_processor(
    error: type[BaseException], step: int, model: PreTrainedModel, wanted: Outcome
) -> None:
    with kvoffload.offload(model, config()) as session:
        with pytest.raises(error):
            generate(model, logits_processor=[failing_at(step, error)])
        check_after(session, model, wanted)
    with pytest.raises(error), kvoffload.offload(model, config()) as session:
        generate(model, logits_processor=[failing_at(step, error)])
    assert session.is_closed
    assert session.pool.slab_bytes == 0


def test_a_cache_given_to_a_generate_that_failed_in_a_forward_is_not_used_again(
    model: PreTrainedModel, wanted: Outcome
) -> None:
    """It may have stopped between two layers, whose lengths then differ."""
    calls: list[int] = []

    def hook(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Planted

    with kvoffload.offload(model, config()) as session:
        cache = session.new_cache()
        handle = model.model.layers[1].mlp.register_forward_hook(hook)
        with pytest.raises(Planted):
            generate(model, **given(cache))
        handle.remove()
        with torch.no_grad(), pytest.raises(KVOffloadError, match=r"is over: take a new_cache\(\)"):
            model(prompt(3, 1), **given(cache))
        check_after(session, model, wanted)


@pytest.mark.parametrize("step", [1, 3])
def test_a_cache_given_to_a_generate_that_failed_between_two_forwards_goes_on(
    step: int, model: PreTrainedModel, wanted: Outcome
) -> None:
    with kvoffload.offload(model, config()) as session:
        cache = session.new_cache()
        with pytest.raises(Planted):
            generate(model, **given(cache), logits_processor=[failing_at(step, Planted)])
        tokens = wanted.sequences[0]
        known = tokens.shape[1] - COMMON["max_new_tokens"] + step
        assert cache.get_seq_length() == known - 1
        with torch.no_grad():
            logits = model(tokens[:, known - 1 : known], **given(cache)).logits[:, -1]
        assert (logits[0] - wanted.logits[step][0]).abs().max() <= TOLERANCE  # the row without padding
        cache.close()
        check_after(session, model, wanted)


def test_an_exception_in_a_streamer(model: PreTrainedModel, wanted: Outcome) -> None:
    with kvoffload.offload(model, config()) as session:
        with pytest.raises(Planted):
            model.generate(prompt(1), streamer=BrokenStreamer(), **COMMON)
        check_after(session, model, wanted)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("module", ["self_attn", "mlp", "self_attn.o_proj", "self_attn.k_proj"])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_exception_in_a_hook_between_any_two_layers(
    layer: int, module: str, call: int, model: PreTrainedModel, wanted: Outcome
) -> None:
    calls: list[int] = []

    def hook(*args: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise Planted

    with kvoffload.offload(model, config()) as session:
        handle = model.model.layers[layer].get_submodule(module).register_forward_hook(hook)
        try:
            # Recomputation leaves its own forward by an exception too, and may call the projections itself.
            with pytest.raises(Planted):
                generate(model)
        finally:
            handle.remove()
        check_after(session, model, wanted)


class FaultyBackend(EmulatedBackend):
    """Raises at its n-th call."""

    NAMES = ("allocate_host", "allocate_device", "copy_to_device", "copy_to_host", "compute_waits", "release")

    def __init__(self, error: type[BaseException], names: tuple[str, ...] = NAMES) -> None:
        super().__init__(EmulatedLink())
        self.error, self.names = error, names
        self.num_calls, self.fails_at = 0, -1

    def _count(self, name: str) -> None:
        if name in self.names:
            self.num_calls += 1
            if self.num_calls == self.fails_at:
                raise self.error(f"call {self.num_calls}")

    def allocate_host(self, num_bytes: int) -> Any:
        self._count("allocate_host")
        return super().allocate_host(num_bytes)

    def allocate_device(self, num_bytes: int) -> Any:
        self._count("allocate_device")
        return super().allocate_device(num_bytes)

    def copy_to_device(self, dst: Any, src: Any, after: Any, *, lane: Any = "h2d") -> Any:
        self._count("copy_to_device")
        return super().copy_to_device(dst, src, after, lane=lane)

    def copy_to_host(self, dst: Any, src: Any, after: Any) -> Any:
        self._count("copy_to_host")
        return super().copy_to_host(dst, src, after)

    def compute_waits(self, event: Any) -> None:
        self._count("compute_waits")
        super().compute_waits(event)

    def release(self, *buffers: Any) -> Any:
        self._count("release")
        return super().release(*buffers)


def calls_of_a_generation(model: PreTrainedModel, mode: str, names: tuple[str, ...]) -> int:
    backend = FaultyBackend(KeyboardInterrupt, names)
    with Session(model, config(), backend):
        MODES[mode].run(model, None)
        return backend.num_calls


@pytest.mark.parametrize("mode", ["early_ends", "prompt_lookup", "padded_beams"])
def test_an_interrupt_at_any_call_of_the_backend(mode: str, model: PreTrainedModel, wanted: Outcome) -> None:
    """Ctrl-C arrives wherever it likes: the next call in the same session must not trip over what was left."""
    MODES[mode].run(model, None)  # some modes look at the plain continuation first
    total = calls_of_a_generation(model, mode, FaultyBackend.NAMES)
    assert total > 100
    for fails_at in [*range(1, 30, 2), *range(30, total - 10, 37), *range(total - 10, total + 1)]:
        backend = FaultyBackend(KeyboardInterrupt)
        with Session(model, config(), backend) as session:
            backend.fails_at = fails_at
            with pytest.raises(KeyboardInterrupt):
                MODES[mode].run(model, None)
            backend.fails_at = -1
            check_after(session, model, wanted)
        assert session.pool.slab_bytes == 0


def test_no_device_memory_at_any_allocation(model: PreTrainedModel, wanted: Outcome) -> None:
    """The device is full at the n-th allocation, most of which come in the prefill."""
    names = ("allocate_device",)
    for fails_at in range(1, calls_of_a_generation(model, "left_padding", names) + 1):
        backend = FaultyBackend(torch.OutOfMemoryError, names)
        with Session(model, config(device_gib=0.0004), backend) as session:
            backend.num_calls, backend.fails_at = 0, fails_at
            with pytest.raises(torch.OutOfMemoryError):
                generate(model)
            check_after(session, model, wanted)
        assert session.engine.account.held_bytes == {}


def test_no_device_memory_in_the_model_itself_during_prefill(model: PreTrainedModel, wanted: Outcome) -> None:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.shape[1] > 1:
            raise torch.OutOfMemoryError("planted")

    with kvoffload.offload(model, config()) as session:
        handle = model.model.layers[1].mlp.register_forward_hook(hook)
        with pytest.raises(torch.OutOfMemoryError):
            generate(model)
        handle.remove()
        check_after(session, model, wanted)


# ---- after the end ---------------------------------------------------------------------------------------------------


def test_a_cache_outlives_its_session_only_to_say_so(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, config()) as session:
        cache = session.new_cache()
        with torch.no_grad():
            model(prompt(2), **given(cache))
    with torch.no_grad(), pytest.raises(KVOffloadError, match=r"is over: take a new_cache\(\)"):
        model(prompt(2, 1), **given(cache))
    with pytest.raises(KVOffloadError, match=r"closed: call kvoffload\.offload\(model\) again"):
        session.new_cache()
    session.close()  # a second time does nothing


def test_closing_in_the_middle_of_a_custom_loop(model: PreTrainedModel) -> None:
    """Copies are under way, some for a step that never comes."""
    session = Session(model, config(link=EmulatedLink(h2d_gb_per_s=0.01)), None)
    cache = session.new_cache()
    with torch.no_grad():
        model(prompt(2), **given(cache))
        model(prompt(2, 1), **given(cache))
    session.close()
    assert session.pool.slab_bytes == 0
    assert session.engine.account.held_bytes == {}


def test_what_a_user_has_put_on_the_model_stays(wanted: Outcome) -> None:
    """A method shadowed by someone else, and hooks of theirs."""
    model = make_model("llama", num_key_value_heads=4)
    calls: list[str] = []
    original = model.generate

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append("generate")
        return original(*args, **kwargs)

    vars(model)["generate"] = theirs
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *args: calls.append("hook"))
    with kvoffload.offload(model, config()):
        found = outcome([generate(model)])
    assert distance(found, wanted) <= TOLERANCE
    assert vars(model)["generate"] is theirs
    assert calls.count("generate") == 1
    assert calls.count("hook") == 12
    handle.remove()
    assert num_hooks(model) == 0


def test_a_session_that_is_dropped_without_closing_can_be_collected_after_close(model: PreTrainedModel) -> None:
    import weakref

    session = kvoffload.offload(model, config())
    generate(model)
    session.close()
    reference = weakref.ref(session)
    del session
    gc.collect()
    assert reference() is None


def test_the_check_of_races_is_on_during_faults_too(model: PreTrainedModel, wanted: Outcome) -> None:
    with Session(model, config(), checking_backend()) as session:
        for step in (1, 2, 5):
            with pytest.raises(Planted):
                generate(model, logits_processor=[failing_at(step, Planted)])
            check_after(session, model, wanted)
