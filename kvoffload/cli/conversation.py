"""Turns of one conversation in one cache of a session: only what is new goes through the model.

Owns which tokens are in the cache and which come next. Does not own reading and printing (`chatting`).

The chat template is asked for the whole conversation each time. Where it begins with the very text that was said so
far, the rest is appended, token by token as it was generated; where a template changes what was said (it leaves out
thoughts, or trims), the cache is cut back to what both have in common, or begins anew where it cannot be cut.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from kvoffload import hf
from kvoffload.cli.answering import eos_ids, rendered
from kvoffload.cli.sampling import Sampling
from kvoffload.errors import ConfigError
from kvoffload.session.session import Session
from kvoffload.units import counted, duration


class Turn(NamedTuple):
    """What a turn took."""

    text: str
    prefilled_tokens: int  # that went through the model before the answer: what is new, seldom more
    reused_tokens: int  # of earlier turns, that were in the cache
    new_tokens: int
    cached_tokens: int  # after it
    first_token_s: float
    total_s: float
    tokens_per_s: float | None  # after the first token; None for a single one
    was_stopped: bool

    def __str__(self) -> str:
        rate = "" if self.tokens_per_s is None else f" at {self.tokens_per_s:.1f} tokens/s"
        stopped = "stopped; " if self.was_stopped else ""
        return (
            f"{stopped}read {counted(self.prefilled_tokens, 'token')} in {duration(self.first_token_s)}, "
            f"{self.reused_tokens} were cached; {self.new_tokens} new{rate}"
        )


class Conversation:
    """One conversation with the model of a session.

    Args:
        session: its model answers; must stay open.
        tokenizer: of the model. Without a chat template what is said is continued as plain text.
        max_new_tokens: of each answer.
        sampling: greedy unless given; a seed is set once, at the beginning.
        system: a message, or text, before everything.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        system: str | None = None,
    ) -> None:
        self.session, self.tokenizer = session, tokenizer
        self.model: Any = session.model
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._options = {"max_new_tokens": max_new_tokens, **(sampling or Sampling()).arguments()}
        self._options["pad_token_id"] = next(iter(eos_ids(self.model)), 0)
        self._system = system
        self._ids: list[int] = []  # all tokens said; after a turn all of them but the last are in the cache
        self.reset()
        if sampling is not None and sampling.seed is not None:
            torch.manual_seed(sampling.seed)

    def reset(self) -> None:
        """Begin anew, with an empty cache; the system's message stays."""
        self._messages = [{"role": "system", "content": self._system}] if self._system else []
        self._ids = []
        self._renew_cache()

    @property
    def is_near_its_end(self) -> bool:
        """Whether another answer may go beyond the tokens that the model was made for, as far as it says."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return isinstance(limit, int) and self.num_tokens + int(self._options["max_new_tokens"]) > limit

    @property
    def num_tokens(self) -> int:
        """Of the conversation so far."""
        return len(self._ids)

    def say(self, text: str, *, streamer: Any = None, stop: Any = None) -> Turn:
        """One turn: the model's answer to `text`, which both are part of the conversation from now on.

        Args:
            text: what the user says.
            streamer: gets the tokens as they come.
            stop: a stopping criterion, with `is_asked`; the part of an answer that came by then counts.

        Raises:
            ConfigError: the template refuses it, or it comes to no token.
            whatever `generate` raises; the conversation is as before the turn then, and the next one prefills it anew.
        """
        said = [*self._messages, {"role": "user", "content": text}]
        try:
            ids = self._ids_of(rendered(self.tokenizer, said)) if self.has_template else self._continued(text)
            cached = self._keep(ids)
            began = time.perf_counter()
            options = {hf.generation_name(): self._cache, "stopping_criteria": [stop] if stop is not None else None}
            given = torch.tensor([ids], device=self.model.device)
            tokens = self.model.generate(
                given, attention_mask=torch.ones_like(given), streamer=streamer, **self._options, **options
            )
        except BaseException:
            self._renew_cache()  # what it holds now is uncertain
            raise
        total_s = time.perf_counter() - began
        self._ids = tokens[0].tolist()
        new = self._ids[len(ids) :]
        answer = self.tokenizer.decode(new, skip_special_tokens=True)
        self._messages = [*said, {"role": "assistant", "content": answer}]
        stats = self.session.stats
        assert stats is not None, "generate() has just been counted"
        return Turn(
            text=answer.strip(),
            prefilled_tokens=len(ids) - cached,
            reused_tokens=cached,
            new_tokens=len(new),
            cached_tokens=self._cache.get_seq_length(),
            first_token_s=stats.ttft_s + stats.setup_s,
            total_s=total_s,
            tokens_per_s=stats.tokens_per_s if len(new) > 1 else None,
            was_stopped=stop is not None and stop.is_asked and new[-1] not in eos_ids(self.model),
        )

    def _renew_cache(self) -> None:
        self._cache = self.session.new_cache()  # the memory of the one before goes when nobody holds it

    def _keep(self, ids: list[int]) -> int:
        """Cut the cache back to what it has in common with `ids`; how many tokens that are."""
        cached = self._cache.get_seq_length()
        pairs = enumerate(zip(self._ids[:cached], ids[:-1], strict=False))
        common = next((idx for idx, (old, new) in pairs if old != new), min(cached, len(ids) - 1))
        if common == cached:
            return cached
        if self._cache.why_not_croppable() is None:
            self._cache.crop(common - cached)
            return common
        self._renew_cache()
        return 0

    def _ids_of(self, text: str) -> list[int]:
        """The tokens of a whole conversation, of which those that were generated stay as they are."""
        if self._ids:
            before = self._decoded(self._ids)
            if text.startswith(before):
                ids = self._ids + self._encoded(text[len(before) :])
                if self._decoded(ids) == text:
                    return ids
        return self._encoded(text)

    def _continued(self, text: str) -> list[int]:
        """Plain text goes on in a new line, as if no answer had come to an end."""
        if not self._ids:
            first: list[int] = self.tokenizer(f"{self._system}\n{text}" if self._system else text)["input_ids"]
            if not first:
                raise ConfigError("this comes to no token at all: say something else")
            return list(first)
        ids = self._ids[:-1] if self._ids[-1] in eos_ids(self.model) else self._ids
        return ids + self._encoded("\n" + text)

    def _encoded(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _decoded(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
