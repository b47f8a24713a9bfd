"""Sampling with verified drafts: the tokens of the same seed, and so the distribution of plain sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from drafting import drafts_worse, window_gib
from matrix import FAST_LINK, profile
from models import make_model
from modes import prompt
from transformers import PreTrainedModel

import kvoffload
from kvoffload import OffloadConfig
from kvoffload.draft.rounds import Rounds

DRAWS, TOKENS, ROWS, VOCABULARY = 20_000, 5, 500, 96
SAMPLING: dict[str, Any] = {"do_sample": True, "max_new_tokens": TOKENS, "temperature": 0.9, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", num_hidden_layers=2)


def draws(model: PreTrainedModel, seed: int) -> torch.Tensor:
    """[DRAWS, TOKENS], all after the same prompt."""
    ids = prompt(1, 30)
    torch.manual_seed(seed)
    many = ids.expand(ROWS, -1)
    return torch.cat([model.generate(many, **SAMPLING)[:, 30:] for _ in range(DRAWS // ROWS)])


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """Chi-square of two samples over its degrees of freedom, the largest of any position (Pearson 1900)."""
    found = []
    for position in range(TOKENS):
        counts = np.stack([np.bincount(part[:, position], minlength=VOCABULARY) for part in (one, other)])
        counts = counts[:, counts.sum(0) >= 10]
        expected = counts.sum(0) / 2
        found.append(float(((counts - expected) ** 2 / expected).sum()) / (counts.shape[1] - 1))
    return max(found)


def offloaded(model: PreTrainedModel, number: int = 3) -> Any:
    gib = window_gib(model, ROWS, 30 + TOKENS, 4, 0.5)
    options: dict[str, Any] = {"block_tokens": 4, "chunk_blocks": 2, "slots": 2, "device_gib": gib, "link": FAST_LINK}
    return kvoffload.offload(model, OffloadConfig(speculate=number, profile=profile(), **options))


def test_the_draws_are_those_of_the_seed_and_another_seed_has_the_same_distribution(model: PreTrainedModel) -> None:
    plain = draws(model, seed=1)
    with offloaded(model):
        same, others = draws(model, seed=1), draws(model, seed=2)
    assert torch.equal(same, plain)
    assert not torch.equal(others, plain)
    assert differ(others, plain) < 1.6  # of 80 and more degrees of freedom one in a thousand is above 1.6


def test_a_wrong_rule_of_acceptance_is_seen(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that is emitted whatever the model would have drawn: what is counted is then that of the draft."""
    plain = draws(model, seed=1)
    original = torch.multinomial
    pending: list[torch.Tensor] = []
    draft = Rounds._draft

    def drafted(self: Rounds, *args: Any) -> torch.Tensor:
        found = draft(self, *args)
        pending.extend(found.unbind(1))
        return found

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        drawn = original(probabilities, num_samples)
        return pending.pop(0)[:, None] if pending and not drafting else drawn

    drafting: list[int] = []
    choose = Rounds._choose

    def chosen(self: Rounds, ids: Any, logits: torch.Tensor) -> torch.Tensor:
        drafting.append(1)
        try:
            return choose(self, ids, logits)
        finally:
            drafting.clear()

    monkeypatch.setattr(Rounds, "_draft", drafted)
    monkeypatch.setattr(Rounds, "_choose", chosen)
    monkeypatch.setattr(torch, "multinomial", multinomial)
    with drafts_worse(monkeypatch, 0.5), offloaded(model):
        wrong = draws(model, seed=2)
    assert differ(wrong, plain) > 10.0


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_drafts_draw_with_the_random_numbers_of_the_loop(temperature: float, model: PreTrainedModel) -> None:
    """So most of them are accepted, although every token is drawn; with numbers of their own few would be."""
    with offloaded(model, 4) as session:
        torch.manual_seed(0)
        model.generate(prompt(1, 30), **{**SAMPLING, "max_new_tokens": 120, "temperature": temperature})
    assert session.stats is not None
    assert session.stats.draft_acceptance is not None
    assert session.stats.draft_acceptance > 0.6
