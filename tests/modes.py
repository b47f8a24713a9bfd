"""The ways to generate: each calls `model.generate` once or more with inputs of a given shape.

Not a test module. `KINDS` make a `Mode` for any `Shape`; `MODES` are those of the matrix, each with the shape it has
there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from models import make_model
from transformers import DynamicCache, PreTrainedModel

from kvoffload import hf
from kvoffload.hf import OffloadedHFCache

PROMPT_TOKENS, NEW_TOKENS = 37, 12
TURNS, TURN_TOKENS, TURN_PROMPT_TOKENS = 3, 5, 6  # of a conversation: generated in each, and given before the next

COMMON: dict[str, Any] = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "pad_token_id": 0,
}


class Outcome(NamedTuple):
    """What a generation gave: per turn the tokens, and the logits of all its steps."""

    sequences: list[torch.Tensor]
    logits: list[torch.Tensor]


Generate = Callable[[PreTrainedModel, Callable[[], Any] | None], list[Any]]


class Mode(NamedTuple):
    """A way to generate.

    Attributes:
        run: calls `model.generate` once or more; takes the model and a factory of empty caches.
        rows: sequences decoded at once, beams included.
        sequences: rows whose prompts differ.
        max_tokens: cached at the end, at most.
        ends_early: the last prefetched layers may never be used.
    """

    run: Generate
    rows: int
    sequences: int
    max_tokens: int
    ends_early: bool = False


class Shape(NamedTuple):
    """Of the inputs and the answer.

    Attributes:
        rows: prompts; modes for a single one take the first.
        prompt_tokens: of each, padding included.
        new_tokens: generated for each, at most; conversations have their own number.
        seed: of the prompt.
    """

    rows: int = 2
    prompt_tokens: int = PROMPT_TOKENS
    new_tokens: int = NEW_TOKENS
    seed: int = 1

    @property
    def max_tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens - 1

    @property
    def common(self) -> dict[str, Any]:
        """Options of every call."""
        return {**COMMON, "max_new_tokens": self.new_tokens}


# ---- inputs ----------------------------------------------------------------------------------------------------------


def prompt(rows: int, tokens: int = PROMPT_TOKENS, seed: int = 1) -> torch.Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded_prompt(rows: int, tokens: int = PROMPT_TOKENS, seed: int = 1) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left; the first row has no padding."""
    ids = prompt(rows, tokens, seed)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        padding = min(5 * row + 3, tokens - 1)
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assistant_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model that mostly agrees: half of its drafts are taken, so that every step crops another number of tokens."""
    values = {name: getattr(model.config, name, None) for name in ("num_key_value_heads",)}
    assistant = make_model(model.config.model_type, **{k: v for k, v in values.items() if v is not None})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1 * parameter.std().nan_to_num())
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


def end_tokens(model: PreTrainedModel, shape: Shape) -> list[int]:
    """One token of each row of the sampled continuation, from different steps; first read without any offloading."""
    known: dict[Shape, list[int]] = vars(model).setdefault("_end_tokens", {})
    if shape not in known:
        new = once(shape, do_sample=True).run(model, None)[0].sequences[:, shape.prompt_tokens :]
        known[shape] = [int(new[row, (2 + 3 * row) % new.shape[1]]) for row in range(len(new))]
    return known[shape]


# ---- kinds -----------------------------------------------------------------------------------------------------------


def once(shape: Shape, *, copies: int = 1, padded: bool = False, **kwargs: Any) -> Mode:
    """One call; `copies` of each row are decoded."""
    rows, tokens, seed = shape.rows, shape.prompt_tokens, shape.seed
    inputs = padded_prompt(rows, tokens, seed) if padded else {"input_ids": prompt(rows, tokens, seed)}

    def run(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
        torch.manual_seed(7)
        return [model.generate(**inputs, **{**shape.common, **kwargs})]

    return Mode(run, rows * copies, rows, shape.max_tokens)


def assisted(shape: Shape) -> Mode:
    """Another model drafts."""

    def run(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
        tokens = prompt(1, shape.prompt_tokens, shape.seed)
        return [model.generate(tokens, assistant_model=assistant_of(model), **shape.common)]

    return Mode(run, 1, 1, shape.max_tokens, ends_early=True)


def prompt_lookup(shape: Shape) -> Mode:
    """Drafts are found in the prompt, which repeats itself."""
    tokens = prompt(1, -(-shape.prompt_tokens // 3), shape.seed).repeat(1, 3)

    def run(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
        return [model.generate(tokens, prompt_lookup_num_tokens=4, **shape.common)]

    return Mode(run, 1, 1, tokens.shape[1] + shape.new_tokens - 1, ends_early=True)


def multi_turn(shape: Shape) -> Mode:
    """Several turns with one cache of the session."""

    def run(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
        assert new_cache is not None
        cache, tokens, outputs = new_cache(), prompt(shape.rows, shape.prompt_tokens, shape.seed), []
        for turn in range(TURNS):
            outputs.append(model.generate(tokens, **given(cache), **{**COMMON, "max_new_tokens": TURN_TOKENS}))
            more = prompt(shape.rows, TURN_PROMPT_TOKENS, seed=shape.seed + turn + 1)
            tokens = torch.cat([outputs[-1].sequences, more], dim=1)
        return outputs

    added = TURNS * TURN_TOKENS + (TURNS - 1) * TURN_PROMPT_TOKENS
    max_tokens = shape.prompt_tokens + added - 1
    return Mode(run, shape.rows, shape.rows, max_tokens)


def returned_cache(shape: Shape) -> Mode:
    """The cache that one call returns goes into the next."""

    def run(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
        inputs = padded_prompt(shape.rows, shape.prompt_tokens, shape.seed)
        options = {**COMMON, "max_new_tokens": TURN_TOKENS}
        first = model.generate(**inputs, **options)
        more = prompt(shape.rows, TURN_PROMPT_TOKENS, seed=shape.seed + 1)
        tokens = torch.cat([first.sequences, more], dim=1)
        added = torch.ones(shape.rows, TURN_TOKENS + TURN_PROMPT_TOKENS, dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], added], dim=1)
        second = model.generate(tokens, attention_mask=mask, **given(hf.returned_cache(first)), **options)
        return [first, second]

    return Mode(run, shape.rows, shape.rows, shape.prompt_tokens + TURN_TOKENS - 1)


def early_ends(shape: Shape) -> Mode:
    """Rows that meet their end token at different steps, the last one before `max_new_tokens`."""

    def run(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
        return once(shape, do_sample=True, eos_token_id=end_tokens(model, shape)).run(model, new_cache)

    return Mode(run, shape.rows, shape.rows, shape.max_tokens, ends_early=True)


KINDS: dict[str, Callable[[Shape], Mode]] = {
    "greedy": once,
    "sampling": lambda shape: once(shape, do_sample=True, temperature=1.3, top_k=20),
    "beams": lambda shape: once(shape, copies=3, num_beams=3),
    "padded_beams": lambda shape: once(shape, copies=3, padded=True, num_beams=3),
    "left_padding": lambda shape: once(shape, padded=True),
    "assisted": assisted,
    "prompt_lookup": prompt_lookup,
    "chunked_prefill": lambda shape: once(shape, prefill_chunk_size=10),
    "multi_turn": multi_turn,
    "returned_cache": returned_cache,
    "early_ends": early_ends,
    "return_sequences": lambda shape: once(shape, copies=3, do_sample=True, num_return_sequences=3),
}
SHAPES = {"left_padding": Shape(rows=3), "early_ends": Shape(rows=3), "prompt_lookup": Shape(prompt_tokens=36)}
MODES: dict[str, Mode] = {name: kind(SHAPES.get(name, Shape())) for name, kind in KINDS.items()}


# ---- caches and outcomes ---------------------------------------------------------------------------------------------


def plain_cache(model: PreTrainedModel) -> DynamicCache:
    """What the model caches in without us."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def given(cache: Any) -> dict[str, Any]:
    """The argument by which generate() and models of the installed release are given a cache."""
    return {hf.generation_name(): cache}


def emptied(cache: Any) -> Any:
    """The cache without its tokens. Transformers' own one is replaced: up to 5.17 `reset` kept its length."""
    if isinstance(cache, OffloadedHFCache):
        cache.reset()
        return cache
    return DynamicCache()


def outcome(outputs: list[Any]) -> Outcome:
    """Tokens and logits of all turns."""
    return Outcome([out.sequences for out in outputs], [step for out in outputs for step in out.logits])
