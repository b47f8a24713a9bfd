"""What a round of drafts leaves behind, and what users' own parts of `generate()` see of it: nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drafting import drafts_worse
from matrix import FAST_LINK, checking_backend, distance, leaves_no_trace, profile
from models import make_model
from modes import COMMON, assistant_of, given, once, outcome, padded_prompt, plain_cache, prompt
from modes import Shape as Inputs
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import kvoffload
from kvoffload import ConfigError, OffloadConfig, hf
from kvoffload.draft.rounds import Rounds
from kvoffload.hf import offloaded_cache
from kvoffload.session.session import Session

NEW_TOKENS = 24
OPTIONS: dict[str, Any] = {**COMMON, "max_new_tokens": NEW_TOKENS}


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama")


def config(number: Any = 4, **options: Any) -> OffloadConfig:
    """With the whole cache on the device, so that every draft is right unless it is made wrong on purpose."""
    values: dict[str, Any] = {"device_gib": 0.01, "block_tokens": 4, "chunk_blocks": 2, **options}
    return OffloadConfig(speculate=number, link=FAST_LINK, profile=profile(), **values)


def session_of(model: PreTrainedModel, number: Any = 4, **options: Any) -> Session:
    return Session(model, config(number, **options), checking_backend())


class Noting(LogitsProcessor):
    """Writes down every call, and depends on how many there were."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        scores = scores.clone()
        scores[:, (7 * len(self.seen)) % scores.shape[1]] += 3.0
        return scores


class Counting(StoppingCriteria):
    """Writes down every call, and ends rows at calls of its own choice."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        return torch.tensor([len(self.seen) >= 9 + 5 * row for row in range(input_ids.shape[0])])


class Listening(BaseStreamer):
    """Writes down what it is given."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.clone())

    def end(self) -> None:
        self.seen.append(torch.tensor(-1))


