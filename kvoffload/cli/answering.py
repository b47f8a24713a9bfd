"""Prompts answered in batches with the cache offloaded, and once more without it for comparison.

Owns the tokens that a batch of prompts comes to, their padding, and what is compared. Does not own where a model comes
from (`chat`), the prompts (`prompts`), or several turns of one conversation (`conversation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel

from kvoffload.api import offload
from kvoffload.bench.watch import Stamp
from kvoffload.cli.sampling import Sampling
from kvoffload.config import OffloadConfig
from kvoffload.errors import ConfigError
from kvoffload.session.stats import GenerationStats


class Answer(NamedTuple):
    """What a model said to one prompt."""

    text: str
    prompt_tokens: int
    new_tokens: int


class Answered(NamedTuple):
    """One batch, with offloading and, if it was compared, without."""

    answers: list[Answer]
    stats: GenerationStats
    tokens_equal: bool | None = None  # None: not compared
    plain_tokens_per_s: float | None = None  # of all rows, decode only, as in `stats`; None: not compared, or one token
    why_not_compared: str | None = None  # where it was asked for


class Batch(NamedTuple):
    """Prompts as tokens, padded on the left."""

    ids: torch.Tensor  # int64, [rows, tokens]
    mask: torch.Tensor  # int64, as ids: 0 where a row is padded


def answer_all(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    config: OffloadConfig,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    system: str | None = None,
    batch: int = 1,
    compare: bool = False,
    streamer: Any = None,
    on_batch: Callable[[Answered], None] | None = None,
    on_compare: Callable[[], None] | None = None,
) -> list[Answered]:
    """Answer every prompt, `batch` of them at a time, in their order.

    Args:
        model: in host memory where `config.device` says where it runs, else on its device.
        tokenizer: its own; with a chat template each prompt is a user's message.
        prompts: at least one.
        config: options of the session.
        max_new_tokens: of each answer.
        sampling: greedy unless given; its seed is set once before the first batch, and before each comparison.
        system: a message before each prompt.
        batch: prompts that are answered together.
        compare: also generate all of it without offloading, where that fits.
        streamer: gets the tokens as they come, with one prompt at a time.
        on_batch: called with each batch, before any is compared.
        on_compare: called before what is compared begins.

    Raises:
        ConfigError: the model's template takes no such messages.
        as `offload`, and whatever `generate` raises.
    """
    sampling = (sampling or Sampling()).with_seed()
    batches = [batch_of(tokenizer, prompts[start : start + batch], system) for start in range(0, len(prompts), batch)]
    options = {"max_new_tokens": max_new_tokens, "pad_token_id": _pad_id(tokenizer), **sampling.arguments()}
    found, outputs = [], []
    with offload(model, config) as session:
        _seed(sampling)
        for one in batches:
            outputs.append(_generate(model, one, streamer=streamer if batch == 1 else None, **options))
            assert session.stats is not None, "generate() has just been counted"
            found.append(Answered(_answers(model, tokenizer, one, outputs[-1]), session.stats))
            if on_batch is not None:
                on_batch(found[-1])
    if not compare:
        return found
    if on_compare is not None:
        on_compare()
    try:
        if config.device is not None:
            model.to(config.device)  # type: ignore[arg-type]
        _seed(sampling)
        return [_compared(model, *each, options) for each in zip(batches, outputs, found, strict=True)]
    except torch.cuda.OutOfMemoryError:
        return [one._replace(why_not_compared="it does not fit on the device without offloading") for one in found]


def batch_of(tokenizer: Any, prompts: Sequence[str], system: str | None = None) -> Batch:
    """The tokens of prompts, each as the model expects a question where its tokenizer has a chat template."""
    rows = [_ids(tokenizer, prompt, system) for prompt in prompts]
    length = max(len(row) for row in rows)
    if not min(len(row) for row in rows):
        raise ConfigError("a prompt comes to no token at all: give it some text to answer")
    pad = _pad_id(tokenizer)
    return Batch(
        torch.tensor([[pad] * (length - len(row)) + row for row in rows]),
        torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    )


def rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """A conversation as the model reads it, up to where its answer begins.

    Raises:
        ConfigError: the template refuses it, such as a system's message.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        way_out = "; leave out --system" if messages[0]["role"] == "system" else ""
        raise ConfigError(f"the chat template of this model refuses the conversation: {error}{way_out}") from error
    return text


def eos_ids(model: Any) -> set[int]:
    """The tokens that end an answer."""
    ids = model.generation_config.eos_token_id
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}


def _ids(tokenizer: Any, prompt: str, system: str | None) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "system", "content": system}] if system else []
        text = rendered(tokenizer, [*messages, {"role": "user", "content": prompt}])
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(f"{system}\n{prompt}" if system else prompt)["input_ids"])


def _pad_id(tokenizer: Any) -> int:
    return next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)


def _seed(sampling: Sampling) -> None:
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)


def _generate(model: Any, batch: Batch, **options: Any) -> torch.Tensor:
    """The tokens of each row, with its prompt."""
    device = model.device
    tokens: torch.Tensor = model.generate(batch.ids.to(device), attention_mask=batch.mask.to(device), **options).cpu()
    return tokens


def _answers(model: Any, tokenizer: Any, batch: Batch, tokens: torch.Tensor) -> list[Answer]:
    length, ends = batch.ids.shape[1], eos_ids(model)
    found = []
    for row, mask in zip(tokens[:, length:].tolist(), batch.mask, strict=True):
        count = next((idx + 1 for idx, token in enumerate(row) if token in ends), len(row))  # the rest is padding
        text = tokenizer.decode(row[:count], skip_special_tokens=True).strip()
        found.append(Answer(text, int(mask.sum()), count))
    return found


def _compared(model: Any, batch: Batch, tokens: torch.Tensor, found: Answered, options: dict[str, Any]) -> Answered:
    times: list[float] = []
    plain = _generate(model, batch, stopping_criteria=[Stamp(times)], **options)
    decode_s = times[-1] - times[0]
    rate = plain.shape[0] * (len(times) - 1) / decode_s if decode_s else None
    return found._replace(tokens_equal=bool(torch.equal(tokens, plain)), plain_tokens_per_s=rate)
