"""A model that is offloaded wrongly or fails, and what must not be left of it. Not a test module.

Its fixtures `model`, `wanted` and `nothing_is_left` are those of the test modules that import them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from matrix import FAST_LINK, distance, kvoffload_threads, profile
from models import make_model
from modes import COMMON, MODES, Outcome, outcome, padded_prompt
from transformers import PreTrainedModel

from kvoffload import OffloadConfig

PLAN: dict[str, Any] = {
    "link": FAST_LINK,
    "profile": profile(),
    "device_gib": "min",
    "block_tokens": 4,
    "chunk_blocks": 2,
    "split": 0.5,
}


def config(**kwargs: Any) -> OffloadConfig:
    return OffloadConfig(**{**PLAN, **kwargs})


def generate(model: PreTrainedModel, **kwargs: Any) -> Any:
    return model.generate(**padded_prompt(3), **{**COMMON, **kwargs})


def num_hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@contextmanager
def no_forward(model: PreTrainedModel) -> Iterator[None]:
    """Nothing may be computed inside: the error comes before the first token."""
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        yield
    finally:
        handle.remove()
    assert not calls


@pytest.fixture(scope="module", name="model")
def model_fixture() -> PreTrainedModel:
    return make_model("llama", num_key_value_heads=4)


@pytest.fixture(scope="module", name="wanted")
def wanted_fixture(model: PreTrainedModel) -> Outcome:
    return outcome(MODES["left_padding"].run(model, None))


@pytest.fixture(autouse=True)
def nothing_is_left(model: PreTrainedModel, wanted: Outcome) -> Iterator[None]:
    """Whatever a test did, the model is as before, and so are its tokens; no hook, thread or memory of ours is left."""
    yield
    assert num_hooks(model) == 0
    ours = {"generate", "_prepare_cache_for_generation", "prepare_inputs_for_generation", "_kvoffload_session"}
    assert not ours & set(vars(model))
    assert not kvoffload_threads()
    assert distance(outcome(MODES["left_padding"].run(model, None)), wanted) == 0
