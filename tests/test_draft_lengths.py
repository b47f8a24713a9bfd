"""How many tokens a round drafts: the rule, what is measured, and how much bad drafts may cost."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from kvoffload.config import MOST_DRAFTS
from kvoffload.draft.lengths import Acceptance, FixedLength, MeasuredTimes, PlannedLength, Report
from kvoffload.planning.drafts import (
    MOST_LEAD,
    RoundTimes,
    best_length,
    expected_rounds,
    speedup,
    survival,
    tokens_per_round,
)


def times(ratio: float, *, ahead_s: float = 0.0, growth: float = 0.0) -> RoundTimes:
    """Rounds whose pass takes `ratio` drafts, a pass of several tokens a little longer."""
    return RoundTimes(
        draft_s=1.0,
        pass_s=tuple(ratio + growth * more for more in range(MOST_DRAFTS + 1)),
        window_tokens=1024,
        ahead_s=ahead_s,
    )


# ---- the rule --------------------------------------------------------------------------------------------------------


def test_a_round_is_its_drafts_and_a_pass_less_what_the_link_did_meanwhile() -> None:
    found = times(25.0, ahead_s=3.0, growth=0.5)
    assert found.round_s(0) == 25.0
    assert found.round_s(2) == pytest.approx(2 + 26.0 - 2)
    assert found.round_s(12) == pytest.approx(12 + 31.0 - 3)


def test_a_batch_in_lock_step_keeps_what_all_rows_accept() -> None:
    assert survival(0.5, drafts=3) == [0.5, 0.25, 0.125]
    assert survival(0.5, rows=2, drafts=2) == [0.25, 0.0625]
    assert tokens_per_round([0.5, 0.25], 2) == 1.75


@pytest.mark.parametrize("ratio", [1.5, 3.0, 8.0, 25.0, 50.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_the_best_length_is_the_best_of_all(ratio: float, acceptance: float) -> None:
    survivals, found = survival(acceptance), times(ratio)
    length = best_length(survivals, found.round_s, MOST_DRAFTS)
    gains = [speedup(survivals, found, k) for k in range(MOST_DRAFTS + 1)]
    assert gains[length] == pytest.approx(max(gains))
    assert gains[0] == 1.0
    assert length == (0 if acceptance == 0 else length)
    assert best_length(survivals, found.round_s, 2) <= 2


def test_drafts_that_gain_little_are_not_planned() -> None:
    assert expected_rounds(times(1.2), 1).drafts == 0
    found = expected_rounds(times(25.0), 1)
    assert found.drafts > 3
    assert found.token_s < 25.0 / 2
    assert expected_rounds(times(25.0), 8).drafts == 0  # no eight rows accept a draft of this prior together
    assert expected_rounds(times(1.2), 1, drafts=4).drafts == 4  # asked for
    assert expected_rounds(replace(times(25.0), window_tokens=16), 1).drafts == 0  # what they would see is too little


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_acceptance_is_counted_by_position() -> None:
    """Bimodal: half of the rounds accept nothing, the others all of it."""
    found = Acceptance()
    for turn in range(400):
        found.note([(8, False) if turn % 2 else (0, True)])
    survivals = found.survivals()
    assert survivals[0] == pytest.approx(0.5, abs=0.06)
    assert survivals[7] == pytest.approx(0.5, abs=0.1)  # once the first is, all are; a power law would say 0.004


def test_a_refused_draft_says_nothing_of_those_behind_it() -> None:
    found = Acceptance(prior=0.5)
    for _ in range(200):
        found.note([(2, True)])
    survivals = found.survivals()
    assert survivals[1] > 0.9
    assert survivals[2] < 0.1 * survivals[1]
    assert found.survivals() == survivals
    found.forget()
    assert found.survivals()[2] > survivals[2]


def test_times_are_as_predicted_until_they_are_measured() -> None:
    found = MeasuredTimes(times(10.0, growth=1.0))
    assert found.round_s(4) == 4 + 14.0
    found.note(4, 8.0, 8.0 + 28.0)  # both twice as long as predicted
    assert found.draft_s == 2.0
    assert found.round_s(4) == pytest.approx(8.0 + 28.0)
    assert found.round_s(0) == pytest.approx(20.0)
    found.note(0, 0.0, 40.0)
    assert found.round_s(0) == pytest.approx(40.0)
    assert found.round_s(3) == pytest.approx(6.0 + 26.0)  # by the nearest


@pytest.mark.parametrize("acceptance", [0.7, 0.9, 0.97])
@pytest.mark.parametrize("drafts", [4, 8, 15])
@pytest.mark.parametrize("rows", [2, 4, 8])
def test_rows_at_their_own_pace_give_nearly_the_tokens_of_simulated_ones(
    rows: int, drafts: int, acceptance: float
) -> None:
    generator, held, asked, rounds = random.Random(rows), [0] * rows, 0, 4000
    for _ in range(rounds):
        for row in range(rows):
            accepted = 0
            while accepted < drafts and generator.random() < acceptance:
                accepted += 1
            held[row] += accepted + 1
        slowest = min(held)
        asked += slowest
        held = [min(tokens - slowest, MOST_LEAD) for tokens in held]
    expected = tokens_per_round(survival(acceptance), drafts, rows)
    assert expected == pytest.approx(asked / rounds, rel=0.1)
    assert expected > tokens_per_round(survival(acceptance, rows), drafts)  # lock-step


# ---- planned and corrected -------------------------------------------------------------------------------------------


class TwoCaches:
    """Decoding with drafts that read one near cache, and can read another: times and acceptance of each."""

    def __init__(self, now: tuple[RoundTimes, float], other: tuple[RoundTimes, float], seed: int = 0) -> None:
        self.lengths = PlannedLength(now[0], other=other[0])
        self._caches, self._random = [now, other], random.Random(seed)
        self.seconds, self.switches = 0.0, 0

    def play(self, tokens: int) -> None:
        left = tokens
        while left > 0:
            if self.lengths.wants_other(left):
                self.lengths.switch()
                self._caches.reverse()
                self.switches += 1
                self.seconds += self._caches[0][0].round_s(0)
            real, acceptance = self._caches[0]
            k = self.lengths.next(MOST_DRAFTS)
            accepted = 0
            while accepted < k and self._random.random() < acceptance:
                accepted += 1
            self.lengths.note(Report(k, ((accepted, accepted < k),), accepted + 1, k * real.draft_s, real.round_s(k)))
            self.seconds += real.round_s(k)
            left -= accepted + 1


WINDOW = times(25.0)
SHADOW = replace(times(30.0), draft_s=1.8, reads_all=True, acceptance=0.9)


def seconds_for(tokens: int, real: RoundTimes, acceptance: float) -> float:
    """With the best number of drafts, known beforehand."""
    survivals = survival(acceptance)
    length = best_length(survivals, real.round_s, MOST_DRAFTS)
    return tokens * real.round_s(length) / tokens_per_round(survivals, length)


@pytest.mark.parametrize("seed", range(4))
def test_drafts_that_miss_what_stands_far_back_read_copies_of_everything(seed: int) -> None:
    played = TwoCaches((WINDOW, 0.5), (SHADOW, 0.95), seed)
    played.play(400)
    assert played.switches == 1
    assert played.seconds <= 1.35 * seconds_for(400, SHADOW, 0.95)
    assert played.seconds <= 0.7 * seconds_for(400, WINDOW, 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_copies_that_are_too_coarse_for_a_model_make_room_for_a_window(seed: int) -> None:
    """Whose passes are shorter, as it is exact."""
    played = TwoCaches((SHADOW, 0.1), (times(15.0), 0.1), seed)
    played.play(400)
    assert played.switches == 1
    assert played.seconds <= 1.1 * 400 * 15.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6])
def test_where_the_other_near_cache_is_no_better_little_is_lost(acceptance: float, seed: int) -> None:
    played = TwoCaches((WINDOW, acceptance), (SHADOW, acceptance), seed)
    played.play(400)
    assert played.switches in ((0,) if acceptance == 0.0 else (0, 2))
    alone = Played(PlannedLength(WINDOW), WINDOW, seed)
    alone.play(400, acceptance)
    assert played.seconds <= 1.12 * alone.seconds


def test_good_drafts_stay_with_their_near_cache() -> None:
    for now, other in ((WINDOW, SHADOW), (SHADOW, WINDOW)):
        played = TwoCaches((now, 0.97), (other, 0.97))
        played.play(400)
        assert not played.switches


class Played:
    """Decoding at given times and a given acceptance of each draft."""

    def __init__(self, lengths: PlannedLength | FixedLength, real: RoundTimes, seed: int = 0) -> None:
        self.lengths, self.real, self._random = lengths, real, random.Random(seed)
        self.seconds, self.tokens, self.drafted = 0.0, 0, 0

    def play(self, tokens: int, acceptance: float) -> None:
        until = self.tokens + tokens
        while self.tokens < until:
            k = self.lengths.next(MOST_DRAFTS)
            accepted = 0
            while accepted < k and self._random.random() < acceptance:
                accepted += 1
            seconds = self.real.round_s(k)
            self.lengths.note(Report(k, ((accepted, accepted < k),), accepted + 1, k * self.real.draft_s, seconds))
            self.seconds += seconds
            self.tokens += accepted + 1
            self.drafted += k


@pytest.mark.parametrize("ratio", [2.0, 3.0, 8.0, 14.0, 25.0, 50.0])
@pytest.mark.parametrize("seed", range(4))
def test_worthless_drafts_cost_little(ratio: float, seed: int) -> None:
    played = Played(PlannedLength(times(ratio)), times(ratio), seed)
    played.play(200, acceptance=0.0)
    assert played.drafted > 0
    assert played.seconds <= 1.03 * 200 * ratio


@pytest.mark.parametrize("ratio", [3.0, 8.0, 25.0, 50.0])
@pytest.mark.parametrize("acceptance", [0.2, 0.5, 0.8, 0.95])
def test_it_is_nearly_as_fast_as_the_best_length_known_beforehand(ratio: float, acceptance: float) -> None:
    real = times(ratio, growth=0.1)
    survivals = survival(acceptance)
    length = best_length(survivals, real.round_s, MOST_DRAFTS)
    best_s = real.round_s(length) / tokens_per_round(survivals, length)
    taken = []
    for seed in range(5):
        played = Played(PlannedLength(real), real, seed)
        played.play(400, acceptance)
        taken.append(played.seconds / played.tokens)
    assert sum(taken) / len(taken) <= 1.1 * best_s


def test_a_wrong_prediction_is_corrected() -> None:
    """Passes are predicted to take 25 drafts, and take 1.05: drafts are dropped, at no more than a few steps."""
    real = times(1.05)
    played = Played(PlannedLength(times(25.0)), real)
    played.play(400, acceptance=0.6)
    assert played.seconds <= 1.05 * 400 * 1.05


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.35])
def test_a_pass_of_many_tokens_that_takes_longer_than_predicted_is_found_out(acceptance: float) -> None:
    """As with experts, of which more are met: several tokens take 1.6 times one, and were predicted to take as long."""
    real = RoundTimes(draft_s=1.0, pass_s=(12.0, *[19.2] * MOST_DRAFTS), window_tokens=1024, ahead_s=0.0)
    played = Played(PlannedLength(times(12.0)), real)
    played.play(200, acceptance)
    assert played.seconds <= 1.05 * 200 * 12.0


def test_drafts_begin_again_where_the_text_changes() -> None:
    played = Played(PlannedLength(times(25.0)), times(25.0))
    played.play(150, acceptance=0.0)
    bad_s, bad_tokens = played.seconds, played.tokens
    played.play(600, acceptance=0.9)
    gained = 25.0 * (played.tokens - bad_tokens) / (played.seconds - bad_s)
    assert gained > 2.0


def test_a_fixed_number_is_cut_at_the_end_only() -> None:
    lengths = FixedLength(6)
    assert lengths.next(15) == 6
    assert lengths.next(2) == 2
    lengths.note(Report(6, ((0, True),), 1, 1.0, 2.0))
    assert lengths.next(15) == 6
