"""A `custom_generate/` folder: transformers, and tools that only know transformers, generate through us.

Both of its ways: named in a call of `generate`, and found in the folder that the model is loaded from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import FAST_LINK, TOLERANCE, distance, kvoffload_threads, profile
from models import make_model
from modes import COMMON, MODES, SHAPES, assistant_of, end_tokens, outcome, padded_prompt, prompt
from test_callbacks import StopRows
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import kvoffload
from kvoffload import ConfigError, EmulatedLink, OffloadConfig, custom_generate
from kvoffload.session.session import Session

CONFIG = OffloadConfig(split="transfer", link=EmulatedLink(), block_tokens=4, chunk_blocks=2)


@pytest.fixture(autouse=True)
def sessions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Session]]:
    """The sessions that calls opened. Afterwards all are closed, and transformers' copies of the code are gone."""
    opened: list[Session] = []

    def offload(model: Any, config: Any) -> Session:
        opened.append(kvoffload.offload(model, config))
        return opened[-1]

    monkeypatch.setattr(custom_generate, "offload", offload)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield opened
    assert all(session.is_closed for session in opened)
    assert not kvoffload_threads()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with the code beside it."""
    path = tmp_path / "a-model"
    make_model("llama", num_key_value_heads=4).save_pretrained(path)
    custom_generate.write(path, CONFIG)
    return path


@pytest.fixture(params=["named in the call", "loaded with the model"])
def model(request: pytest.FixtureRequest, folder: Path) -> PreTrainedModel:
    """Generates through the folder, in either way, without the caller doing anything for it."""
    named = request.param == "named in the call"
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not named)
    assert ("generate" in vars(loaded)) != named
    if not named:
        return loaded
    generate = loaded.generate

    class Tool:
        """What passes its options on, such as the `gen_kwargs` of an evaluation."""

        config, generation_config = loaded.config, loaded.generation_config
        inner = loaded

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return generate(*args, custom_generate=str(folder), trust_remote_code=True, **kwargs)

    return Tool()  # type: ignore[return-value]


def inner(model: Any) -> PreTrainedModel:
    """The transformers model."""
    found: PreTrainedModel = getattr(model, "inner", model)
    return found


def plain(model: Any, run: Callable[[Any], Any]) -> Any:
    """The same by the class's own generate."""
    kept = vars(inner(model)).pop("generate", None)
    try:
        return run(inner(model))
    finally:
        if kept is not None:
            vars(inner(model))["generate"] = kept


@pytest.mark.parametrize(
    "mode", ["greedy", "sampling", "padded_beams", "left_padding", "prompt_lookup", "chunked_prefill", "early_ends"]
)
def test_tokens_and_logits_are_those_of_plain_generate(
    mode: str, model: PreTrainedModel, sessions: list[Session]
) -> None:
    if mode == "early_ends":  # which tokens are to end it is read without offloading
        vars(model)["_end_tokens"] = {SHAPES[mode]: plain(model, lambda it: end_tokens(it, SHAPES[mode]))}
    before = dict(vars(inner(model)))
    found = outcome(MODES[mode].run(model, None))
    (session,) = sessions
    assert session.stats is not None
    assert session.stats.h2d_bytes > 0
    assert session.config == CONFIG
    assert vars(inner(model)) == before
    assert distance(found, plain(model, lambda it: outcome(MODES[mode].run(it, None)))) <= TOLERANCE


def test_an_error_inside_comes_through_and_the_next_call_works(model: PreTrainedModel, sessions: list[Session]) -> None:
    class Breaking(BaseStreamer):
        def __init__(self) -> None:
            self.left = 4

        def put(self, value: Any) -> None:
            self.left -= 1
            if not self.left:
                raise RuntimeError("the reader has gone")

        def end(self) -> None:
            pass

    before = dict(vars(inner(model)))
    with pytest.raises(RuntimeError, match="the reader has gone"):
        model.generate(prompt(1), streamer=Breaking(), **COMMON)
    assert vars(inner(model)) == before
    assert not kvoffload_threads()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in inner(model).modules())
    found = outcome([model.generate(**padded_prompt(2), **COMMON)])
    assert distance(found, plain(model, lambda it: outcome([it.generate(**padded_prompt(2), **COMMON)]))) <= TOLERANCE
    assert len(sessions) == 2


@pytest.mark.parametrize("given", [{"split": 0.5, "block_tokens": 4}, OffloadConfig(split=0.5, block_tokens=4)])
def test_a_call_may_bring_its_own_options(given: Any, model: PreTrainedModel, sessions: list[Session]) -> None:
    found = outcome([model.generate(prompt(2), offload_config=given, **COMMON)])
    assert sessions[0].config == OffloadConfig(split=0.5, block_tokens=4)
    assert sessions[0].stats is not None
    assert sessions[0].stats.recomputed_tokens > 0
    assert distance(found, plain(model, lambda it: outcome([it.generate(prompt(2), **COMMON)]))) <= TOLERANCE