@pytest.mark.parametrize("quality", [1.0, 0.5])
@pytest.mark.parametrize("do_sample", [False, True])
def test_processors_criteria_and_streamers_see_what_plain_decoding_shows_them(
    do_sample: bool, quality: float, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[Any, list[torch.Tensor]]:
        processor, criterion, streamer = Noting(), Counting(), Listening()
        torch.manual_seed(3)
        options = {**OPTIONS, "do_sample": do_sample, "repetition_penalty": 1.3, "eos_token_id": 5}
        output = model.generate(
            prompt(1), logits_processor=[processor], stopping_criteria=[criterion], streamer=streamer, **options
        )
        return output, [*processor.seen, *criterion.seen, *streamer.seen]

    wanted, seen_plain = run()
    with drafts_worse(monkeypatch, quality), session_of(model) as session:
        found, seen = run()
    assert torch.equal(found.sequences, wanted.sequences)
    assert len(seen) == len(seen_plain)
    assert all(torch.equal(a, b) for a, b in zip(seen, seen_plain, strict=True))
    assert session.stats is not None
    assert session.stats.draft_acceptance is not None


def test_rows_end_at_a_criterion_of_their_own(model: PreTrainedModel) -> None:
    def run() -> Any:
        options = {**OPTIONS, "eos_token_id": 5, "output_scores": True}
        return model.generate(**padded_prompt(3), stopping_criteria=[Counting()], **options)

    wanted = run()
    with session_of(model):
        found = run()
    assert torch.equal(found.sequences, wanted.sequences)
    assert distance(outcome([found]), outcome([wanted])) <= 1e-5
    assert len(found.scores) == len(wanted.scores)


def test_random_numbers_are_left_as_plain_sampling_leaves_them(model: PreTrainedModel) -> None:
    states = []
    for number in ("off", 5):
        with session_of(model, number):
            torch.manual_seed(4)
            model.generate(prompt(2), **{**OPTIONS, "do_sample": True})
            states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("when", [1, 6, 13])
def test_an_exception_in_a_processor_leaves_the_cache_after_the_last_token(when: int, model: PreTrainedModel) -> None:
    class Failing(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == when:
                raise RuntimeError("on purpose")
            return scores

    ids = prompt(2)
    plain = model.generate(ids, **OPTIONS)
    with session_of(model) as session:
        cache = session.new_cache()
        with pytest.raises(RuntimeError, match="on purpose"):
            model.generate(ids, **given(cache), logits_processor=[Failing()], **OPTIONS)
        assert cache.get_seq_length() == cache.core.layers[0].num_tokens == ids.shape[1] + when - 1
        assert not cache.core.is_recording
        again = model.generate(plain.sequences[:, : ids.shape[1] + when], **given(cache), **OPTIONS)
    wanted = model.generate(plain.sequences[:, : ids.shape[1] + when], **OPTIONS)
    assert torch.equal(again.sequences, wanted.sequences)


def test_an_exception_in_a_draft_closes_the_cache_and_leaves_the_model_as_it_was(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = model.generate(prompt(2), **OPTIONS)

    def choose(self: Rounds, ids: Any, logits: torch.Tensor) -> torch.Tensor:
        raise MemoryError("on purpose")

    with leaves_no_trace(model), session_of(model) as session:
        with monkeypatch.context() as patched:
            patched.setattr(Rounds, "_choose", choose)
            with pytest.raises(MemoryError, match="on purpose"):
                model.generate(prompt(2), **OPTIONS)
        assert session.pool.used_bytes == 0
        assert torch.equal(model.generate(prompt(2), **OPTIONS).sequences, wanted.sequences)
    assert torch.equal(model.generate(prompt(2), **OPTIONS).sequences, wanted.sequences)


@pytest.mark.parametrize("device_gib", ["min", 0.001])
def test_the_cache_that_is_left_is_that_of_plain_decoding(device_gib: Any, model: PreTrainedModel) -> None:
    caches = []
    for number in ("off", 6):
        session = session_of(model, number, device_gib=device_gib, split="transfer")
        with session:
            cache = session.new_cache()
            model.generate(padded_prompt(3)["input_ids"], **given(cache), **OPTIONS)
            caches.append([(layer.keys, layer.values) for layer in cache.layers])
    for (keys, values), (wanted_keys, wanted_values) in zip(*caches, strict=True):
        assert (keys - wanted_keys).abs().max() <= 1e-5
        assert (values - wanted_values).abs().max() <= 1e-5


def test_a_crop_between_two_tokens_is_of_the_tokens_asked_for(model: PreTrainedModel) -> None:
    lengths: list[tuple[int, int]] = []

    class Looking(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if cache is not None:
                lengths.append((cache.get_seq_length(), input_ids.shape[1]))
                if len(lengths) == 5:
                    cache.crop(0)  # takes nothing of what was asked for
                if len(lengths) == 9:
                    copies.append(hf.OffloadedHFCache.__deepcopy__(cache, {}))
            return scores

    cache: Any = None
    copies: list[Any] = []
    wanted = model.generate(prompt(2), logits_processor=[Looking()], **OPTIONS)
    with session_of(model) as session:
        cache = session.new_cache()
        found = model.generate(prompt(2), **given(cache), logits_processor=[Looking()], **OPTIONS)
        assert copies[0].get_seq_length() == lengths[8][1]
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(cached == known for cached, known in lengths)
    assert len(lengths) == NEW_TOKENS


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_copy_at_any_token_goes_on_like_plain_decoding(architecture: str) -> None:
    model = make_model(architecture)
    copies: list[Any] = []

    class Copying(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            copies.append((copy.deepcopy(cache), input_ids.clone()))
            assert cache.layers[-1].keys.shape[2] == cache.get_seq_length() == input_ids.shape[1] - 1
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with session_of(model, 3) as session:
        cache = session.new_cache()
        options = {**OPTIONS, "max_new_tokens": 9}
        model.generate(prompt(2), **given(cache), **options, stopping_criteria=[Copying()])
        found = [model.generate(ids, **given(one), **options).sequences for one, ids in copies]
        assert not any(one.core.is_recording for one, _ in copies)
    for (_, ids), answer in zip(copies, found, strict=True):
        assert torch.equal(answer, model.generate(ids, **options).sequences)


def test_a_call_that_fails_before_its_first_token_leaves_the_cache_as_new(model: PreTrainedModel) -> None:
    with session_of(model, "off") as session:
        cache = session.new_cache()
        with pytest.raises(ValueError, match="tokenizer"):
            model.generate(prompt(2), **given(cache), stop_strings=["x"], **OPTIONS)
        found = model.generate(prompt(3), **given(cache), **OPTIONS).sequences
    assert torch.equal(found, model.generate(prompt(3), **OPTIONS).sequences)


# ---- what cannot be served -------------------------------------------------------------------------------------------


CANNOT: dict[str, tuple[Callable[[PreTrainedModel], dict[str, Any]], str]] = {
    "beams": (lambda model: {"num_beams": 2}, "beam search"),
    "an assistant": (lambda model: {"assistant_model": assistant_of(model)}, "assisted generation"),
    "prompt lookup": (lambda model: {"prompt_lookup_num_tokens": 3}, "assisted generation"),
    "hidden states": (lambda model: {"output_hidden_states": True}, "output_hidden_states"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_a_number_of_drafts_that_cannot_be_served_is_an_error(case: str, model: PreTrainedModel) -> None:
    options, reason = CANNOT[case]
    call = {**OPTIONS, **options(model)}
    wanted = model.generate(prompt(1), **call)
    with leaves_no_trace(model), session_of(model) as session:
        with pytest.raises(ConfigError, match=rf"speculate=4 cannot serve this generate\(\): .*{reason}.*'off'"):
            model.generate(prompt(1), **call)
        assert session.pool.used_bytes == 0
    with session_of(model, "auto"):
        assert torch.equal(model.generate(prompt(1), **call).sequences, wanted.sequences)


def test_a_model_that_cannot_take_tokens_back_is_an_error() -> None:
    model = make_model("bamba")
    with session_of(model) as session:
        with pytest.raises(ConfigError, match="speculate=4 cannot serve.*cannot take tokens back"):
            model.generate(prompt(1), **OPTIONS)
        assert session.pool.used_bytes == 0


def test_sliding_layers_that_show_too_much_before_a_crop_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of transformers 5.17 do; a model without such layers is served there as well."""
    monkeypatch.setattr(offloaded_cache, "_forwards_may_follow", lambda: False)
    model = make_model("gemma3_text")
    wanted = model.generate(prompt(1), **OPTIONS)
    with session_of(model) as session:
        with pytest.raises(ConfigError, match=r"sliding layers of this release of transformers \(5.17\)"):
            model.generate(prompt(1), **OPTIONS)
        assert session.pool.used_bytes == 0
    with session_of(model, "auto"):
        assert torch.equal(model.generate(prompt(1), **OPTIONS).sequences, wanted.sequences)
    llama = make_model("llama")
    with session_of(llama) as session:
        llama.generate(prompt(1), **OPTIONS)
    assert session.stats is not None
    assert session.stats.drafted_tokens > 0


def test_a_model_whose_attention_is_not_known_is_an_error() -> None:
    model = make_model("bloom")
    with session_of(model), pytest.raises(ConfigError, match="speculate=4 cannot serve.*whole layers"):
        model.generate(prompt(1), **OPTIONS)


def test_whole_layers_asked_for_are_an_error(model: PreTrainedModel) -> None:
    with session_of(model, attention="whole_layer"), pytest.raises(ConfigError, match=r"speculate=4.*whole_layer"):
        model.generate(prompt(1), **OPTIONS)


@pytest.mark.parametrize("number", [16, -1, 2.0, True, "on", None])
def test_a_number_out_of_range_is_an_error(number: Any) -> None:
    with pytest.raises(ConfigError, match="speculate must be 'auto', 'off' or a whole number of drafts from 1 to 15"):
        OffloadConfig(speculate=number)


def test_no_drafts_can_be_said_as_a_number() -> None:
    assert OffloadConfig(speculate=0).fixed_drafts == OffloadConfig(speculate="off").fixed_drafts == 0


def test_an_unpaced_link_drafts_if_asked_to(model: PreTrainedModel) -> None:
    wanted = model.generate(prompt(2), **OPTIONS)
    with kvoffload.offload(model, OffloadConfig(speculate=4, block_tokens=4)) as session:
        found = model.generate(prompt(2), **OPTIONS)
    assert torch.equal(found.sequences, wanted.sequences)
    assert session.stats is not None
    assert session.stats.draft_acceptance is not None


# ---- rotations that change with the length ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("tokens", [30, 45])
def test_no_pass_crosses_the_length_at_which_rotations_change(kind: str, tokens: int) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    architecture, sizes = "llama", {}
    if kind == "longrope":
        architecture, sizes = "phi3", {"original_max_position_embeddings": 40}
        half = [1.0 + 0.3 * idx for idx in range(6)]
        rope |= {"short_factor": half, "long_factor": [2 * one for one in half]}
        rope["original_max_position_embeddings"] = 40
        del rope["factor"]
    limit = 160 if kind == "longrope" else 40
    # Beyond the length the frequencies of `dynamic` stay where the last generation left them: a model for each.
    model, another = (
        make_model(architecture, max_position_embeddings=limit, rope_parameters=rope, **sizes) for _ in range(2)
    )
    mode = once(Inputs(rows=2, prompt_tokens=tokens, new_tokens=NEW_TOKENS), padded=True)
    wanted = outcome(mode.run(another, lambda: plain_cache(another)))
    with session_of(model, 15) as session:
        found = outcome(mode.run(model, None))
    assert distance(found, wanted) <= 1e-5
    assert session.stats is not None
    assert session.stats.tokens_per_pass is not None
    assert (session.stats.tokens_per_pass > 1) == (kind == "longrope" or tokens < 40)


# ---- what stops a generation -----------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one letter for each token, as far as `stop_strings` need one."""

    def __init__(self, size: int) -> None:
        self._letters = [*"abcdef", *(chr(0x100 + idx) for idx in range(size - 6))]

    def get_vocab(self) -> dict[str, int]:
        return {letter: idx for idx, letter in enumerate(self._letters)}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def _convert_id_to_token(self, idx: int) -> str:
        return self._letters[idx]

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [self._letters.index(one) for one in text]}

    def string_of(self, ids: torch.Tensor) -> str:
        return "".join(self._letters[idx] for idx in ids.tolist())


def test_stop_strings_end_a_row_in_the_middle_of_a_round(model: PreTrainedModel) -> None:
    letters = Letters(model.config.vocab_size)
    text = model.generate(prompt(1), **OPTIONS).sequences[0, -NEW_TOKENS:]
    stop = letters.string_of(text[9:11])
    options = {**OPTIONS, "stop_strings": [stop], "tokenizer": letters}
    wanted = model.generate(prompt(1), **options)
    assert wanted.sequences.shape[1] < 37 + NEW_TOKENS
    with session_of(model, 4):
        found = model.generate(prompt(1), **options)
    assert torch.equal(found.sequences, wanted.sequences)


def test_a_time_limit_ends_a_generation_between_two_tokens(model: PreTrainedModel) -> None:
    with session_of(model, 4) as session:
        cache = session.new_cache()
        options = {**OPTIONS, "max_new_tokens": 150, "max_time": 0.15}
        found = model.generate(prompt(1), **given(cache), **options).sequences
        assert cache.get_seq_length() == found.shape[1] - 1 == cache.core.layers[0].num_tokens
        again = model.generate(found, **given(cache), **OPTIONS).sequences
    assert torch.equal(again, model.generate(found, **OPTIONS).sequences)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_the_statistics_tell_rounds_tokens_and_drafts_apart(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session_of(model, 3) as session:
        session.record_timeline()
        model.generate(prompt(2), **OPTIONS)
        stats, timeline = session.stats, session.timeline()
    assert stats is not None
    rounds = -(-(NEW_TOKENS - 1) // 4)  # every draft is right
    assert len(stats.decode_step_s) == rounds == timeline.num_steps
    assert stats.tokens_per_pass == pytest.approx((NEW_TOKENS - 1) / rounds)
    assert stats.draft_survivals == [1.0, 1.0, 1.0]
    assert stats.drafted_tokens == 3 * (rounds - 1) + (NEW_TOKENS - 2) % 4
    assert stats.draft_acceptance == 1.0
    assert stats.tpot_s == pytest.approx(sum(stats.decode_step_s) / (NEW_TOKENS - 1))
    assert len(timeline.lane("draft")) == len(timeline.lane("verification")) == rounds
    assert timeline.busy_s("draft") == pytest.approx(stats.draft_s, rel=0.05)
    assert stats.drafts_off_reason is None
    assert stats.to_json()["draft_acceptance"] == 1.0
    with drafts_worse(monkeypatch, 0.0), session_of(model, 3) as session:
        model.generate(prompt(2), **OPTIONS)
    assert session.stats is not None
    assert session.stats.tokens_per_pass == 1.0
    assert session.stats.draft_survivals == [0.0]


def test_without_drafts_there_are_none_in_the_statistics(model: PreTrainedModel) -> None:
    with session_of(model, "off") as session:
        model.generate(prompt(2), **OPTIONS)
    stats = session.stats
    assert stats is not None
    assert (stats.tokens_per_pass, stats.draft_acceptance, stats.draft_s, stats.drafted_tokens) == (1.0, None, 0.0, 0)
    assert stats.drafts_off_reason is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"do_sample": True}, "tokens are sampled"),
        ({"num_beams": 2}, "beam search"),
        ({}, "not expected to gain"),
    ],
)
def test_auto_says_why_it_decoded_one_by_one(options: Any, reason: str, model: PreTrainedModel) -> None:
    with session_of(model, "auto", device_gib="min") as session:
        model.generate(prompt(2), **{**OPTIONS, **options})
    assert session.stats is not None
    assert session.stats.drafts_off_reason is not None
    assert reason in session.stats.drafts_off_reason


def test_a_users_hook_ends_drafts_under_auto_alone(model: PreTrainedModel) -> None:
    calls: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    with session_of(model, "auto") as session:
        model.generate(prompt(2), **OPTIONS)
        assert len(calls) == NEW_TOKENS
        assert session.stats is not None
        assert session.stats.drafts_off_reason == "hooks on the model would see drafts"
    with session_of(model, 4) as session:
        model.generate(prompt(2), **OPTIONS)
    handle.remove()
    assert session.stats is not None
    assert session.stats.drafted_tokens > 0
