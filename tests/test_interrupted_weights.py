"""An interrupt at any line leaves a session with streamed weights usable, and one that ends can be closed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interrupting import interrupted, lines_of
from matrix import checking_backend, leaves_no_trace
from modes import prompt
from streaming import config, streamable, weights_as_before

from kvoffload import KVOffloadError
from kvoffload.session.attached import Attached
from kvoffload.session.session import Session

LAYER = ("hf/streamed_layers.py", "store/layer_weights.py", "pipeline/weights.py")
CLOSING = ("session/attached.py", "session/model_weights.py", "store/layer_weights.py", "hf/streamed_layers.py")


def _model() -> Any:
    return streamable("llama", 4)


def _spread(number: int, wanted: int) -> list[int]:
    """So many of so many lines, with a stride that hits another place in each layer."""
    return sorted({step * number // wanted for step in range(wanted)})


def test_an_interrupt_at_any_line_of_a_layer_leaves_the_session_usable() -> None:
    model, ids = _model(), prompt(2, 6)
    wanted = model.generate(ids, max_new_tokens=3)

    def generate() -> torch.Tensor:
        found: torch.Tensor = model.generate(ids, max_new_tokens=3)
        return found

    options = config(model, 0, split="transfer")
    with weights_as_before(model), Session(model, options, checking_backend()):
        total = lines_of(generate, LAYER)
        times = 0
        for at in _spread(total, 30):
            times += interrupted(generate, LAYER, at)
            assert torch.equal(generate(), wanted)
    assert times > 20


@pytest.mark.parametrize("way", ["forward", "layer"])
def test_a_layer_that_was_interrupted_is_forgotten_by_whatever_comes_next(way: str) -> None:
    model, ids = _model(), prompt(2, 6)
    layers, hidden = model.model.layers, torch.randn(1, 2, 48)
    cos_sin = model.model.rotary_emb(hidden, torch.arange(2)[None])
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "forward": lambda: model(ids, use_cache=False).logits,
        "layer": lambda: layers[2](hidden, position_embeddings=cos_sin),
    }
    with torch.no_grad():
        wanted = calls[way]()
        with Session(model, config(model, 0), checking_backend()):
            layers[1](hidden, position_embeddings=cos_sin)
            number = lines_of(lambda: layers[1](hidden, position_embeddings=cos_sin), LAYER)
            times = 0
            for at in _spread(number, 24):
                times += interrupted(lambda: layers[1](hidden, position_embeddings=cos_sin), LAYER, at)
                assert torch.equal(calls[way](), wanted)
    assert times > 20


def test_a_close_that_was_interrupted_anywhere_leaves_nothing_or_can_be_repeated() -> None:
    model, ids = _model(), prompt(1, 5)
    wanted = model.generate(ids, max_new_tokens=2)
    session = Session(model, config(model, 1), checking_backend())
    for at in _spread(lines_of(session.close, CLOSING), 30):
        with leaves_no_trace(model), weights_as_before(model):
            session = Session(model, config(model, 1), checking_backend())
            assert interrupted(session.close, CLOSING, at)
            session.close()
        assert torch.equal(model.generate(ids, max_new_tokens=2), wanted)


def test_a_forward_that_somebody_kept_is_the_layers_own_after_the_session() -> None:
    model = _model()
    layer, hidden = model.model.layers[1], torch.randn(1, 2, 48)
    cos_sin = model.model.rotary_emb(hidden, torch.arange(2)[None])
    with torch.no_grad():
        wanted = layer(hidden, position_embeddings=cos_sin)
        with Session(model, config(model, 0), checking_backend()):
            kept = layer.forward
        assert torch.equal(kept(hidden, position_embeddings=cos_sin), wanted)


def test_steps_that_fail_are_left_and_those_that_are_interrupted_are_repeated() -> None:
    attached, ran, failing = Attached(), [], {"b": True}

    def step(name: str) -> None:
        ran.append(name)
        if failing.pop(name, False):
            raise ValueError(name) if name == "b" else KeyboardInterrupt

    for name in "abcd":
        attached.callback(step, name)
    failing["d"] = True
    with pytest.raises(KeyboardInterrupt):
        attached.close()
    assert ran == ["d", "d", "c", "b", "a"]
    attached.close()
    attached.close()
    assert ran == ["d", "d", "c", "b", "a", "b"]


def test_slabs_that_had_no_room_twice_are_made_by_the_next_call() -> None:
    model, ids, backend = _model(), prompt(1, 5), checking_backend()
    wanted = model.generate(ids, max_new_tokens=2)
    allocate, is_full = backend.inner.allocate_device, True

    def full(num_bytes: int) -> Any:
        if is_full:
            raise MemoryError("full")
        return allocate(num_bytes)

    with weights_as_before(model), Session(model, config(model, 1), backend) as session:
        weights = vars(model)["_kvoffload_session"]._weights
        backend.inner.allocate_device = full  # type: ignore[method-assign]
        with pytest.raises(MemoryError):
            weights.keep(1)
        hidden = torch.zeros(1, 2, 48)
        with pytest.raises(KVOffloadError, match=r"too full for two slabs of .* close\(\)"):
            model.model.layers[1](hidden, position_embeddings=model.model.rotary_emb(hidden, torch.arange(2)[None]))
        with pytest.raises(MemoryError):
            model.generate(ids, max_new_tokens=2)
        is_full = False
        assert torch.equal(model.generate(ids, max_new_tokens=2), wanted)
        assert weights.num_resident == 1
        assert session.stats is not None
        assert session.stats.weight_bytes == 2 * session.stats.plan.weight_bytes_per_step
