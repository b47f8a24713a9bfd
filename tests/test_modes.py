"""Everything else a user does around `generate()`: wrappers, contexts, callbacks, other inputs, custom loops.

The same comparison as in the matrix, on llama (which stands for all that the matrix covers by architecture) unless a
test is about another kind of model.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matrix import (
    FAST_LINK,
    TOLERANCE,
    FixedRates,
    checking_backend,
    distance,
    profile,
    row_bytes,
    run_offloaded,
)
from models import OTHERS, make_model
from modes import (
    COMMON,
    MODES,
    PROMPT_TOKENS,
    Outcome,
    emptied,
    outcome,
    padded_prompt,
    plain_cache,
    prompt,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import kvoffload
from kvoffload import OffloadConfig, attention, segments
from kvoffload.layer import CacheLayer
from kvoffload.recompute import FastRecompute
from kvoffload.session import Session

SPLITS: list[Any] = ["transfer", "recompute", 0.5, "auto"]
PLAN: dict[str, Any] = {"link": FAST_LINK, "device_gib": "min", "block_tokens": 4, "chunk_blocks": 2}


def config(split: Any, **kwargs: Any) -> OffloadConfig:
    return OffloadConfig(split=split, profile=profile(), **{**PLAN, **kwargs})


def compare(
    model: PreTrainedModel,
    run: Callable[[], Any],
    split: Any,
    *,
    tolerance: float = TOLERANCE,
    wraps: Any = None,
    **options: Any,
) -> Session:
    """Run plain and offloaded; the session, for its statistics.

    Args:
        model: the transformers model.
        run: generates with it (or with what wraps it) and returns what generate returned.
        split: of the plan.
        tolerance: for the logits.
        wraps: what is given to the session, if not the model.
        options: of the plan.
    """
    wanted = run()
    session = Session(wraps or model, config(split, **options), checking_backend())
    if split == "auto":
        session.decider.measured = FixedRates(*row_bytes(model))
    with session:
        found = run()
    assert distance(outcome([found]), outcome([wanted])) <= tolerance
    assert session.stats is not None
    assert session.stats.h2d_bytes > 0
    assert (session.stats.recomputed_tokens > 0) == (split != "transfer")
    return session


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama", num_key_value_heads=4)  # activations are half of K and V: "auto" recomputes


# ---- what a model may be wrapped in or made of -----------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", ["left_padding", "padded_beams", "prompt_lookup"])
def test_an_unmerged_lora_adapter_takes_part_in_recomputation(split: Any, mode: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = make_model("llama", num_key_value_heads=4)
    without = outcome(MODES[mode].run(model, None))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at first, which would change nothing
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    compare(model, lambda: MODES[mode].run(adapted, None)[0], split, wraps=adapted)
    assert distance(outcome(MODES[mode].run(adapted, None)), without) > 1e-2


class Int8Linear(nn.Module):
    """Weight-only int8: one scale per output, dequantised when it is used."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("split", SPLITS)
def test_int8_linears_take_the_generic_path(split: Any, model: PreTrainedModel) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(module, name, Int8Linear(child))
    compare(model, lambda: MODES["left_padding"].run(model, None)[0], split)


@pytest.mark.parametrize("split", SPLITS)
def test_a_model_loaded_with_a_device_map(split: Any, model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, dtype=torch.float32).eval()
    compare(placed, lambda: MODES["padded_beams"].run(placed, None)[0], split)


@pytest.mark.parametrize("split", SPLITS)
def test_hooks_of_accelerate_on_every_module(split: Any, model: PreTrainedModel) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    compare(model, lambda: MODES["left_padding"].run(model, None)[0], split)


def test_hooks_of_accelerate_on_a_projection_switch_the_fast_path_off(model: PreTrainedModel) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    attention = model.model.layers[0].self_attn
    assert FastRecompute.applies_to(attention, torch.float32)
    add_hook_to_module(attention.k_proj, AlignDevicesHook())
    assert not FastRecompute.applies_to(attention, torch.float32)
    compare(model, lambda: MODES["left_padding"].run(model, None)[0], "recompute")


