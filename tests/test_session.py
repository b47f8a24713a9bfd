"""What a user holds of an offloaded model: closing it, losing it, and options in the wrong place."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import pydoc
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import make_model
from transformers import PreTrainedModel

import kvoffload
from kvoffload import ConfigError, EmulatedLink, KVOffloadError, OffloadConfig

IDS = torch.arange(3, 23).reshape(1, 20)


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    made = make_model("llama")
    yield made
    with contextlib.suppress(KVOffloadError):
        kvoffload.release(made)


def answer(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(IDS, max_new_tokens=4, do_sample=False)
    return found


# ---- release ---------------------------------------------------------------------------------------------------------


def test_release_undoes_an_offload_and_closes_its_session(model: PreTrainedModel) -> None:
    before, wanted = set(vars(model)), answer(model)
    session = kvoffload.offload(model)
    assert set(vars(model)) != before
    kvoffload.release(model)
    assert session.is_closed
    assert set(vars(model)) == before
    assert torch.equal(answer(model), wanted)
    session.close()  # nothing is left to do
    with kvoffload.offload(model):
        assert torch.equal(answer(model), wanted)


def test_release_says_whether_there_was_something_to_undo(model: PreTrainedModel) -> None:
    assert kvoffload.release(model) is False
    session = kvoffload.offload(model)
    with pytest.raises(KVOffloadError, match=r"a Session is no model: close\(\) it"):
        kvoffload.release(session)
    with pytest.raises(KVOffloadError, match="a NoneType is no model: give the model that was offloaded"):
        kvoffload.release(None)
    assert kvoffload.release(model) is True
    assert kvoffload.release(model) is False


def test_a_cell_that_runs_again_is_told_the_way_out(model: PreTrainedModel) -> None:
    session = kvoffload.offload(model)
    with pytest.raises(KVOffloadError, match=r"offloaded already.*kvoffload\.release\(model\)"):
        session = kvoffload.offload(model)
    assert not session.is_closed
    kvoffload.release(model)
    session = kvoffload.offload(model)
    session.close()


# ---- lost ------------------------------------------------------------------------------------------------------------


def test_a_session_that_is_lost_is_told_and_its_model_works_until_it_is_released(model: PreTrainedModel) -> None:
    wanted = answer(model)
    session = kvoffload.offload(model)
    held = [session]
    del session
    with pytest.warns(ResourceWarning, match=r"lost without close.*kvoffload\.release\(model\)"):
        held.clear()
    assert torch.equal(answer(model), wanted)
    kvoffload.release(model)
    assert torch.equal(answer(model), wanted)


def test_only_a_session_that_was_not_closed_is_told(model: PreTrainedModel) -> None:
    def close(session: kvoffload.Session) -> None:
        session.close()

    def leave(session: kvoffload.Session) -> None:
        with session:
            answer(model)

    ways: list[Callable[[kvoffload.Session], object]] = [close, leave, lambda _: kvoffload.release(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for end in ways:
            session = kvoffload.offload(model)
            end(session)
            del session
            gc.collect()
        with kvoffload.offload(model):  # nobody holds it but the statement
            gc.collect()
            answer(model)


def test_a_session_and_its_model_that_are_both_dropped_are_collected() -> None:
    model = make_model("llama")
    session = kvoffload.offload(model)
    held, kept, backend = [model, session], weakref.ref(model), session.backend
    del model, session
    with pytest.warns(ResourceWarning, match="lost without close"):
        held.clear()
    gc.collect()
    assert kept() is None
    backend.close()  # threads of an emulated link stay


# ---- in words --------------------------------------------------------------------------------------------------------


def test_a_session_says_what_it_is_of_and_whether_there_are_statistics(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, OffloadConfig(link=EmulatedLink(h2d_gb_per_s=2.0), split="transfer")) as session:
        text = repr(session)
        assert "LlamaForCausalLM on cpu, link emulated 2 GB/s" in text
        assert "no generate() has ended yet" in text
        assert session.stats is None
        answer(model)
        assert "no generate()" not in repr(session)
    assert "closed, the model is as before" in repr(session)


def public(kind: type) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


def test_help_shows_what_a_user_calls_and_nothing_else() -> None:
    assert sorted(public(kvoffload.Session)) == [
        "close",
        "is_closed",
        "new_cache",
        "num_forwards",
        "record_timeline",
        "stats",
        "timeline",
    ]


@pytest.mark.parametrize("name", [name for name in kvoffload.__all__ if inspect.isclass(getattr(kvoffload, name))])
def test_every_public_name_of_a_public_class_is_documented(name: str) -> None:
    kind = getattr(kvoffload, name)
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{name}("), "what dataclass writes by itself"
    fields = getattr(kind, "__dataclass_fields__", {})
    for one in public(kind):
        assert one in fields or inspect.getdoc(getattr(kind, one)), f"{name}.{one}"


@pytest.mark.parametrize("name", ["GenerationStats", "Plan", "OffloadConfig", "EmulatedLink", "Workload"])
def test_every_field_of_a_public_class_is_in_its_help(name: str) -> None:
    kind = getattr(kvoffload, name)
    text = pydoc.render_doc(kind, renderer=pydoc.plaintext)
    for field in dataclasses.fields(kind):
        assert re.search(rf"^ \|      {field.name}: \S", text, re.MULTILINE), field.name


# ---- options in the wrong place --------------------------------------------------------------------------------------

IN_A_CONFIG = r"kvoffload\.OffloadConfig\(split=0\.5\)"
WRONG_PLACES: dict[str, tuple[Callable[[Any], object], str]] = {
    "offload": (lambda model: kvoffload.offload(model, split=0.5), rf"kvoffload\.offload\(model, {IN_A_CONFIG}\)"),
    "misspelt": (lambda model: kvoffload.offload(model, splitt=0.5), "no option 'splitt'; did you mean 'split'"),
    "dict": (lambda model: kvoffload.offload(model, {"split": 0.5}), f"not as a dict: {IN_A_CONFIG}"),  # type: ignore[arg-type]
    "misspelt in a dict": (lambda model: kvoffload.offload(model, {"splt": 0.5}), "did you mean 'split'"),  # type: ignore[arg-type]
    "generate": (
        lambda model: kvoffload.generate(model, IDS, split=0.5),
        rf"kvoffload\.generate\(model, \.\.\., offload_config={IN_A_CONFIG}\)",
    ),
    "misspelt in generate": (lambda model: kvoffload.generate(model, IDS, device_gb=1), "did you mean 'device_gib'"),
    "another argument": (
        lambda model: kvoffload.generate(model, IDS, config=OffloadConfig()),
        "given as offload_config=, not as config=",
    ),
    "load": (lambda model: kvoffload.load("nowhere", split=0.5), rf"kvoffload\.load\(name, {IN_A_CONFIG}\)"),
    "load by another": (
        lambda model: kvoffload.load("nowhere", offload_config=OffloadConfig()),
        "given as config=, not as offload_config=",
    ),
    "a config": (lambda model: OffloadConfig(splitt=0.5), "unexpected keyword argument 'splitt'; did you mean 'split'"),  # type: ignore[call-arg]
    "a link": (lambda model: EmulatedLink(gb=1), "unexpected keyword argument 'gb'; known: h2d_gb_per_s"),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("place", WRONG_PLACES)
def test_an_option_in_the_wrong_place_is_refused_with_the_call_that_works(place: str, model: PreTrainedModel) -> None:
    call, message = WRONG_PLACES[place]
    with pytest.raises(ConfigError, match=message):
        call(model)
    assert "generate" not in vars(model)


def test_what_generate_and_the_model_take_is_passed_on(model: PreTrainedModel) -> None:
    wanted = model.generate(IDS, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(IDS))
    found = kvoffload.generate(model, IDS, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(IDS))
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="nothing_of_ours"):  # transformers' own words
        kvoffload.generate(model, IDS, max_new_tokens=3, nothing_of_ours=1)


def test_an_option_that_a_models_forward_takes_as_well_is_the_models(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(model).forward
    seen = inspect.signature(forward)
    another = inspect.Parameter("device", inspect.Parameter.KEYWORD_ONLY, default=None)
    *others, rest = seen.parameters.values()

    @functools.wraps(forward)
    def with_a_device(self: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    with_a_device.__signature__ = seen.replace(parameters=[*others, another, rest])  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", with_a_device)
    assert kvoffload.generate(model, IDS, max_new_tokens=3, do_sample=False, device="cpu").shape == (1, 23)


def test_options_keep_their_signature_and_can_be_copied() -> None:
    assert next(iter(inspect.signature(OffloadConfig).parameters)) == "split"
    config = OffloadConfig(split=0.5, link=EmulatedLink(h2d_gb_per_s=1.0))
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    with pytest.raises(TypeError):  # as of any function
        OffloadConfig(0.5)  # type: ignore[misc]
