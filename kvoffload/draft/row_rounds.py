"""Rounds in which each row of a batch goes at its own pace.

In lock-step a round keeps as many drafts as all rows accept. Here a row keeps those of its own that the model itself
chose, and is ahead of the others for a while: what the pass computed for it is kept until `generate()` asks, which asks
all rows for the token at one place. A row that is too far ahead waits. That a draft is right is expected from the
logits of the pass (greedy decoding, the processors of a draft); where `generate()` asks for another token after all,
that row begins anew at the token asked for.

Owns what rows are ahead. The cache has their tokens at the end of its tail, and in front of the shorter ones unused
slots that a mask hides (`CacheCore.keep`), so positions differ by row: of models that are told positions, without
layers that count slots (`OffloadedHFCache.can_go_by_rows`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvoffload import hf
from kvoffload.draft.rounds import Rounds, _Round
from kvoffload.planning.drafts import MOST_LEAD


class _Held(NamedTuple):
    """A token of a row that is cached, and what the model said to it."""

    token: int
    logits: torch.Tensor  # [1, vocabulary]


@dataclass(slots=True)
class _RowRound(_Round):
    """A round whose rows kept different numbers of drafts."""

    count: int = 0  # drafts of each row
    outcomes: tuple[tuple[int, bool], ...] = ()
    answered: int = 0  # tokens that were asked for

    @property
    def drafted(self) -> int:
        return self.count


class RowRounds(Rounds):
    """Stands in for the forward of a model during one `generate()` of several rows; arguments as of `Rounds`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: list[list[_Held]] = []  # by row, from the next token that is asked for on
        self._following: list[int] = []  # of each row, the token behind those
        self._ahead: int | None = None  # slots beyond what was asked for, as left; None: no row holds anything

    def _next(self, call: hf.DecodeCall) -> Any:
        if not call.has_positions or not self._cache.can_go_by_rows:
            return super()._next(call)
        self.num_asked += 1
        tokens: list[int] = call.token[:, 0].tolist()
        if self._ahead is None or self._cache.tokens_ahead != self._ahead or len(self._held) != len(tokens):
            self._let_go(len(tokens))  # a crop by somebody else, between two tokens, has taken what rows held
        for held, token in zip(self._held, tokens, strict=True):
            if held and held[0].token != token:
                held.clear()
        if all(self._held):
            return self._answer()
        for row, held in enumerate(self._held):  # of the others one may have begun anew
            if len(held) > MOST_LEAD:
                self._following[row] = held[MOST_LEAD].token
                del held[MOST_LEAD:]
        self._end(False, time.perf_counter())
        return self._begin(call, tokens)

    def _let_go(self, rows: int) -> None:
        self._held, self._ahead = [[] for _ in range(rows)], None

    def _begin(self, call: hf.DecodeCall, tokens: Sequence[int]) -> Any:
        """A round, in which the token asked for is the first of the rows that hold nothing."""
        cache, core = self._cache, self._cache.core
        asked = core.layers[0].num_tokens - (cache.tokens_ahead or 0)
        leads = [len(held) for held in self._held]
        was_ahead, self._ahead = self._ahead, None
        self.num_passes += 1
        try:
            if was_ahead is not None:
                cache.session.claim(cache)  # another cache may have had the engine's buffers
                stored = core.layers[0].num_stored_tokens
                core.keep([asked - stored + lead for lead in leads])
            cache.tokens_ahead = max(leads)
            count, now = self._length(call), time.perf_counter()
            cache.record_past(count > 0 or any(leads))
            self._before_pass(count)
            self._round = begun = _RowRound(now, self._backend.span_seconds("draft"), count=count)
            cache.tokens_ahead = None
            if not count and not any(leads):
                self._let_go(len(tokens))
                return self._forward(**call.inputs)
            self._check(call, tokens, leads, asked, begun)
        except BaseException:
            cache.tokens_ahead = core.layers[0].num_tokens - asked  # for whoever settles
            raise
        self._ahead = core.layers[0].num_tokens - asked
        return self._answer()

    def _check(
        self, call: hf.DecodeCall, tokens: Sequence[int], leads: Sequence[int], asked: int, begun: _RowRound
    ) -> None:
        """Draft, and hold what of it is right."""
        core, count = self._cache.core, begun.count
        rows = call.by_rows(leads, core.unused, asked, core.layers[0].num_stored_tokens, core.placement.max_tokens)
        first = [self._following[row] if held else tokens[row] for row, held in enumerate(self._held)]
        given = torch.tensor(first, device=call.token.device).unsqueeze(-1)
        prefix = self._prefix(first)
        if count:
            with self._backend.sampling("draft", count):
                given = torch.cat([given, self._draft(given, prefix, count, rows.for_next)], dim=1)
            self.num_drafted += count
        with self._backend.recording("verification"):
            begun.output = self._forward(**rows.for_all(given))
        logits = hf.logits_of(begun.output)[:, -given.shape[1] :]
        begun.outcomes = self._keep_right(given, logits, prefix, asked)

    def _prefix(self, first: Sequence[int]) -> torch.Tensor | None:
        """All tokens of each row, with what it holds and its next one, those of shorter ones behind padding."""
        if self.prefix is None or not self.rule.processors:
            return None
        more = [
            [*(one.token for one in held[1:]), token] if held else []
            for held, token in zip(self._held, first, strict=True)
        ]
        most, given = max(map(len, more)), self.prefix
        found = given.new_full((len(more), most + given.shape[1]), self.rule.pad or 0)
        for row, tokens in enumerate(more):
            begin = most - len(tokens)
            found[row, begin : begin + given.shape[1]] = given[row]
            if tokens:
                found[row, begin + given.shape[1] :] = torch.tensor(tokens)
        return found

    def _keep_right(
        self, given: torch.Tensor, logits: torch.Tensor, prefix: torch.Tensor | None, asked: int
    ) -> tuple[tuple[int, bool], ...]:
        """Each row holds its tokens of a pass up to the last right draft; what came of the drafts of unfinished rows.

        Args:
            given: tokens that went through the model, [rows, tokens]: the next one of each row, and drafts.
            logits: that the model gave them, [rows, tokens, vocabulary].
            prefix: all tokens of each row, with its next one.
            asked: cached tokens that every row was asked for.
        """
        tokens, chosen = given.tolist(), self._expected(given, logits, prefix)
        count, outcomes = given.shape[1] - 1, []
        right: list[int] = []
        for mine, theirs in zip(tokens, chosen, strict=True):
            kept = next((idx for idx in range(count) if theirs[idx] != mine[idx + 1]), count)
            right.append(kept)
            if self.rule.pad is None or mine[0] != self.rule.pad:
                outcomes.append((kept, kept < count))
        limit = self._cache.core.placement.max_tokens
        shortest = min(len(held) + kept + 1 for held, kept in zip(self._held, right, strict=True))
        self._following = []
        for row, (held, kept) in enumerate(zip(self._held, right, strict=True)):
            fitting = min(kept + 1, shortest + MOST_LEAD - len(held))
            if limit is not None:
                fitting = min(fitting, max(0, limit - asked - len(held)))
            kept_logits = logits[row, :fitting].clone()  # what others did not keep goes
            held += [_Held(tokens[row][idx], kept_logits[idx : idx + 1]) for idx in range(fitting)]
            self._following.append(chosen[row][kept] if fitting == kept + 1 else tokens[row][fitting])
        self._count(count, outcomes)
        return tuple(outcomes)

    def _expected(self, given: torch.Tensor, logits: torch.Tensor, prefix: torch.Tensor | None) -> list[list[int]]:
        """The token that `generate()` is expected to choose behind each of these, [rows][tokens]."""
        rule = self.rule
        if prefix is None:
            found = logits.argmax(-1)
        else:
            found, ids = torch.empty_like(given), prefix
            for idx in range(given.shape[1]):
                found[:, idx] = self._scores(ids, logits[:, idx].to(ids.device)).argmax(-1)
                ids = torch.cat([ids, given[:, idx + 1 : idx + 2].to(ids.device)], dim=1)
        chosen: list[list[int]] = found.tolist()
        if rule.pad is not None and rule.eos is not None:
            ends = set(rule.eos.tolist())
            for mine, theirs in zip(given.tolist(), chosen, strict=True):
                is_finished = mine[0] == rule.pad
                for idx, token in enumerate(theirs):
                    theirs[idx] = rule.pad if is_finished else token
                    is_finished |= theirs[idx] in ends
        return chosen

    def _answer(self) -> Any:
        """What every row holds for the token asked for."""
        begun = self._round
        assert isinstance(begun, _RowRound) and self._ahead is not None
        logits = torch.stack([held.pop(0).logits for held in self._held])
        self._ahead -= 1
        self._cache.tokens_ahead = self._ahead
        begun.answered += 1
        return hf.output_with(begun.output, logits)

    def _drop(self, count: int) -> None:
        if isinstance(self._round, _RowRound):
            self._cache.core.crop(count)
        else:
            super()._drop(count)

    def _end(self, was_refused: bool, now: float | None) -> None:
        begun = self._round
        if isinstance(begun, _RowRound):
            self._round = None
            begun.asked = max(1, begun.answered)
            self._tell(begun, begun.outcomes, now)
        else:
            super()._end(was_refused, now)
        if now is None and self._cache.tokens_ahead is not None:  # nothing follows
            self._let_go(0)
            self._cache.crop(0)