def test_a_forward_hook_on_a_projection_takes_part_in_recomputation(model: PreTrainedModel) -> None:
    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, args, output: output * 1.5)
    compare(model, lambda: MODES["left_padding"].run(model, None)[0], "recompute")
    handle.remove()


def test_an_adapter_added_between_two_calls_takes_part_in_the_second(model: PreTrainedModel) -> None:
    """What the fast path was checked against at one call may have changed at the next."""
    with Session(model, config("recompute"), checking_backend()):
        MODES["left_padding"].run(model, None)
        handle = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda m, args, output: output * 1.5)
        found = outcome(MODES["left_padding"].run(model, None))
    wanted = outcome(MODES["left_padding"].run(model, None))
    handle.remove()
    assert distance(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("how", ["wrapper", "module", "forward"])
def test_a_compiled_model_warns_once_and_generates_the_same(how: str, model: PreTrainedModel) -> None:
    wanted = outcome(MODES["left_padding"].run(model, None))
    if how == "wrapper":  # whose generate() runs the model inside it, which is not compiled
        compiled = torch.compile(model, backend="eager")
        with Session(compiled, config("recompute"), checking_backend()) as session:
            found = outcome(MODES["left_padding"].run(compiled, None))
    else:
        if how == "module":
            model.compile(backend="eager")
        else:
            model.forward = torch.compile(model.forward, backend="eager")
        with pytest.warns(UserWarning, match="LlamaForCausalLM is compiled") as caught:
            session = Session(model, config("recompute"), checking_backend())
        assert len(caught) == 1
        with session:
            found = outcome(MODES["left_padding"].run(model, None))
    assert session.stats is not None
    assert session.stats.recomputed_tokens > 0
    assert distance(found, wanted) <= TOLERANCE


# ---- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", ["left_padding", "padded_beams", "prompt_lookup", "chunked_prefill"])
def test_inside_inference_mode(split: Any, mode: str, model: PreTrainedModel) -> None:
    wanted = outcome(MODES[mode].run(model, None))
    with Session(model, config(split), checking_backend()) as session:
        if split == "auto":
            session.decider.measured = FixedRates(*row_bytes(model))
        with torch.inference_mode():
            found = outcome(MODES[mode].run(model, None))
        again = outcome(MODES[mode].run(model, None))  # buffers made in inference mode serve outside of it
        with torch.inference_mode():
            once_more = outcome(MODES[mode].run(model, None))
    for run in (found, again, once_more):
        assert distance(run, wanted) <= TOLERANCE


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", ["left_padding", "padded_beams"])
def test_inside_autocast(split: Any, mode: str, model: PreTrainedModel) -> None:
    """K/V are bfloat16 then: transferred bit for bit, recomputed to the last bits of bfloat16."""

    def run() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return MODES[mode].run(model, None)[0]

    wanted = run()
    with Session(model, config(split), checking_backend()) as session:
        if split == "auto":
            session.decider.measured = FixedRates(*row_bytes(model))
        found = run()
    stats = session.stats
    assert stats is not None
    assert stats.h2d_bytes > 0
    if split == "transfer":
        assert stats.exact
        assert distance(outcome([found]), outcome([wanted])) <= TOLERANCE
    else:
        # The first decode step is the first to read the cache; later ones may have taken another token by then.
        assert not stats.exact or stats.recomputed_tokens == 0
        step = (found.logits[1] - wanted.logits[1]).abs().max().item()
        assert step <= 2**-6 * wanted.logits[1].abs().max().item()


def test_full_precision_keys_from_half_precision_products_are_not_called_exact(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.register_forward_hook(lambda module, args, output: output.float())
    with Session(model, config("recompute"), checking_backend()) as session:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            MODES["left_padding"].run(model, None)
        assert session.stats is not None
        assert session.stats.recomputed_tokens > 0
        assert not session.stats.exact
        MODES["left_padding"].run(model, None)
        assert session.stats.exact


# ---- callbacks -------------------------------------------------------------------------------------------------------


class CollectingStreamer(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.reshape(-1).clone())

    def end(self) -> None:
        self.has_ended = True


@pytest.mark.parametrize("split", SPLITS)
def test_a_streamer_gets_every_token(split: Any, model: PreTrainedModel) -> None:
    streamers = []

    def run() -> Any:
        streamers.append(CollectingStreamer())
        return model.generate(prompt(1), streamer=streamers[-1], **COMMON)

    compare(model, run, split)
    plain, ours = streamers
    assert ours.has_ended
    assert torch.equal(torch.cat(ours.tokens), torch.cat(plain.tokens))


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0..w95, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(96)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", bos_token="w1", eos_token="w2")


@pytest.mark.parametrize("split", SPLITS)
def test_an_iterator_streamer_with_generate_in_a_thread(split: Any, model: PreTrainedModel) -> None:
    def stream() -> str:
        streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
        thread = threading.Thread(target=model.generate, args=(prompt(1),), kwargs={**COMMON, "streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    wanted = stream()
    with Session(model, config(split), checking_backend()) as session:
        assert stream() == wanted
    assert session.stats is not None
    assert session.stats.h2d_bytes > 0


class StopRows(StoppingCriteria):
    """Row i stops once it has `lengths[i]` tokens."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.lengths


@pytest.mark.parametrize("split", SPLITS)
def test_stopping_criteria_per_row(split: Any, model: PreTrainedModel) -> None:
    criteria = StoppingCriteriaList([StopRows([PROMPT_TOKENS + 3, PROMPT_TOKENS + 9, PROMPT_TOKENS + 6])])
    session = compare(model, lambda: model.generate(**padded_prompt(3), stopping_criteria=criteria, **COMMON), split)
    assert session.stats is not None
    assert len(session.stats.decode_step_s) == 8


class Forbid(LogitsProcessor):
    """Every third token of the vocabulary is out."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, ::3] = -float("inf")
        return scores


@pytest.mark.parametrize("split", SPLITS)
def test_logits_processors_and_penalties(split: Any, model: PreTrainedModel) -> None:
    def run() -> Any:
        return model.generate(
            **padded_prompt(2),
            logits_processor=LogitsProcessorList([Forbid()]),
            repetition_penalty=1.3,
            no_repeat_ngram_size=2,
            **COMMON,
        )

    compare(model, run, split)


@pytest.mark.parametrize("split", SPLITS)
def test_everything_that_generate_can_return(split: Any, model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")
    outputs: list[Any] = []

    def run() -> Any:
        outputs.append(
            model.generate(
                **padded_prompt(2), output_scores=True, output_hidden_states=True, output_attentions=True, **COMMON
            )
        )
        return outputs[-1]

    compare(model, run, split)
    plain, ours = outputs
    for name in ("hidden_states", "attentions"):
        for found, wanted in zip(getattr(ours, name), getattr(plain, name), strict=True):
            for layer, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(layer, other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("split", SPLITS)
def test_a_text_generation_pipeline(split: Any, model: PreTrainedModel) -> None:
    words = tokenizer()
    words.padding_side = "left"
    texts = [" ".join(f"w{i}" for i in row) for row in prompt(3).tolist()]
    texts[1] = texts[1][: len(texts[1]) // 2]
    generator = pipeline("text-generation", model=model, tokenizer=words, device="cpu")

    def run() -> list[str]:
        results = generator(texts, batch_size=3, max_new_tokens=12, do_sample=False, pad_token_id=0)
        return [result[0]["generated_text"] for result in results]

    wanted = run()
    with Session(model, config(split), checking_backend()) as session:
        assert run() == wanted
    assert session.stats is not None
    assert session.stats.h2d_bytes > 0


# ---- other inputs and modes ------------------------------------------------------------------------------------------


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
        (41, 12, {"device_gib": 0.1}),  # nearly all on the device
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
        assert session.stats.h2d_bytes > 0


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
    assert len(str(session.stats).splitlines()) == 4


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
            session.decider.measured = FixedRates(*row_bytes(model))
        for mode, expected in zip(modes, wanted, strict=True):
            assert distance(outcome(MODES[mode].run(model, None)), expected) <= TOLERANCE
        session.new_cache()  # whoever asks for a new cache finds the memory of those that nobody holds any more
        assert session.pool.used_bytes == 0
        assert session.pool.slab_bytes > 0  # slabs outlive the calls


# ---- custom loops ----------------------------------------------------------------------------------------------------


def greedy_loop(model: PreTrainedModel, cache: Any, tokens: torch.Tensor, steps: int) -> Outcome:
    """Decode by hand."""
    logits, new = [], tokens
    with torch.no_grad():
        for _ in range(steps):
            out = model(new, past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1])
            new = logits[-1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, new], dim=1)
    return Outcome([tokens], logits)


@pytest.mark.parametrize("split", SPLITS)
def test_a_custom_loop_with_a_cache_of_the_session(split: Any, model: PreTrainedModel) -> None:
    wanted = greedy_loop(model, plain_cache(model), prompt(2), 12)
    with Session(model, config(split), checking_backend()) as session:
        if split == "auto":
            session.decider.measured = FixedRates(*row_bytes(model))
        cache = session.new_cache()
        found = greedy_loop(model, cache, prompt(2), 12)
        assert cache.get_seq_length() == PROMPT_TOKENS + 11
        assert session.backend.link_use("h2d").copied_bytes > 0
        assert (cache.core.recomputed_tokens > 0) == (split != "transfer")
        # Two caches in turns: what was prefetched for one must not be used for the other.
        caches = [session.new_cache(), session.new_cache()]
        inputs = [prompt(2), prompt(1, 41, seed=9)]
        plain = [greedy_loop(model, plain_cache(model), tokens, 6) for tokens in inputs]
        turns = [greedy_loop(model, cache, tokens, 1) for cache, tokens in zip(caches, inputs, strict=True)]
        for step in range(1, 6):
            for idx, cache in enumerate(caches):
                last = greedy_loop(model, cache, turns[idx].logits[-1].argmax(-1, keepdim=True), 1)
                turns[idx].logits.append(last.logits[0])
                assert (last.logits[0] - plain[idx].logits[step]).abs().max().item() <= TOLERANCE
    assert distance(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
def test_a_cache_follows_every_change_of_its_rows_and_length(split: Any, model: PreTrainedModel) -> None:
    """Repeating, dropping, reordering and cropping as transformers' own cache does."""

    def play(cache: Any) -> list[torch.Tensor]:
        logits: list[torch.Tensor] = []

        def step(tokens: torch.Tensor) -> None:
            logits.append(model(tokens, past_key_values=cache, use_cache=True).logits[:, -1])

        step(prompt(3))
        step(prompt(3, 9, seed=2))
        cache.batch_repeat_interleave(2)
        step(prompt(6, 1, seed=3))
        cache.reorder_cache(torch.tensor([5, 0, 1, 1, 2, 4]))
        step(prompt(6, 3, seed=4))
        cache.batch_select_indices(torch.tensor([0, 2, 3]))
        step(prompt(3, 5, seed=5))
        cache.crop(-2)  # within the tail or just behind it
        step(prompt(3, 1, seed=6))
        cache.crop(-17)  # several blocks
        step(prompt(3, 2, seed=7))
        cache.batch_select_indices(torch.tensor([True, False, True]))
        step(prompt(2, 6, seed=8))
        cache = emptied(cache)
        step(prompt(2, 23, seed=9))
        step(prompt(2, 1, seed=10))
        return logits

    with torch.no_grad():
        wanted = play(plain_cache(model))
        with Session(model, config(split), checking_backend()) as session:
            cache = session.new_cache()
            found = play(cache)
            del cache
            assert session.backend.link_use("h2d").copied_bytes > 0
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert (ours - theirs).abs().max().item() <= TOLERANCE, f"step {step}"


@pytest.mark.parametrize("path", ["auto", "whole_layer"])
@pytest.mark.parametrize("split", ["transfer", "recompute"])
def test_a_cache_that_is_collected_in_the_middle_of_a_step_of_another(
    split: Any, path: Any, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python frees an abandoned cache whenever it likes; that must not disturb what is under way."""
    wanted = outcome(MODES["left_padding"].run(model, None))
    with Session(model, config(split, attention=path), checking_backend()) as session:
        abandoned = session.new_cache()
        greedy_loop(model, abandoned, prompt(2), 3)
        abandoned.itself = abandoned  # only the garbage collector can free it
        reference = weakref.ref(abandoned)
        used_bytes = session.pool.used_bytes
        collected_at: list[int] = []

        def collect(layer: CacheLayer) -> None:
            if layer.position == 1 and not collected_at:
                gc.collect()
                collected_at.append(layer.num_tokens)

        def assemble(layer: CacheLayer, *new: torch.Tensor) -> Any:
            result = attention.assemble(layer, *new)
            collect(layer)  # K and V stand ready, attention has not read them yet
            return result

        add = segments._Answer.add

        def add_segment(answer: Any, kv: torch.Tensor, first_block: int) -> None:
            collect(answer._layer)  # the chunk is in its slot
            add(answer, kv, first_block)

        monkeypatch.setattr("kvoffload.hf.layer.attention", SimpleNamespace(assemble=assemble))
        monkeypatch.setattr(segments._Answer, "add", add_segment)
        gc.disable()
        try:
            del abandoned
            found = outcome(MODES["left_padding"].run(model, None))
        finally:
            gc.enable()
        assert collected_at
        assert reference() is None
        assert distance(found, wanted) <= TOLERANCE
        assert used_bytes > 0
        session.new_cache()
        assert session.pool.used_bytes == 0


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
@pytest.mark.parametrize("device_gib", ["min", 0.0006])
def test_a_prompt_that_many_rows_continue(split: Any, device_gib: Any, model: PreTrainedModel) -> None:
    """Rows repeated after the first tokens: every buffer must grow, and resident blocks were made for fewer rows."""

    def play(cache: Any) -> list[torch.Tensor]:
        logits = [model(prompt(2, 9), past_key_values=cache).logits[:, -1]]
        cache.batch_repeat_interleave(5)
        for step, tokens in enumerate((7, 7, 7, 1)):
            logits.append(model(prompt(10, tokens, seed=step), past_key_values=cache).logits[:, -1])
        cache.crop(-9)
        logits.append(model(prompt(10, 1), past_key_values=cache).logits[:, -1])
        return logits

    with torch.no_grad():
        wanted = play(plain_cache(model))
        with Session(model, config(split, device_gib=device_gib), checking_backend()) as session:
            found = play(session.new_cache())
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
@pytest.mark.parametrize("device_gib", ["min", 0.0006])
def test_a_cache_goes_in_and_out_of_inference_mode(split: Any, device_gib: Any, model: PreTrainedModel) -> None:
    def play(cache: Any, *, with_inference_mode: bool) -> list[torch.Tensor]:
        logits = []
        for step in range(12):
            with torch.inference_mode() if with_inference_mode and step % 3 == 0 else torch.no_grad():
                tokens = 9 if step == 0 else 1 + step % 5
                logits.append(model(prompt(2, tokens, seed=step), past_key_values=cache).logits[:, -1])
                cache.reorder_cache(torch.tensor([1, 0]))
            if step == 7:
                cache.crop(-6)
        return logits

    with torch.no_grad():
        wanted = play(plain_cache(model), with_inference_mode=False)
        with Session(model, config(split, device_gib=device_gib), checking_backend()) as session:
            found = play(session.new_cache(), with_inference_mode=True)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max().item() <= TOLERANCE


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
    assert session.decider.measured.recompute_s_per_row_token is not None
    assert session.stats is not None
    assert len(str(session.stats).splitlines()) == 4


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
