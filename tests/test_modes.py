"""Other inputs and options of `generate()`, odd sizes, several calls of one session, and models of other kinds.

The same comparison as in the matrix, on llama (which stands for all that the matrix covers by architecture) unless a
test is about another kind of model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import PLAN, SPLITS, compare, config
from matrix import TOLERANCE, FixedRates, checking_backend, distance, profile, row_bytes, run_offloaded
from models import OTHERS, make_model
from modes import COMMON, MODES, outcome, padded_prompt, plain_cache, prompt
from printed import paragraphs
from transformers import PreTrainedModel

import kvoffload
from kvoffload import OffloadConfig
from kvoffload.session.session import Session


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama", num_key_value_heads=4)  # activations are half of K and V: "auto" recomputes


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("with_tokens", [False, True])
def test_inputs_embeds(split: Any, with_tokens: bool, model: PreTrainedModel) -> None:
    inputs = padded_prompt(2)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    values: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    if with_tokens:
        values["input_ids"] = inputs["input_ids"]
    compare(model, lambda: model.generate(**values, **COMMON), split)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", ["left_padding", "chunked_prefill", "multi_turn"])
@pytest.mark.parametrize("kind", ["dynamic", "yarn", "linear"])
def test_rotary_frequencies_that_change_while_the_context_grows(split: Any, mode: str, kind: str) -> None:
    """Dynamic NTK changes its frequencies past the original length: keys keep the rotation they were written with."""
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 40}
    if kind != "yarn":
        del rope["original_max_position_embeddings"]
    model = make_model("llama", num_key_value_heads=4, max_position_embeddings=40, rope_parameters=rope)
    wanted = outcome(MODES[mode].run(model, lambda: plain_cache(model)))
    again = outcome(MODES[mode].run(model, lambda: plain_cache(model)))
    assert distance(again, wanted) == 0  # the model starts each generation with its original frequencies
    run = run_offloaded(model, MODES[mode], config(split), checking_backend())
    assert distance(run.outcome, wanted) <= TOLERANCE
    assert run.h2d_bytes > 0
    assert (run.recomputed_tokens > 0) == (split != "transfer")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 3, "do_sample": True, "top_k": 20},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
        {"num_beams": 2, "prefill_chunk_size": 3},  # a chunk is less than a block
        {"num_beams": 4, "prefill_chunk_size": 16, "repetition_penalty": 1.2},
        {"do_sample": True, "num_return_sequences": 4, "prefill_chunk_size": 9},
        {"do_sample": True, "min_p": 0.05, "temperature": 0.7, "max_time": 100.0},
        {"min_new_tokens": 12, "forced_eos_token_id": 2},
    ],
    ids=str,
)
def test_further_options_of_generate(split: Any, kwargs: dict[str, Any], model: PreTrainedModel) -> None:
    def run() -> Any:
        torch.manual_seed(11)
        return model.generate(**padded_prompt(2), **{**COMMON, **kwargs})

    compare(model, run, split)


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
@pytest.mark.parametrize(
    ("tokens", "new_tokens", "options"),
    [
        (1, 30, {}),  # everything is written by single steps
        (37, 2, {}),  # one decode step
        (37, 12, {"block_tokens": 1, "chunk_blocks": 1}),
        (37, 12, {"block_tokens": 1, "chunk_blocks": 7}),  # no chunk is full
        (37, 12, {"block_tokens": 37, "chunk_blocks": 1}),  # the prompt is one block
        (41, 12, {"slots": 1}),  # a slot must be free before the next chunk leaves
        (41, 12, {"slots": 1, "schedule": "kvpr"}),
        (41, 12, {"slots": 9}),  # more than a layer has chunks
        (41, 12, {"device_gib": 0.1}),  # all on the device
    ],
    ids=str,
)
def test_odd_sizes(tokens: int, new_tokens: int, options: dict[str, Any], split: Any, model: PreTrainedModel) -> None:
    for beams in (1, 3):
        kwargs = {**COMMON, "max_new_tokens": new_tokens, "num_beams": beams}
        wanted = model.generate(prompt(2, tokens), **kwargs)
        with Session(model, config(split, **options), checking_backend()) as session:
            found = model.generate(prompt(2, tokens), **kwargs)
        assert distance(outcome([found]), outcome([wanted])) <= TOLERANCE
        assert session.stats is not None
        assert (session.stats.h2d_bytes > 0) == ("device_gib" not in options)


@pytest.mark.parametrize("options", [{}, {"block_tokens": 64, "chunk_blocks": 1}], ids=str)
def test_a_generation_that_never_reads_the_host(options: dict[str, Any], model: PreTrainedModel) -> None:
    """No decode step at all, or a tail that holds every token."""
    kwargs = {**COMMON, "max_new_tokens": 12 if options else 1}
    wanted = model.generate(prompt(2), **kwargs)
    with Session(model, config(0.5, **options), checking_backend()) as session:
        found = model.generate(prompt(2), **kwargs)
    assert distance(outcome([found]), outcome([wanted])) <= TOLERANCE
    assert session.stats is not None
    assert session.stats.h2d_bytes == session.stats.recomputed_tokens == 0
    assert paragraphs(session.stats)[-1].startswith("verdict: ")


@pytest.mark.parametrize("split", SPLITS)
def test_sampling_with_an_assistant(split: Any, model: PreTrainedModel) -> None:
    from modes import assistant_of

    assistant = assistant_of(model)

    def run() -> Any:
        torch.manual_seed(11)
        return model.generate(prompt(1), assistant_model=assistant, **{**COMMON, "do_sample": True})

    compare(model, run, split)


@pytest.mark.parametrize("split", SPLITS)
def test_a_model_that_drafts_with_its_own_first_layers(split: Any, model: PreTrainedModel) -> None:
    compare(model, lambda: model.generate(prompt(1), assistant_early_exit=2, **COMMON), split)


@pytest.mark.parametrize("split", SPLITS)
def test_one_session_serves_calls_of_any_shape_one_after_another(split: Any, model: PreTrainedModel) -> None:
    modes = ["greedy", "padded_beams", "prompt_lookup", "left_padding", "chunked_prefill", "beams", "greedy"]
    wanted = [outcome(MODES[mode].run(model, None)) for mode in modes]
    with Session(model, config(split), checking_backend()) as session:
        if split == "auto":
            session.planner.measured = FixedRates(*row_bytes(model))
        for mode, expected in zip(modes, wanted, strict=True):
            assert distance(outcome(MODES[mode].run(model, None)), expected) <= TOLERANCE
        session.new_cache()  # whoever asks for a new cache finds the memory of those that nobody holds any more
        assert session.pool.used_bytes == 0
        assert session.pool.slab_bytes > 0  # slabs outlive the calls


def test_the_short_form_for_a_single_call(model: PreTrainedModel) -> None:
    wanted = model.generate(**padded_prompt(2), **COMMON)
    found = kvoffload.generate(model, **padded_prompt(2), **COMMON, offload_config=config(0.5))
    assert distance(outcome([found]), outcome([wanted])) <= TOLERANCE
    assert "generate" not in vars(model)


def test_auto_with_rates_measured_on_this_machine(model: PreTrainedModel) -> None:
    """No fixed rates: whatever is planned and planned again while it runs, the logits are the same."""
    slow = kvoffload.EmulatedLink(h2d_gb_per_s=0.02)
    wanted = outcome(MODES["left_padding"].run(model, None))
    options = {**PLAN, "link": slow, "slots": 2}
    with Session(model, OffloadConfig(profile=profile(0.02), **options)) as session:
        found = outcome(MODES["left_padding"].run(model, None))
    assert distance(found, wanted) <= TOLERANCE
    assert session.planner.measured.recompute_s_per_row_token is not None
    assert session.stats is not None
    assert paragraphs(session.stats)[-1].startswith("verdict: ")


# ---- models of other kinds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["left_padding", "padded_beams", "chunked_prefill", "multi_turn"])
@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
@pytest.mark.parametrize("architecture", OTHERS)
def test_models_with_other_layers_beside_attention(architecture: str, split: Any, mode: str) -> None:
    model = make_model(architecture)
    wanted = outcome(MODES[mode].run(model, lambda: plain_cache(model)))
    run = run_offloaded(model, MODES[mode], config(split), checking_backend())
    assert distance(run.outcome, wanted) <= TOLERANCE
    assert run.h2d_bytes > 0
    assert (run.recomputed_tokens > 0) == (split != "transfer")
