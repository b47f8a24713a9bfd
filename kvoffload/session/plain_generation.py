"""What plain generation would have done in the place of an offloaded one: whether it fits on the device, and its step.

Owns that comparison for one call, from the plan's own model. Does not own the step (`planning/step_time`), the limits
(`memory_limits`), nor how it is said (`planning/verdicts`).
"""

from __future__ import annotations

from typing import NamedTuple

from kvoffload.planning.memory import DEVICE_SHARE, prefill_peak_bytes
from kvoffload.planning.step_time import plain_step_s
from kvoffload.session.generation_plan import GenerationPlan
from kvoffload.session.generation_planner import GenerationPlanner
from kvoffload.session.memory_limits import free_device_bytes
from kvoffload.session.model_weights import ModelWeights


class PlainGeneration(NamedTuple):
    """Without offloading."""

    fits: bool | None  # weights and the whole cache on the device; None: not known
    step_s: float  # predicted, for the length that the plan is made for; 0 where it does not fit or is not predicted


def plain_generation(
    planner: GenerationPlanner, chosen: GenerationPlan, weights: ModelWeights, held_bytes: int
) -> PlainGeneration:
    """That of a call.

    Args:
        planner: of the model.
        chosen: what the call ran with.
        weights: of the model.
        held_bytes: on the device, by the session; free without it.
    """
    room_bytes = _room_bytes(planner, weights, held_bytes)
    if room_bytes is None:
        return PlainGeneration(None, 0.0)
    fits = _needed_bytes(planner, chosen) <= room_bytes
    return PlainGeneration(fits, plain_step_s(chosen.inputs) if fits and chosen.inputs is not None else 0.0)


def _room_bytes(planner: GenerationPlanner, weights: ModelWeights, held_bytes: int) -> int | None:
    """Device memory beside the weights, all of them; of an emulated device what its profile says."""
    if planner.backend.emulated:
        profile = planner.profile()
        if profile is None:
            return None
        return int(DEVICE_SHARE * (profile.device_memory_bytes - planner.shape.weight_bytes))
    missing_bytes = 0
    if weights.is_streaming:
        missing_bytes = weights.sizes.total - weights.sizes.outside - weights.device_bytes
    return free_device_bytes(planner.backend.device) + held_bytes - missing_bytes


def _needed_bytes(planner: GenerationPlanner, chosen: GenerationPlan) -> int:
    """The whole cache, one layer more, which plain generate() copies to append a token, and the prompt's prefill."""
    geometry, shape = chosen.geometry, planner.shape
    prompt_tokens = min(chosen.placement.prompt_tokens, geometry.max_tokens)
    growing = (geometry.num_offloaded_layers + 1) * geometry.rows * geometry.max_tokens * geometry.kv_row_bytes
    prefill = prefill_peak_bytes(shape, num_tokens=geometry.rows * prompt_tokens, rows=geometry.rows)
    return growing + shape.other_layers_bytes(geometry.rows, geometry.max_tokens) + prefill
