"""How many tokens a round drafts: as many as a user asks for, or as many as what was measured says.

Owns the estimates of what a round takes and of how many drafts are accepted, the choice between all numbers of drafts,
none among them, and how much bad drafts may cost. Does not own the prediction it begins with (`planning/drafts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from kvoffload.config import MOST_DRAFTS
from kvoffload.planning.drafts import PRIOR_ACCEPTANCE, RoundTimes, best_length, tokens_per_round

FORGET = 0.03  # of what was seen, at each further round: a text changes
PRIOR_ROUNDS = 3.0  # that the prior acceptance counts for, for each position
NEW_SHARE = 0.3  # of a measured time in the mean of the latest ones
MOST_LOST_FRACTION = 0.015  # of the time so far, that drafts may have cost
MOST_LOST_STEPS = 1.5  # or so many steps without drafts, where that is more
MOST_CREDIT_STEPS = 4.0  # that drafts have gained before, and may lose as well
SURE_GAIN = 2.0  # by drafts, from which on a step without them need not be measured
FIRST_PAUSE_TOKENS = 24  # without drafts, once these do not pay; twice as many at each further time
LONGEST_PAUSE_TOKENS = 384
ROUNDS_BEFORE_SWITCH = 4  # of drafts that read one near cache, before another is thought of
MOST_SWITCHES = 2  # in a call: there, and back
SWITCH_GAIN = 1.1  # by which tokens must come faster then, and by which that must outweigh its cost
SWITCH_PASSES = 1.5  # without drafts, that a switch takes: missing copies cross the link
LEAST_OF_FIRST = 0.15  # of the first drafts, that are accepted; with less it is not for what drafts cannot see


class Report(NamedTuple):
    """What came of one round, a plain step among them."""

    drafted: int
    # of each row, or of all of them together: drafts that were right, and whether the next one was wrong; else the
    # round ended for another reason
    outcomes: tuple[tuple[int, bool], ...]
    tokens: int  # of each row, that were asked for
    draft_s: float
    seconds: float  # from its beginning to that of the next, drafts included


class Lengths(Protocol):
    """Asked before each round, and told what came of it."""

    most: int  # the most that are ever drafted

    def next(self, most: int) -> int:
        """Tokens to draft now, at most so many."""
        ...

    def note(self, report: Report) -> None:
        """A round is over."""
        ...

    def wants_other(self, left: int) -> bool:
        """Whether drafts should read the other near cache for so many tokens to come, asked between two rounds."""
        ...

    def switch(self) -> None:
        """They do."""
        ...


class FixedLength:
    """As many as a user asks for.

    Args:
        number: of them.
    """

    def __init__(self, number: int) -> None:
        self.most = number

    def next(self, most: int) -> int:
        return min(self.most, most)

    def note(self, report: Report) -> None:
        """Nothing follows from it."""

    def wants_other(self, left: int) -> bool:
        return False

    def switch(self) -> None:
        """Never asked for."""


class Acceptance:
    """How often drafts are accepted, by their position in a round, as far as rounds tell.

    Of the drafts of a round the first that is refused is the last that tells anything.
    """

    def __init__(self, prior: float = PRIOR_ACCEPTANCE) -> None:
        self._prior = prior
        self._tried = [0.0] * MOST_DRAFTS
        self._accepted = [0.0] * MOST_DRAFTS

    def note(self, outcomes: Sequence[tuple[int, bool]]) -> None:
        """Of each row, or of all of them together: so many drafts were accepted, and perhaps the next one refused."""
        self.forget(FORGET)
        for accepted, was_refused in outcomes:
            for position in range(accepted):
                self._tried[position] += 1
                self._accepted[position] += 1
            if was_refused:
                self._tried[accepted] += 1

    def forget(self, share: float = 0.9) -> None:
        """What was seen counts for less by so much."""
        for counts in (self._tried, self._accepted):
            counts[:] = [(1 - share) * count for count in counts]

    @property
    def of_first(self) -> float:
        """The share of the rounds so far whose first draft was accepted; 0 without any."""
        return self._accepted[0] / self._tried[0] if self._tried[0] else 0.0

    def survivals(self) -> list[float]:
        """S_1, S_2, ...: the first i drafts are all accepted."""
        # A position that was seldom tried is expected to do as all positions did.
        pooled = PRIOR_ROUNDS * self._prior + sum(self._accepted)
        pooled /= PRIOR_ROUNDS + sum(self._tried)
        found, together = [], 1.0
        for tried, accepted in zip(self._tried, self._accepted, strict=True):
            together *= (PRIOR_ROUNDS * pooled + accepted) / (PRIOR_ROUNDS + tried)
            found.append(together)
        return found


class MeasuredTimes:
    """What rounds take: as predicted, until they were measured.

    Args:
        predicted: by the plan.
    """

    def __init__(self, predicted: RoundTimes) -> None:
        self._predicted = predicted
        self._draft_s: float | None = None
        self._pass_s: dict[int, float] = {}  # by drafts: what a round took beside them

    def note(self, drafts: int, draft_s: float, seconds: float) -> None:
        """A round of so many drafts took so long, of that so much to draft."""
        if drafts:
            self._draft_s = _mean(self._draft_s, draft_s / drafts)
        self._pass_s[drafts] = _mean(self._pass_s.get(drafts), max(0.0, seconds - draft_s))

    @property
    def knows_steps(self) -> bool:
        """Whether a step without drafts was measured."""
        return 0 in self._pass_s

    def like(self, other: MeasuredTimes) -> MeasuredTimes:
        """The same, where nothing was measured as much slower than predicted as the other times are."""
        if self._pass_s or not other._pass_s:
            return self
        drafts = min(other._pass_s)
        slower = other._pass_s[drafts] / max(1e-9, other._beside(drafts))
        slower_drafts = other.draft_s / max(1e-9, other._predicted.draft_s)
        predicted = self._predicted
        return MeasuredTimes(
            replace(
                predicted,
                draft_s=predicted.draft_s * slower_drafts,
                pass_s=tuple(seconds * slower for seconds in predicted.pass_s),
                ahead_s=predicted.ahead_s * slower,
            )
        )

    @property
    def draft_s(self) -> float:
        """T_d."""
        return self._predicted.draft_s if self._draft_s is None else self._draft_s

    def round_s(self, drafts: int) -> float:
        """Of a round; one of a length that was not measured by the nearest that was."""
        drafting_s = drafts * self.draft_s
        if not self._pass_s:
            return drafting_s + self._beside(drafts)
        nearest = min(self._pass_s, key=lambda measured: (abs(measured - drafts), measured))
        return drafting_s + self._beside(drafts) * self._pass_s[nearest] / max(1e-9, self._beside(nearest))

    def _beside(self, drafts: int) -> float:
        """What a round takes beside drafting, as predicted."""
        predicted = self._predicted
        return predicted.pass_s[drafts] - min(drafts * self.draft_s, predicted.ahead_s)


class _Estimates(NamedTuple):
    """What is known of drafts that read one near cache."""

    acceptance: Acceptance
    times: MeasuredTimes
    reads_all: bool  # a copy of every block, if not an exact one
    paced: int  # rows at their own pace; 1: lock-step

    @classmethod
    def of(cls, predicted: RoundTimes, rows: int) -> _Estimates:
        """Before anything was measured."""
        together = rows if predicted.paced_rows == 1 else 1
        acceptance = Acceptance(predicted.acceptance**together)
        return cls(acceptance, MeasuredTimes(predicted), predicted.reads_all, predicted.paced_rows)

    def expected(self, other: _Estimates) -> _Estimates:
        """The same, with what the other near cache tells of this one."""
        return self._replace(times=self.times.like(other.times))

    def token_s(self, bound: Sequence[float] | None = None) -> float:
        """Of the best number of drafts; accepted no more often than `bound` says, or if they read all no less often."""
        survivals = self.acceptance.survivals()
        if bound is not None:
            choose = max if self.reads_all else min
            survivals = [choose(one, limit) for one, limit in zip(survivals, bound, strict=True)]
        length = best_length(survivals, self.times.round_s, MOST_DRAFTS, self.paced)
        return self.times.round_s(length) / tokens_per_round(survivals, length, self.paced)


class PlannedLength:
    """As many as make a token cheapest, by what was measured; none where they do not pay.

    What drafts cost more than decoding without them is kept within a part of the time so far.

    Args:
        predicted: by the plan.
        rows: sequences.
        other: the same for the other near cache, if drafts can read that from the next round on.
    """

    most = MOST_DRAFTS

    def __init__(self, predicted: RoundTimes, rows: int = 1, other: RoundTimes | None = None) -> None:
        self._now = _Estimates.of(predicted, rows)
        self._other = None if other is None else _Estimates.of(other, rows)
        self._switches_left, self._rounds = MOST_SWITCHES, 0  # of drafts, since the last switch
        self._seconds = self._lost_s = 0.0
        self._pause_tokens, self._next_pause_tokens = 0, FIRST_PAUSE_TOKENS
        self._is_first = True

    def wants_other(self, left: int) -> bool:
        other = self._other
        is_over = self._pause_tokens > 0 or self._lost_s > self._may_lose_s  # nothing more is learnt before long
        if other is None or not self._switches_left or (self._rounds < ROUNDS_BEFORE_SWITCH and not is_over):
            return False
        survivals = self._now.acceptance.survivals()
        if other.reads_all and self._now.acceptance.of_first < LEAST_OF_FIRST:
            return False  # not for what these drafts do not see
        other, now_s = other.expected(self._now), self._now.token_s()
        other_s = other.token_s(survivals)
        gain_s, cost_s = left * (now_s - other_s), SWITCH_PASSES * other.times.round_s(0)
        return other_s * SWITCH_GAIN < now_s and gain_s > SWITCH_GAIN * cost_s

    def switch(self) -> None:
        assert self._other is not None
        self._now, self._other = self._other.expected(self._now), self._now
        self._switches_left, self._rounds = self._switches_left - 1, 0
        self._pause_tokens = 0

    def next(self, most: int) -> int:
        if self._pause_tokens > 0 or self._lost_s > self._may_lose_s:
            return 0
        survivals = self._now.acceptance.survivals()
        length = best_length(survivals, self._now.times.round_s, most, self._now.paced)
        if length and self._is_in_doubt(survivals, length):
            return 0  # so that it is known what drafts are to be compared with
        if not length and most:
            self._pause_tokens = self._next_pause_tokens
            self._next_pause_tokens = min(LONGEST_PAUSE_TOKENS, 2 * self._next_pause_tokens)
        return length

    def _is_in_doubt(self, survivals: Sequence[float], length: int) -> bool:
        """Whether drafts gain so little by what is known of a step without them that it must be measured."""
        times = self._now.times
        if self._is_first or times.knows_steps:
            return False
        tokens = tokens_per_round(survivals, length, self._now.paced)
        gain = tokens * times.round_s(0) / times.round_s(length)
        return gain < SURE_GAIN

    @property
    def _may_lose_s(self) -> float:
        return max(MOST_LOST_FRACTION * self._seconds, MOST_LOST_STEPS * self._now.times.round_s(0))

    def note(self, report: Report) -> None:
        if report.drafted:
            self._rounds += 1
            self._now.acceptance.note(report.outcomes)
        if self._is_first:  # the first step waits for the write-back of the prompt
            self._is_first = False
            return
        self._now.times.note(report.drafted, report.draft_s, report.seconds)
        self._seconds += report.seconds
        if not report.drafted:
            self._pause_tokens -= report.tokens
            if self._pause_tokens <= 0 < self._pause_tokens + report.tokens:
                self._now.acceptance.forget()  # the text may be another by now
            return
        plain_s = self._now.times.round_s(0)
        self._lost_s = max(-MOST_CREDIT_STEPS * plain_s, self._lost_s + report.seconds - report.tokens * plain_s)
        if self._lost_s <= 0:
            self._next_pause_tokens = FIRST_PAUSE_TOKENS


def _mean(before: float | None, value: float) -> float:
    """The mean of the latest values."""
    return value if before is None else before + NEW_SHARE * (value - before)
