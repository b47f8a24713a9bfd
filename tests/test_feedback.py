"""Real steps correct the rates behind a plan, where they are not as predicted, and new blocks follow the new plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import closed_forms
import pytest
import torch
from matrix import profile
from models import make_model
from modes import given, prompt
from placements import changed

from kvoffload import EmulatedLink, OffloadConfig
from kvoffload.backend import EmulatedBackend
from kvoffload.planning import planner
from kvoffload.profiler.profile import with_link
from kvoffload.session.generation import MAX_PREDICTION_ERROR_FRACTION
from kvoffload.session.generation_plan import GenerationPlan
from kvoffload.session.session import Session

pytestmark = pytest.mark.timing
SPEED_GB_PER_S = 0.02
NEW_TOKENS = 60


def play(at_step: int, new_speed_gb_per_s: float, split: Any = "auto") -> tuple[Session, GenerationPlan]:
    """A generation whose link changes its speed at a step."""
    model = make_model("opt", hidden_size=64, ffn_dim=64, word_embed_proj_dim=64)
    link = EmulatedLink(h2d_gb_per_s=SPEED_GB_PER_S)
    config = OffloadConfig(
        split=split, link=link, profile=with_link(profile(), link), device_gib="min", block_tokens=4, chunk_blocks=2
    )
    backend = EmulatedBackend(link)
    steps = 0

    def after_each_token(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == at_step:
            backend._directions["h2d"].bytes_per_s = new_speed_gb_per_s * 1e9  # a link that degrades
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    with Session(model, config, backend) as session:
        cache = session.new_cache()
        ids = prompt(4, 64)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **given(cache),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            stopping_criteria=[after_each_token],
        )
        return session, session._offloaded._plans[cache]


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_link_that_changes_its_speed_is_planned_with_at_its_new_speed(factor: float) -> None:
    _, decision = play(at_step=12, new_speed_gb_per_s=factor * SPEED_GB_PER_S)
    assert decision.inputs is not None
    true_speed = factor * SPEED_GB_PER_S * 1e9
    assert decision.inputs.rates.h2d_bytes_per_s["kv"] == pytest.approx(true_speed, rel=0.05)
    # What new blocks become is within 5 % of the best there is for that speed, given the blocks stored before.
    rates = changed(decision.inputs.rates, h2d_kv_bytes_per_s=true_speed, h2d_activation_bytes_per_s=true_speed)
    truth = dataclasses.replace(decision.inputs, rates=rates)
    best, ours = planner.solve(truth), decision.plan
    placed = (ours.resident_kv_blocks, ours.resident_activation_blocks, ours.activation_blocks, ours.kv_blocks)
    assert closed_forms.predict_step_s(truth, *placed)[0] <= 1.05 * best.predicted_step_s
    assert ours.version > 0


def test_rates_stay_while_steps_are_as_predicted() -> None:
    _, decision = play(at_step=0, new_speed_gb_per_s=SPEED_GB_PER_S)
    assert decision.inputs is not None
    # Close to what was asked for, whether or not a busy machine made it look again.
    assert decision.inputs.rates.h2d_bytes_per_s["kv"] == pytest.approx(SPEED_GB_PER_S * 1e9, rel=0.05)


def test_statistics_tell_how_wrong_the_prediction_was() -> None:
    session, _ = play(at_step=1, new_speed_gb_per_s=SPEED_GB_PER_S / 4, split="transfer")
    assert session.stats is not None
    error = session.stats.prediction_error_fraction
    assert error is not None
    assert session.stats.predicted_step_s is not None
    measured_s = session.stats.decode_step_s_p50
    assert measured_s is not None
    assert error > MAX_PREDICTION_ERROR_FRACTION
    assert error == pytest.approx(measured_s / session.stats.predicted_step_s - 1)
    assert session.stats.to_json()["prediction_error_fraction"] == error
