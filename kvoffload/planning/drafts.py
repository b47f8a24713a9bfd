"""Verified drafts in the cost model: how long a round takes, how many tokens it gives, and how many are drafted.

A round drafts k tokens with what is on the device, then checks them and the one before in one pass over the link:

    round = k * T_d + T_v(k + 1) - min(k * T_d, ring / rate)

T_d is a step over the blocks on the device, T_v(m) a pass of m tokens, and while tokens are drafted the link fills the
ring. With S_i the probability that the first i drafts are all accepted, a round gives 1 + S_1 + ... + S_k tokens.

Source: speculative decoding (Leviathan et al., arXiv 2211.17192, section 3); survival per position in the place of
their one acceptance rate, as acceptance is not the same at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kvoffload.config import MOST_DRAFTS, OffloadConfig
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.shape import ModelShape
from kvoffload.planning import step_time
from kvoffload.planning.forms import FORMS
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.placement import PLAIN
from kvoffload.planning.plan import Plan
from kvoffload.planning.rates import Rates, rates_from_profile
from kvoffload.planning.sizing import planned_forms

PRIOR_ACCEPTANCE = 0.7  # of each draft, before any was seen
SHADOW_PRIOR_ACCEPTANCE = 0.9  # of drafts that attend to all tokens, in a form of few bits
# Of each draft, the least that tokens and drafts of a pass come to at batch 1 and ratios from 8 on, of a window and of
# 4-bit copies (scripts/results/drafts.csv): what near caches are compared by.
USUAL_ACCEPTANCE, SHADOW_USUAL_ACCEPTANCE = 0.93, 0.97
FULL_SPEED_ROWS = 256  # of a GEMM that is bound by arithmetic
MOST_LEAD = MOST_DRAFTS + 1  # tokens that a row may be ahead of another, when a round begins
WAITING = 0.43
LEAST_WINDOW_TOKENS = 128  # on the device; with fewer the prior is not to be believed
MIN_GAIN_FRACTION = 0.05  # by which drafts must be faster than none to be begun


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTimes:
    """What rounds of one cache take."""

    draft_s: float  # T_d
    pass_s: tuple[float, ...]  # T_v(1), T_v(2), ...
    window_tokens: int  # of each sequence, that drafts attend to
    ahead_s: float  # of the link's time, that the ring can take on while tokens are drafted
    acceptance: float = PRIOR_ACCEPTANCE  # of each draft of a sequence, before any was seen
    reads_all: bool = False  # drafts attend to all tokens, to some of them in a form of few bits
    paced_rows: int = 1  # sequences that go at their own pace; 1: all go in lock-step

    def round_s(self, drafts: int) -> float:
        """A round of that many drafts; of none, a plain step."""
        drafting_s = drafts * self.draft_s
        return drafting_s + self.pass_s[drafts] - min(drafting_s, self.ahead_s)


def most_ahead(shape: ModelShape, geometry: Geometry, config: OffloadConfig) -> int:
    """Tokens of each row that may be cached before anybody asks for them: those of a round, and as many again where
    rows go at their own pace, by which one may be ahead of another."""
    return MOST_DRAFTS + 1 + (MOST_LEAD if rows_may_differ(shape, geometry, config) else 0)


def rows_may_differ(shape: ModelShape, geometry: Geometry, config: OffloadConfig) -> bool:
    """Whether rows of a batch may go at their own pace: no layer counts slots, and no block keeps positions."""
    recomputed = any(FORMS[form].is_recomputed for form in planned_forms(config, geometry))
    return geometry.rows > 1 and shape.num_layers == shape.num_offloaded_layers and not recomputed


def survival(acceptance: float, rows: int = 1, drafts: int = MOST_DRAFTS) -> list[float]:
    """S_1, S_2, ... where each draft of a row is accepted with the same probability, and a batch goes in lock-step."""
    return [acceptance ** (rows * position) for position in range(1, drafts + 1)]


def tokens_per_round(survivals: Sequence[float], drafts: int, rows: int = 1) -> float:
    """Tokens that a round of so many drafts is expected to give.

    Of several rows at their own pace those of the slowest, which waits for none while no row may be ahead of it by more
    than `MOST_LEAD`: by so much less than the mean as `WAITING` says, fitted to simulated rounds of 2 to 16 rows.
    """
    accepted = sum(survivals[:drafts])
    if rows == 1:
        return 1 + accepted
    squares = sum((2 * position - 1) * share for position, share in enumerate(survivals[:drafts], start=1))
    waiting = WAITING * math.log2(rows) * (squares - accepted**2) / MOST_LEAD
    return max(1.0, 1 + accepted - waiting)


def best_length(survivals: Sequence[float], round_s: Callable[[int], float], most: int, rows: int = 1) -> int:
    """The number of drafts with the least time for a token; 0 is a candidate, and the fewest of equals are taken.

    Args:
        survivals: S_1, S_2, ...
        round_s: seconds of a round of so many drafts.
        most: drafts.
        rows: sequences at their own pace.
    """
    return min(range(min(most, len(survivals)) + 1), key=lambda k: round_s(k) / tokens_per_round(survivals, k, rows))


class ExpectedRounds(NamedTuple):
    """What rounds of drafts are expected to give."""

    drafts: int  # in a round; 0: they do not gain enough
    tokens: float  # of each sequence, that a round gives
    round_s: float
    acceptance: float  # that was assumed of each draft of a sequence
    reads_all: bool  # as of `RoundTimes`

    @property
    def token_s(self) -> float:
        """Seconds for the next token of each sequence."""
        return self.round_s / self.tokens


def expected_rounds(
    times: RoundTimes, rows: int, *, acceptance: float | None = None, drafts: int | None = None
) -> ExpectedRounds:
    """The rounds that are planned where each draft of a row is accepted with the same probability.

    Args:
        times: that rounds take.
        rows: sequences; in lock-step a round keeps as many tokens as all of them accept.
        acceptance: that probability, 0..1; None: what is assumed of such drafts.
        drafts: in each round; None: as many as make a token cheapest, and none where these gain too little.
    """
    acceptance = times.acceptance if acceptance is None else acceptance
    paced = times.paced_rows
    survivals = survival(acceptance, rows if paced == 1 else 1)
    length = best_length(survivals, times.round_s, MOST_DRAFTS, paced) if drafts is None else drafts
    gains = times.window_tokens >= LEAST_WINDOW_TOKENS and speedup(survivals, times, length) >= 1 + MIN_GAIN_FRACTION
    if drafts is None and not gains:
        length = 0
    tokens = tokens_per_round(survivals, length, paced)
    return ExpectedRounds(length, tokens, times.round_s(length), acceptance, times.reads_all)


def why_none(times: RoundTimes, rows: int, *, num_on_host: int) -> str:
    """Why no drafts are planned, in words.

    Args:
        times: that rounds would take.
        rows: sequences.
        num_on_host: blocks that cross the link in a step.
    """
    if not num_on_host:
        return "the cache is on the device: there are no passes over the link to save"
    if times.window_tokens < LEAST_WINDOW_TOKENS:
        return (
            f"not expected to gain, with only {times.window_tokens} tokens of a sequence on the device to draft from "
            f"(at least {LEAST_WINDOW_TOKENS})"
        )
    survivals = survival(times.acceptance, rows if times.paced_rows == 1 else 1)
    gain = max(speedup(survivals, times, drafts) for drafts in range(1, MOST_DRAFTS + 1))
    return f"not expected to gain: {gain:.2f}x as fast with them (at least {1 + MIN_GAIN_FRACTION:.2f}x)"


def token_s_usually(times: RoundTimes, rows: int, drafts: int | None = None) -> float:
    """Seconds for the next token of each sequence at the usual acceptance of such drafts; arguments as of the above."""
    acceptance = SHADOW_USUAL_ACCEPTANCE if times.reads_all else USUAL_ACCEPTANCE
    return expected_rounds(times, rows, acceptance=acceptance, drafts=drafts).token_s


def speedup(survivals: Sequence[float], times: RoundTimes, drafts: int) -> float:
    """Tokens in the time of one without drafts, from the same blocks."""
    return tokens_per_round(survivals, drafts, times.paced_rows) * times.round_s(0) / times.round_s(drafts)


def round_times(
    inputs: PlanInputs,
    plan: Plan,
    shape: ModelShape,
    profile: HardwareProfile,
    *,
    rows: int,
    own_pace: bool = False,
) -> RoundTimes:
    """What rounds take by the cost model.

    Args:
        inputs: of the plan, with rates as far as they were measured.
        plan: where the blocks are.
        shape: of the model.
        profile: of the machine.
        rows: sequences.
        own_pace: whether these go at their own pace.
    """
    shadow, on_host = inputs.shadow_form, plan.count(tier="host")
    copied = on_host * inputs.block_tokens if shadow is not None else 0
    tokens = plan.count(tier="device") * inputs.block_tokens + copied  # of each sequence, that drafts attend to

    def rates_at(batch: int, cached_tokens: int) -> Rates:
        return rates_from_profile(
            profile,
            shape,
            batch=batch,
            block_tokens=inputs.block_tokens,
            chunk_blocks=inputs.chunk_blocks,
            cached_tokens=cached_tokens,
        )

    cached = inputs.num_blocks * inputs.block_tokens
    pass_s = []
    for checked in range(1, MOST_DRAFTS + 2):
        together = rates_at(rows * checked, cached)
        # K and V are read once for all of the tokens, which is what takes long on a GPU, and multiplied with each.
        flops = 4 * rows * checked * shape.num_heads * shape.head_dim
        multiply_s = flops / profile.gemm_flops_per_s(FULL_SPEED_ROWS, shape.hidden_size, shape.hidden_size)
        rates = replace(
            inputs.rates,
            dense_s=max(inputs.rates.dense_s, together.dense_s),
            head_s=max(inputs.rates.head_s, together.head_s),
            attention_s_per_token=max(inputs.rates.attention_s_per_token, multiply_s),
        )
        pass_s.append(step_time.predict(replace(inputs, rates=rates), plan.blocks).step_s)
    near = rates_at(rows, max(inputs.block_tokens, tokens))
    attention_s = tokens * near.attention_s_per_token
    if shadow is not None:
        attention_s += copied * near.restore_s_per_token[shadow]
    layers_s = inputs.num_layers * near.dense_s + inputs.num_offloaded_layers * attention_s
    issue_s = inputs.num_layers * near.host_s_per_layer
    weights_s = inputs.rates.weights_s(inputs.weight_bytes_per_step)  # each draft reads all of them
    return RoundTimes(
        draft_s=max(layers_s + near.head_s, issue_s + near.head_s, weights_s),
        pass_s=tuple(pass_s),
        window_tokens=tokens,
        ahead_s=inputs.ring_bytes / inputs.rates.h2d_bytes_per_s[PLAIN] if on_host and not weights_s else 0.0,
        acceptance=PRIOR_ACCEPTANCE if shadow is None else SHADOW_PRIOR_ACCEPTANCE,
        reads_all=shadow is not None,
        paced_rows=rows if own_pace else 1,
    )
