"""Methods of one model object that stand in for those of its class."""

from __future__ import annotations

import inspect
from typing import Any

from models import make_model

from kvoffload.hf.shadows import CONTINUOUS_BATCHING, Shadows


def test_a_stand_in_looks_like_the_method_and_goes_without_a_trace() -> None:
    model, calls = make_model("llama"), []
    before, own = inspect.signature(model.generate), dict(vars(model))

    def generate(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "ours"

    shadows = Shadows(model, {"generate": generate})
    assert model.generate(1, two=2) == "ours"
    assert calls == [((1,), {"two": 2})]
    assert inspect.signature(model.generate) == before
    assert shadows.originals["generate"].__func__ is type(model).generate
    shadows.remove()
    assert vars(model) == own


def test_what_stood_in_before_is_back_afterwards_also_where_somebody_removed_ours() -> None:
    model = make_model("llama")

    def of_the_user(*args: Any) -> str:
        return "user's"

    vars(model)["generate"] = of_the_user
    shadows = Shadows(model, {"generate": lambda *args: "ours"})
    assert (model.generate(), shadows.originals["generate"]()) == ("ours", "user's")
    del vars(model)["generate"]
    shadows.remove()
    assert model.generate is of_the_user


def test_models_have_the_methods_of_continuous_batching() -> None:
    assert all(callable(getattr(make_model("llama"), name)) for name in CONTINUOUS_BATCHING)
