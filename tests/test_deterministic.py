"""`deterministic=True`: what a run does follows from its profile, and no timing of a run changes it."""

from __future__ import annotations

from typing import Any

import pytest
from matrix import FAST_LINK, profile
from models import make_model
from modes import COMMON, prompt
from transformers import PreTrainedModel

from kvoffload import ConfigError, HardwareProfile, OffloadConfig
from kvoffload.backend import EmulatedBackend
from kvoffload.config import EmulatedLink
from kvoffload.session.session import Session
from kvoffload.session.stats import GenerationStats


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", num_key_value_heads=4, max_position_embeddings=1024)


def run(model: PreTrainedModel, link: EmulatedLink, known: HardwareProfile, **options: Any) -> GenerationStats:
    """With a link of any speed, whatever the profile says of it."""
    values: dict[str, Any] = {"block_tokens": 16, "chunk_blocks": 2, "device_gib": 0.0007, **options}
    config = OffloadConfig(link=FAST_LINK, profile=known, **values)
    with Session(model, config, EmulatedBackend(link)) as session:
        model.generate(prompt(2, 400), **{**COMMON, "max_new_tokens": 60})
    assert session.stats is not None
    return session.stats


def test_a_link_of_another_speed_changes_nothing(model: PreTrainedModel) -> None:
    found = [
        run(model, EmulatedLink(h2d_gb_per_s=speed), profile(), deterministic=True, split="auto")
        for speed in (0.02, 2.0)
    ]
    one, other = found
    assert one.plan.blocks == other.plan.blocks
    assert one.plan.version == other.plan.version == 0
    assert one.recomputed_tokens == other.recomputed_tokens
    assert one.drafted_tokens == other.drafted_tokens
    assert len(one.decode_step_s) == len(other.decode_step_s)


def test_the_number_of_drafts_is_that_of_the_plan(model: PreTrainedModel) -> None:
    found = [run(model, FAST_LINK, profile(0.04), deterministic=True, split="transfer") for _ in range(2)]
    assert found[0].drafted_tokens > 0
    assert found[0].drafted_tokens == found[1].drafted_tokens
    assert found[0].draft_survivals == found[1].draft_survivals


@pytest.mark.parametrize("value", [1, "yes", None])
def test_it_is_yes_or_no(value: Any) -> None:
    with pytest.raises(ConfigError, match="deterministic must be True or False"):
        OffloadConfig(deterministic=value)
