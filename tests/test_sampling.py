"""Totals of timed stretches that stand for others."""

from __future__ import annotations

import random

import pytest

from kvoffload.backend.sampling import ALL_AT_FIRST, MEAN_GAP, Sampler


def test_the_first_stretches_are_all_timed() -> None:
    sampler = Sampler()
    assert [sampler.weight() for _ in range(ALL_AT_FIRST)] == [1.0] * ALL_AT_FIRST


def test_later_about_one_in_eight_is_timed_and_weights_count_every_stretch() -> None:
    sampler = Sampler()
    weights = [sampler.weight() for _ in range(20_000)]
    timed = [weight for weight in weights if weight]
    assert len(weights) / MEAN_GAP == pytest.approx(len(timed), rel=0.05)
    assert sum(weights) == pytest.approx(len(weights), abs=2 * MEAN_GAP)


@pytest.mark.parametrize("period", [2, 8, 15, 64])
def test_totals_are_right_for_stretches_that_repeat_themselves(period: int) -> None:
    """As those of a layer do: the first of each takes a hundred times as long."""
    sampler, seconds = Sampler(), [1.0 if idx % period == 0 else 0.01 for idx in range(60_000)]
    total = sum(sampler.weight() * one for one in seconds)
    assert total == pytest.approx(sum(seconds), rel=0.1)


def test_copies_of_several_sizes_count_by_their_bytes() -> None:
    sampler, sizes = Sampler(), random.Random(3).choices([1, 8, 64], k=30_000)
    total = sum(sampler.weight(size) * size for size in sizes)
    assert total == pytest.approx(sum(sizes), rel=0.02)


def test_what_has_to_be_timed_is_and_the_others_keep_their_weight() -> None:
    sampler = Sampler()
    for _ in range(ALL_AT_FIRST):
        sampler.weight()
    weights = [sampler.weight(at_once=idx % 3 == 2) for idx in range(300)]
    assert all(weights[2::3])
    assert sum(weights) == 300
