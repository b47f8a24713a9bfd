"""What a user hands to `generate()`, or wants back from it: streamers, criteria, processors, states, a pipeline."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from comparing import SPLITS, compare, config
from matrix import TOLERANCE, checking_backend
from models import make_model
from modes import COMMON, PROMPT_TOKENS, padded_prompt, prompt
from transformers import (
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

from kvoffload.session.session import Session


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama", num_key_value_heads=4)  # activations are half of K and V: "auto" recomputes


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