def test_a_misspelt_option_names_the_right_one(model: PreTrainedModel, sessions: list[Session]) -> None:
    with pytest.raises(ConfigError, match=r"OffloadConfig has no option 'splits'; did you mean 'split'\?"):
        model.generate(prompt(2), offload_config={"splits": 0.5}, **COMMON)
    with pytest.raises(ConfigError, match=r"EmulatedLink has no option 'gb'; known: h2d_gb_per_s, d2h_gb_per_s"):
        model.generate(prompt(2), offload_config={"link": {"gb": 2}}, **COMMON)
    assert not sessions


def test_inside_a_session_the_session_serves_the_call(model: PreTrainedModel, sessions: list[Session]) -> None:
    wanted = plain(model, lambda it: outcome([it.generate(prompt(2), **COMMON)]))
    with kvoffload.offload(inner(model), OffloadConfig(link=FAST_LINK, split=0.5, block_tokens=4)) as outer:
        if inner(model) is model:
            found = outcome([model.generate(prompt(2), **COMMON)])
        else:  # the tool holds what the model's generate was before
            kwargs = {"custom_generate": str(Path(inner(model).name_or_path)), "trust_remote_code": True}
            found = outcome([inner(model).generate(prompt(2), **kwargs, **COMMON)])
        assert outer.stats is not None
        assert outer.stats.recomputed_tokens > 0
        with pytest.raises(ConfigError, match="offload_config= has no effect on a model that is offloaded already"):
            custom_generate.generate(prompt(2), model=inner(model), offload_config={}, **COMMON)
    assert distance(found, wanted) <= TOLERANCE
    assert not sessions


def test_an_assistant_loaded_with_it_drafts_on_the_device(
    folder: Path, model: PreTrainedModel, sessions: list[Session], tmp_path: Path
) -> None:
    path = tmp_path / "assistant"
    assistant_of(inner(model)).save_pretrained(path)
    custom_generate.write(path)
    assistant = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert "generate" in vars(assistant)
    found = outcome([model.generate(prompt(1), assistant_model=assistant, **COMMON)])
    wanted = plain(model, lambda it: outcome([it.generate(prompt(1), **COMMON)]))
    assert all(map(torch.equal, found.sequences, wanted.sequences))
    assert [session.model for session in sessions] == [inner(model)]


def test_the_call_that_lm_eval_makes(model: PreTrainedModel, sessions: list[Session]) -> None:
    """`HFLM._model_generate` of lm-eval 0.4.13, to the letter; scripts/harness.py runs the whole tool."""
    context, mask = padded_prompt(3).values()

    def call(it: Any) -> torch.Tensor:
        tokens: torch.Tensor = it.generate(
            input_ids=context,
            max_length=context.shape[1] + 12,
            stopping_criteria=StoppingCriteriaList([StopRows([context.shape[1] + length for length in (3, 9, 6)])]),
            pad_token_id=0,
            use_cache=True,
            attention_mask=mask,
            do_sample=False,
        )
        return tokens

    found = call(model)
    assert torch.equal(found, plain(model, call))
    assert sessions[0].stats is not None
    assert sessions[0].stats.h2d_bytes > 0


def test_nothing_runs_without_the_users_consent(folder: Path, sessions: list[Session]) -> None:
    untouched = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert "generate" not in vars(untouched)
    with pytest.raises(ValueError, match="trust_remote_code"):
        untouched.generate(prompt(1), custom_generate=str(folder), trust_remote_code=False)
    assert not sessions


def test_options_written_anew_hold_from_the_next_call_on(folder: Path, sessions: list[Session]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    for split in ("transfer", 0.5):
        config = OffloadConfig(split=split, block_tokens=4, profile="a100-40gb-pcie4", link=FAST_LINK)
        custom_generate.write(folder, config, force=True)
        model.generate(prompt(2), custom_generate=str(folder), trust_remote_code=True, **COMMON)
        assert sessions[-1].config == config


@pytest.mark.parametrize("content", [b"def generate(model, **kwargs): ...\n", b"# caf\xe9\n", b"\xff\xfe", b""])
def test_a_file_of_somebody_else_stays(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "custom_generate" / "generate.py"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"generate\.py is not from kvoffload: choose another folder, or remove it"):
        custom_generate.write(tmp_path, force=True)
    assert path.read_bytes() == content


def test_where_nothing_can_be_written_the_error_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*choose another folder"):
        custom_generate.write(tmp_path / "file")


@pytest.mark.parametrize(
    "config",
    [
        OffloadConfig(),
        OffloadConfig(split=0.25, device_gib="min", block_tokens=8, overlap=False, schedule="kvpr"),
        OffloadConfig(link=EmulatedLink(h2d_gb_per_s=2.0, latency_s=1e-5), profile=Path("here.json")),
    ],
    ids=str,
)
def test_options_survive_the_way_through_text(config: OffloadConfig) -> None:
    read = OffloadConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert read.to_json() == config.to_json()
    assert str(read.profile) == str(config.profile)
    assert read.link == config.link


def test_a_measured_profile_is_given_as_a_file() -> None:
    with pytest.raises(ConfigError, match=r"a HardwareProfile is no text: save\(\) it and give the path as profile="):
        OffloadConfig(profile=profile()).to_json()
