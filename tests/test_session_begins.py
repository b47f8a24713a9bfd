"""A session that fails while it begins leaves the model as it was, and nothing in memory."""

from __future__ import annotations

import gc
import pkgutil
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from matrix import FAST_LINK, leaves_no_trace
from modes import prompt
from streaming import config, streamable, weights_as_before

import kvoffload
from kvoffload.config import OffloadConfig


class _Interrupt(BaseException):
    """As a KeyboardInterrupt, which comes at any point."""


# what a session makes or calls, in this order, and how often each is called before it fails
POINTS = [
    ("kvoffload.session.offloaded_model.shape_of_model", 0),
    ("kvoffload.session.offloaded_model.HostPool.__init__", 0),
    ("kvoffload.session.offloaded_model.TransferEngine.__init__", 0),
    ("kvoffload.hf.hooks.ModelHooks._make_hooks", 0),
    ("kvoffload.hf.hooks.ModelHooks._make_hooks", 3),
    ("kvoffload.hf.interface._configs", 0),
    ("kvoffload.session.offloaded_model.ModelWeights.__init__", 0),
    ("kvoffload.session.offloaded_model.CachePlans.__init__", 0),
    ("kvoffload.session.offloaded_model.GenerateCalls.__init__", 0),
    ("kvoffload.hf.shadows._as", 2),
    ("kvoffload.session.offloaded_model.ModelWeights.place", 0),
    ("kvoffload.session.model_weights.own_tensors", 0),
    ("kvoffload.store.layer_weights.LayerWeights.__init__", 2),
    ("kvoffload.store.layer_weights.LayerWeights.move_to_host", 3),
    ("kvoffload.machine.mapped_files.let_go", 13),  # in the middle of a layer
    ("kvoffload.hf.streamed_layers.StreamedLayers._standing_in", 2),
    ("kvoffload.pipeline.engine.WeightStream.__init__", 0),
    ("kvoffload.pipeline.engine.brought", 1),
    ("kvoffload.session.memory_limits.MemoryLimits.host_cap_bytes", 0),
    ("kvoffload.session.memory_limits.MemoryLimits.host_cap_bytes", 1),
]


@pytest.fixture(params=POINTS, ids=lambda point: "-".join(map(str, point)))
def point(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails there, each time from then on."""
    name, number = request.param
    calls = 0
    original = pkgutil.resolve_name(name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number + 1:
            raise _Interrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(name, fails)
    yield
    assert calls > number, "it was never called"


@pytest.mark.usefixtures("point")
def test_a_session_that_fails_at_any_point_leaves_the_model_as_it_was() -> None:
    model = streamable("llama")
    options = config(model, 2)
    before = [(key, value) for key, value in vars(model.config).items() if key != "torch_dtype"]
    with leaves_no_trace(model), weights_as_before(model), pytest.raises(_Interrupt):
        kvoffload.offload(model, options)
    assert [(key, value) for key, value in vars(model.config).items() if key != "torch_dtype"] == before
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


def test_the_model_can_be_offloaded_after_a_session_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamable("llama")
    with monkeypatch.context() as patch:
        patch.setattr("kvoffload.session.offloaded_model.ModelWeights.place", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kvoffload.offload(model, OffloadConfig(link=FAST_LINK))
    with kvoffload.offload(model, config(model, 2, split="transfer")):
        model.generate(prompt(1, 5), max_new_tokens=2)


def test_what_fails_while_a_session_ends_keeps_nothing_else_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamable("llama")
    with leaves_no_trace(model), weights_as_before(model):
        session = kvoffload.offload(model, config(model, 2))
        monkeypatch.setattr("kvoffload.session.offloaded_model.OffloadedModel._reap", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.close()
