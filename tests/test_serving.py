"""The figures of one run: latencies, rates and sameness, exactly."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from campaign.serving import LatencyObjective, Outcome, Sameness, ServedGroup, samples


def _outcome(groups: list[ServedGroup], total_s: float, tokens: list[list[int]] | None = None) -> Outcome:
    return Outcome(tokens=torch.tensor(tokens or [[1]]), logits=None, groups=groups, total_s=total_s)


def test_the_second_group_waits_for_the_first() -> None:
    groups = [ServedGroup(2, 0.0, [1.0, 1.5, 2.0]), ServedGroup(1, 2.0, [3.0, 3.25, 3.5])]
    found = samples([_outcome(groups, 3.5)], 30, LatencyObjective(ttft_s=2.0, tpot_s=1.0))
    assert found["ttft"] == ("s", [3.0])
    assert found["tpot"][1] == [pytest.approx((2 * 0.5 + 0.25) / 3)]
    assert found["prefill_tokens_per_s"][1] == [30 / 2.0]
    assert found["decode_tokens_per_s"][1] == [pytest.approx((2 * 2 + 2) / 1.5)]
    assert found["goodput_tokens_per_s"][1] == [pytest.approx(2 * 3 / 3.5)]  # the second group's first token is late
    assert sorted(found["inter_token_latency"][1]) == [0.25, 0.25, 0.5, 0.5]
    assert "link_utilization" not in found


def test_sameness_names_the_first_differing_token_and_ignores_logits_behind_it() -> None:
    logits = torch.zeros(3, 1, 4)
    expected = Outcome(tokens=torch.tensor([[1, 2, 3]]), logits=logits, groups=[], total_s=1.0)
    shifted = logits.clone()
    shifted[0, 0, 0] = 1e-3
    shifted[2] = 7.0 * torch.arange(4)
    found = Outcome(tokens=torch.tensor([[1, 9, 3]]), logits=shifted, groups=[], total_s=1.0)
    same = Sameness.of(found, expected)
    assert same.first_differing_token == 1
    assert same.max_abs_logit_difference == pytest.approx(1e-3)
    assert 0 < same.kl_divergence < 1e-6
    assert Sameness.of(expected, expected) == Sameness(0.0, 0.0, None)


def test_fewer_tokens_and_other_shapes_are_no_sameness() -> None:
    logits = torch.zeros(3, 1, 4)
    expected = Outcome(tokens=torch.tensor([[1, 2, 3]]), logits=logits, groups=[], total_s=1.0)
    short = dataclasses.replace(expected, tokens=torch.tensor([[1, 2]]))
    assert Sameness.of(short, expected).first_differing_token == 2
    rows_short = dataclasses.replace(expected, tokens=torch.tensor([[1, 2, 3], [1, 2, 3]]))
    assert Sameness.of(rows_short, expected).first_differing_token == 0
    for other in (logits[:2], torch.zeros(3, 1, 5), torch.zeros(3, 2, 4)):
        assert math.isnan(Sameness.of(dataclasses.replace(expected, logits=other), expected).max_abs_logit_difference)


def test_goodput_drops_sequences_that_are_slow_after_a_prompt_start() -> None:
    groups = [ServedGroup(2, 0.0, [1.0, 1.5, 2.0]), ServedGroup(1, 0.0, [1.0, 3.0, 5.0])]
    found = samples([_outcome(groups, 5.0)], 30, LatencyObjective(ttft_s=2.0, tpot_s=1.0))
    assert found["goodput_tokens_per_s"][1] == [pytest.approx(2 * 3 / 5.0)]


def test_percentiles_of_latencies_are_exact() -> None:
    times = [0.0]
    for latency in range(101):
        times.append(times[-1] + latency)
    found = samples([_outcome([ServedGroup(1, -1.0, times)], times[-1])], 30, LatencyObjective(1.0, 1.0))
    assert [found[f"inter_token_latency_p{q}"][1] for q in (90, 95, 99)] == [[90.0], [95.0], [99.0]]
