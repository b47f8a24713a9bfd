"""Rounds of drafts: what a model's forward answers while `generate()` asks it for one token after another.

Owns a round: a few tokens are drafted with what of the cache is on the device, dropped again, and checked together with
the token that was asked for in one pass over the whole cache. As long as `generate()` then asks for the tokens that
were drafted, it is given what that pass computed; at the first other token, and at the end, the rest is cropped. So the
loop, its processors, criteria, streamers and random numbers are those of plain decoding, one call for each token.

Does not own how many tokens are drafted (`lengths`), nor what a call of a model looks like (`hf.DecodeCall`).

Source: speculative decoding (Leviathan et al., arXiv 2211.17192) with the model's own partial cache as the draft (as
TriForce, arXiv 2404.11912, and VeriCache, arXiv 2605.17613, do). Sampled tokens are accepted where the draft drew the
same one with the same random numbers (coupling by the Gumbel-max trick: Daliri et al., arXiv 2408.07978): tokens are
those that plain sampling draws from the same seed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvoffload import hf
from kvoffload.backend import Backend
from kvoffload.config import MOST_DRAFTS
from kvoffload.draft.lengths import Report


class Rule(NamedTuple):
    """How a call of `generate()` chooses tokens, as far as a draft follows it."""

    processors: Sequence[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = ()
    do_sample: bool = False
    pad: int | None = None  # what a finished row is given; None: no row is finished before the others
    eos: torch.Tensor | None = None  # tokens that finish a row, on the device of the model


@dataclass(slots=True)
class _Round:
    """Tokens that went through the model together, of which some are still to be asked for."""

    began_s: float
    drafting_began_s: float  # of all time spent on drafts, when it began
    drafts: torch.Tensor | None = None  # [rows, drafts]; None: a plain step
    output: Any = None  # of the pass
    asked: int = 1  # tokens of the pass that `generate()` has asked for

    @property
    def drafted(self) -> int:
        return 0 if self.drafts is None else self.drafts.shape[1]

    @property
    def ahead(self) -> int:
        """Tokens that are cached and were not asked for."""
        return self.drafted + 1 - self.asked


class Rounds:
    """Stands in for the forward of a model during one `generate()`.

    Args:
        forward: the model's own.
        cache: that of the call; calls with another one go to `forward`.
        backend: of the session.
        rule: how the call chooses tokens.
        length: asked at each round how many tokens to draft.
        before_pass: told when a round begins, with how many drafts, or a forward that is none.
        report: told what came of each round.
        refuse: told why a call cannot be served by drafts.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        cache: hf.OffloadedHFCache,
        backend: Backend,
        *,
        rule: Rule,
        length: Callable[[hf.DecodeCall], int],
        before_pass: Callable[[int], None],
        report: Callable[[Report], None],
        refuse: Callable[[str], None],
    ) -> None:
        self.rule = rule
        self.prefix: torch.Tensor | None = None  # all tokens of each row so far, [rows, tokens], as processors see them
        self._forward, self._cache, self._backend = forward, cache, backend
        self._length, self._before_pass = length, before_pass
        self._report, self._refuse = report, refuse
        self._round: _Round | None = None
        self.num_asked = self.num_passes = 0  # tokens of decode steps, and the forwards that gave them
        self.num_drafted = 0  # of each sequence
        self._tried, self._accepted = [0] * MOST_DRAFTS, [0] * MOST_DRAFTS  # drafts, by their position in a round
        self._counted = 0  # drafts of all rounds and rows whose outcome was counted

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The model's forward: the next token from the round in progress, or from a new one."""
        if hf.given_cache(args, inputs) is not self._cache:
            return self._forward(*args, **inputs)
        if self._cache.core.layers[0].num_tokens:
            call = hf.DecodeCall.of(args, inputs)
            if isinstance(call, hf.DecodeCall):
                return self._next(call)
            if isinstance(call, str):
                self._refuse(call)
        self.settle()
        self._cache.record_past(False)
        self._before_pass(0)
        return self._forward(*args, **inputs)

    def _next(self, call: hf.DecodeCall) -> Any:
        self.num_asked += 1
        was_refused = False
        open_round = self._round
        # A crop by somebody else, between two tokens, has taken the rest of the round.
        if open_round is not None and open_round.ahead and open_round.ahead == self._cache.tokens_ahead:
            assert open_round.drafts is not None
            asked = open_round.asked
            if torch.equal(call.token, open_round.drafts[:, asked - 1 : asked]):
                open_round.asked += 1
                self._cache.tokens_ahead = open_round.ahead
                return hf.output_for(open_round.output, asked, open_round.drafted + 1)
            was_refused = True
        self._end(was_refused, time.perf_counter())
        self.num_passes += 1
        count, now = self._length(call), time.perf_counter()
        self._cache.record_past(count > 0)
        self._before_pass(count)
        self._round = begun = _Round(now, self._backend.span_seconds("draft"))
        if not count:
            return self._forward(**call.inputs)
        before = self._cache.core.layers[0].num_tokens
        try:
            with self._backend.sampling("draft", count):
                begun.drafts = self._draft(call.token, self.prefix, count, call.for_next)
        except BaseException:
            self._cache.tokens_ahead = self._cache.core.layers[0].num_tokens - before  # for whoever settles
            raise
        self.num_drafted += count
        with self._backend.recording("verification"):
            begun.output = self._forward(**call.for_all(torch.cat([call.token, begun.drafts], dim=1)))
        self._cache.tokens_ahead = begun.ahead
        return hf.output_for(begun.output, 0, count + 1)

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that were right; None without any."""
        return sum(self._accepted) / self._counted if self._counted else None

    def _count(self, drafted: int, outcomes: Sequence[tuple[int, bool]]) -> None:
        """Note what came of the drafts of a round."""
        for accepted, was_refused in outcomes:
            self._counted += drafted
            for position in range(accepted + was_refused):
                self._tried[position] += 1
                self._accepted[position] += position < accepted

    @property
    def survivals(self) -> list[float]:
        """Of rounds in which it was tried, the share in which the first draft was accepted, the first two, ..."""
        found, together = [], 1.0
        for tried, accepted in zip(self._tried, self._accepted, strict=True):
            if not tried:
                break
            together *= accepted / tried
            found.append(together)
        return found

    def settle(self) -> None:
        """End the round in progress: the cache is what plain decoding has cached by now."""
        self._end(False, None)

    def _end(self, was_refused: bool, now: float | None) -> None:
        """End the round in progress.

        Args:
            was_refused: whether another token than the next draft was asked for.
            now: when the next one begins; None: none does.
        """
        ended, self._round = self._round, None
        if ended is None:
            return
        outcomes = ((ended.asked - 1, was_refused),)
        if self._cache.tokens_ahead is not None:
            self._cache.crop(0)  # with those that nobody asked for
        if ended.drafts is not None:
            self._count(ended.drafted, outcomes)
        self._tell(ended, outcomes, now)

    def _tell(self, ended: _Round, outcomes: tuple[tuple[int, bool], ...], now: float | None) -> None:
        """Report a round."""
        if now is not None:
            draft_s = self._backend.span_seconds("draft") - ended.drafting_began_s
            self._report(Report(ended.drafted, outcomes, ended.asked, draft_s, now - ended.began_s))

    def _draft(
        self,
        token: torch.Tensor,
        ids: torch.Tensor | None,
        count: int,
        inputs: Callable[[torch.Tensor, int], dict[str, Any]],
    ) -> torch.Tensor:
        """The next tokens, [rows, count], as what is on the device suggests; nothing of them stays cached.

        Args:
            token: the last one of each row, [rows, 1].
            ids: all of each row so far, with that one, [rows, tokens]; None where nobody knows.
            count: how many.
            inputs: what the model is called with for a token, [rows, 1], and the number of drafts before it.
        """
        rule = self.rule
        is_finished = None if rule.pad is None else token == rule.pad
        found: list[torch.Tensor] = []
        core = self._cache.core
        core.engine.forget_gap()  # what passes until the next pass is no gap between two steps
        core.is_drafting = True
        try:
            device = token.device if ids is None else ids.device  # where the loop chooses
            with _own_random_numbers(device) if rule.do_sample else contextlib.nullcontext():
                for ahead in range(count):
                    logits = hf.logits_of(self._forward(**inputs(token, ahead)))
                    token = self._choose(ids, logits[:, -1].to(device)).to(token.device)
                    if is_finished is not None and rule.pad is not None and rule.eos is not None:
                        token = token.masked_fill(is_finished, rule.pad)
                        is_finished = is_finished | torch.isin(token, rule.eos)
                    found.append(token)
                    if rule.processors and ids is not None:
                        ids = torch.cat([ids, token.to(ids.device)], dim=1)
        finally:
            core.is_drafting = False
        self._drop(count)
        return torch.cat(found, dim=1)

    def _drop(self, count: int) -> None:
        """Drafts are not cached any more."""
        self._cache.crop(-count)

    def _scores(self, ids: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
        """What processors make of logits [rows, vocabulary], in float32; as they are where `ids` are unknown."""
        scores = logits.to(copy=True, dtype=torch.float32)
        if ids is not None:
            for processor in self.rule.processors:
                scores = processor(ids, scores)
        return scores

    def _choose(self, ids: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row, [rows, 1], by logits [rows, vocabulary]."""
        scores = self._scores(ids, logits)
        if self.rule.do_sample:
            return torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1)
        return torch.argmax(scores, dim=-1, keepdim=True)


@contextlib.contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """What is drawn within is drawn again after it, from the same state."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
