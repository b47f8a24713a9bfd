"""What a round of drafts leaves behind, and what users' own parts of `generate()` see of it: nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from drafting import NEW_TOKENS, OPTIONS, drafts_worse, session_of
from matrix import distance, leaves_no_trace
from models import make_model
from modes import given, outcome, padded_prompt, prompt
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from kvoffload import hf
from kvoffload.draft.rounds import Rounds


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama")


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
        model.generate(prompt(1), **OPTIONS)
    assert session.stats is not None
    assert session.stats.tokens_per_pass == 1.0
    assert session.stats.draft_survivals == [0.0]


def test_without_drafts_there_are_none_in_the_statistics(model: PreTrainedModel) -> None:
    with session_of(model, "off") as session:
        model.generate(prompt(2), **OPTIONS)
    stats = session.stats
    assert stats is not None
    assert (stats.tokens_per_pass, stats.draft_acceptance, stats.draft_s, stats.drafted_tokens) == (1.0, None, 0.0, 0)
    assert stats.drafts_off_reason == "speculate='off'"


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
