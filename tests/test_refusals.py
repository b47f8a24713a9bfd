"""Models, options and profiles that are refused: an error of the right class with the numbers and the way out.

After every fault the model generates plainly, and the same as before; no hook, thread or memory of ours is left.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import config, generate, no_forward, num_hooks
from faults import model_fixture as model_fixture
from faults import nothing_is_left as nothing_is_left
from faults import wanted_fixture as wanted_fixture
from matrix import TOLERANCE, distance, kvoffload_threads, profile
from models import make_model
from modes import COMMON, Outcome, given, outcome, plain_cache, prompt
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    PreTrainedModel,
)

import kvoffload
from kvoffload import ConfigError, EmulatedLink, KVOffloadError, OffloadConfig, ProfileError, UnsupportedModelError
from kvoffload.hf import check_supported

# ---- models that are refused -----------------------------------------------------------------------------------------


def test_an_encoder_decoder_is_refused() -> None:
    t5 = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    )
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder; only decoder"):
        kvoffload.offload(t5, config())
    assert num_hooks(t5) == 0
    assert not kvoffload_threads()


def test_a_model_without_attention_is_refused() -> None:
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4)
    )
    with pytest.raises(UnsupportedModelError, match=r"no attention layer with an unbounded cache.*use plain generate"):
        kvoffload.offload(mamba, config())
    assert num_hooks(mamba) == 0
    assert not kvoffload_threads()


def test_a_model_with_sliding_layers_only_is_refused() -> None:
    sliding = make_model("mistral", sliding_window=16)
    with pytest.raises(UnsupportedModelError, match=r"MistralForCausalLM has no attention layer with an unbounded"):
        kvoffload.offload(sliding, config())


def test_what_cannot_generate_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear is not a transformers model .*AutoModelForCausalLM"):
        kvoffload.offload(nn.Linear(2, 2), config())
    headless = AutoModel.from_config(make_model("llama").config)
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel is not a transformers model with generate"):
        kvoffload.offload(headless, config())


def test_a_model_on_several_devices_is_refused(model: PreTrainedModel) -> None:
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    try:
        with pytest.raises(UnsupportedModelError, match=r"spread over .*0.*: load it .*{'': 0}.*into host memory"):
            kvoffload.offload(model, config())
    finally:
        del model.hf_device_map
    half = make_model("llama")
    half.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match="spread over cpu, meta"):
        check_supported(half)


def test_attention_that_is_not_given_the_cache_of_its_model_is_refused(model: PreTrainedModel) -> None:
    module = model.model.layers[1].self_attn

    def drop(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, **given(None)}

    with kvoffload.offload(model, config()):
        handle = module.register_forward_pre_hook(drop, with_kwargs=True, prepend=True)
        try:
            with pytest.raises(UnsupportedModelError, match="LlamaAttention of layer 1 was not: its forward drops"):
                model.generate(prompt(1), **COMMON)
        finally:
            handle.remove()
        model.generate(prompt(1), **COMMON)


@pytest.mark.parametrize("call", ["generate", "generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused_before_any_work(model: PreTrainedModel, call: str) -> None:
    more = {"cache_implementation": "paged", "max_new_tokens": 2} if call == "generate" else {}
    with (
        kvoffload.offload(model, config()),
        pytest.raises(ConfigError, match="paged cache of its own: call it outside"),
    ):
        getattr(model, call)(inputs=prompt(1), **more)


def test_prefix_tuning_is_refused_as_such() -> None:
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    tuned = get_peft_model(make_model("llama"), PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    with pytest.raises(UnsupportedModelError, match=r"prefix tuning gives every call a cache of its own.*LoRA"):
        kvoffload.offload(tuned, config())


def test_a_model_whose_generate_is_that_of_an_inner_one_names_it() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    former = {**vision, "vocab_size": 32, "encoder_hidden_size": 32}
    text = {"model_type": "opt", "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "vocab_size": 96, "max_position_embeddings": 256}
    blip = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config={**vision, "image_size": 16, "patch_size": 8},
            qformer_config=former,
            text_config=text,
            num_query_tokens=4,
        )
    ).eval()
    with pytest.raises(UnsupportedModelError, match=r"calls that of its language_model.*offload\(model\.language_"):
        kvoffload.offload(blip, config())
    ids = prompt(1, 9)
    wanted = blip.language_model.generate(ids, max_new_tokens=4, do_sample=False)
    with kvoffload.offload(blip.language_model, config()):
        assert torch.equal(blip.language_model.generate(ids, max_new_tokens=4, do_sample=False), wanted)


def test_gradients_are_refused(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, config()) as session:
        cache = session.new_cache()
        with pytest.raises(UnsupportedModelError, match=r"gradients .*torch\.no_grad\(\)"):
            model(prompt(1), **given(cache))


# ---- options that make no sense --------------------------------------------------------------------------------------


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'splitt'"):
        OffloadConfig(splitt=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": -0.1}, r"split is a share and must lie in 0\.\.1, got -0\.1"),
        ({"split": 1.5}, r"must lie in 0\.\.1, got 1\.5"),
        ({"split": float("nan")}, "got nan"),
        ({"split": True}, "got True"),
        ({"split": "half"}, "'auto', 'transfer', 'recompute' or a number from 0 to 1, got 'half'"),
        ({"device_gib": 0}, "device_gib must be a number above zero"),
        ({"device_gib": "max"}, r"device_gib must be one of \('auto', 'min'\) or a number of GiB, got 'max'"),
        ({"host_gib": -1}, "host_gib must be a number above zero"),
        ({"host_gib": "min"}, "host_gib must be one of"),
        ({"block_tokens": 0}, "block_tokens must be 'auto' or a whole number of at least 1, got 0"),
        ({"chunk_blocks": 1.5}, "chunk_blocks must be"),
        ({"slots": True}, "slots must be"),
        ({"overlap": "no"}, "overlap must be True or False"),
        ({"schedule": "paper"}, "schedule must be 'pipelined' or 'kvpr', got 'paper'"),
        ({"profile": 3}, "profile must be 'auto', a path or a HardwareProfile"),
        ({"link": "pcie"}, r"link must be 'auto' or a kvoffload\.EmulatedLink, got 'pcie'"),
    ],
    ids=str,
)
def test_options_outside_their_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        OffloadConfig(**kwargs)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"h2d_gb_per_s": 0}, r"EmulatedLink\.h2d_gb_per_s must be a number above zero \(GB/s; None for an unpaced"),
        ({"h2d_gb_per_s": -1}, "above zero"),
        ({"d2h_gb_per_s": 0.0}, "d2h_gb_per_s must be a number above zero"),
        ({"h2d_gb_per_s": float("inf")}, "got inf"),
        ({"h2d_gb_per_s": "fast"}, "got 'fast'"),
        ({"latency_s": -1e-6}, "latency_s must be zero or more seconds"),
        ({"latency_s": float("nan")}, "latency_s"),
    ],
    ids=str,
)
def test_a_link_of_no_speed(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmulatedLink(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_cache": False}, r"use_cache=False leaves nothing to offload: call generate\(\) outside the session"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded' asks for another cache"),
        ({"cache_implementation": "static"}, "cache_implementation='static' .*leave it out"),
    ],
    ids=str,
)
def test_generate_is_asked_for_another_cache(kwargs: dict[str, Any], message: str, model: PreTrainedModel) -> None:
    with kvoffload.offload(model, config()), no_forward(model), pytest.raises(ConfigError, match=message):
        generate(model, **kwargs)


def test_a_cache_of_someone_else(model: PreTrainedModel, wanted: Outcome) -> None:
    other = make_model("llama", num_key_value_heads=4)
    with kvoffload.offload(other, config()) as theirs, kvoffload.offload(model, config()) as ours:
        for cache in (plain_cache(model), theirs.new_cache()):
            with no_forward(model), pytest.raises(ConfigError, match=r"does not belong to .*use session\.new_cache"):
                generate(model, **given(cache))
        found = outcome([generate(model, **given(ours.new_cache()))])
    assert distance(found, wanted) <= TOLERANCE


def test_a_second_session_on_the_same_model(model: PreTrainedModel, wanted: Outcome) -> None:
    with kvoffload.offload(model, config()):
        with pytest.raises(KVOffloadError, match=r"offloaded already: use that session, or close\(\) it first"):
            kvoffload.offload(model, config())
        assert distance(outcome([generate(model)]), wanted) <= TOLERANCE  # the first one is unharmed
    with kvoffload.offload(model, config()):
        assert distance(outcome([generate(model)]), wanted) <= TOLERANCE


def test_a_second_generate_at_the_same_time(model: PreTrainedModel, wanted: Outcome) -> None:
    errors: list[BaseException] = []
    inside, go_on = threading.Event(), threading.Event()

    def wait_here(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inside.set()
        assert go_on.wait(60)
        return scores

    results: list[Any] = []
    with kvoffload.offload(model, config()):
        first = threading.Thread(target=lambda: results.append(generate(model, logits_processor=[wait_here])))
        first.start()
        assert inside.wait(60)
        with pytest.raises(KVOffloadError, match=r"running already .*one call at a time"):
            generate(model)
        go_on.set()
        first.join()

        def nested(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            try:
                generate(model)
            except KVOffloadError as error:
                errors.append(error)
            return scores

        found = generate(model, logits_processor=[nested])
    assert len(errors) == len(found.logits)
    assert distance(outcome(results), wanted) <= TOLERANCE
    assert distance(outcome([found]), wanted) <= TOLERANCE


@pytest.mark.parametrize("options", ["fast", {"split": "transfer"}, 3])
def test_options_of_another_kind_are_refused(options: Any, model: PreTrainedModel) -> None:
    message = "options are given as a kvoffload.OffloadConfig"
    with pytest.raises(ConfigError, match=message):
        kvoffload.offload(model, options)
    with pytest.raises(ConfigError, match=message):
        kvoffload.generate(model, prompt(1), offload_config=options)
    with pytest.raises(ConfigError, match=message):
        kvoffload.plan(model, kvoffload.Workload(batch=1, prompt_tokens=8, new_tokens=8), profile(), options)
    with pytest.raises(ConfigError, match="workload must be a kvoffload.Workload"):
        kvoffload.plan(model, {"batch": 1}, profile())  # type: ignore[arg-type]
    assert "generate" not in vars(model)


# ---- profiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no profile file"),
        ("{", "cannot read the hardware profile"),
        ("[]", "is neither a profile of"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1}', "is damaged"),
    ],
    ids=["missing", "cut off", "foreign", "from another release", "incomplete"],
)
def test_a_profile_file_that_cannot_be_used(
    text: str | None, message: str, tmp_path: Path, model: PreTrainedModel
) -> None:
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    before = dict(vars(model))
    with pytest.raises(ProfileError, match=message) as caught:
        kvoffload.offload(model, config(profile=path, split="auto"))
    assert dict(vars(model)) == before
    assert str(path) in str(caught.value)
    assert "kvoffload profile" in str(caught.value)
    assert (path.read_text() if text is not None else None) == text  # not measured again behind the user's back


@pytest.mark.parametrize("split", ["auto", "transfer"])
def test_a_mistyped_preset_is_refused_at_once_also_where_nothing_is_predicted(
    split: str, model: PreTrainedModel
) -> None:
    unpaced = kvoffload.OffloadConfig(profile="a100-40gb-pcie", split=split)  # type: ignore[arg-type]
    threads = threading.active_count()
    with pytest.raises(ProfileError, match="'a100-40gb-pcie'; near: a100-40gb-pcie4"):
        kvoffload.offload(model, unpaced)
    assert threading.active_count() == threads
