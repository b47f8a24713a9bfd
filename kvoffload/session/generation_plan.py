"""The choices of one generation: sizes, plan and placement, first from the profile, then checked against real steps.

Owns the path from "auto" to a `Placement`. Measured rates replace the profile's before anything irrevocable: at the
first layer of the first prefill the link and the recomputation of one chunk are timed (`measure_chunk`), and
activations are stored only if that wins. Later the decode steps themselves correct the rates (`replan`). Does not own
how much memory may be taken (`memory_limits`), the timing (`measured_rates`), nor which cache a decision is for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvoffload.backend import Backend
from kvoffload.config import OffloadConfig
from kvoffload.errors import HostMemoryError, InfeasiblePlanError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.shape import ModelShape
from kvoffload.planning import planner
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.placement import Placement, reserved_blocks
from kvoffload.planning.plan import Plan
from kvoffload.planning.rates import Rates, least_chunk_bytes, rates_from_profile
from kvoffload.planning.sizes import Sizes, grown
from kvoffload.planning.sizing import LEAST_GAP_S, choose_sizes, chunks_may_be_recomputed, split_to_plan, uncapped_sizes
from kvoffload.session.measured_rates import MeasuredRates
from kvoffload.session.memory_limits import MemoryLimits, check_full_host

logger = logging.getLogger(__name__)
MIN_GAIN_FRACTION = 0.01
POSITION_SHARE = 0.01  # of the device budget that a table of position embeddings takes at most
MIN_SEGMENT_ROWS, MIN_SEGMENT_BYTES = 1024, 2**16  # of a chunk on an emulated link that nobody measured
# Stands in where the link has no known speed: only memory decides, and the prediction is not shown.
_UNKNOWN = Rates(
    h2d_activation_bytes_per_s=1e9,
    h2d_kv_bytes_per_s=1e9,
    recompute_s_per_token=0.0,
    attention_s_per_token=0.0,
    dense_s=0.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """Everything chosen for one generation."""

    geometry: Geometry
    sizes: Sizes
    plan: Plan
    placement: Placement
    inputs: PlanInputs | None  # None where nothing could be predicted
    stage_limit_bytes: int | None  # what the cap on device memory leaves for staging a prefill's blocks
    host_cap_bytes: int  # on the host at the full length, as if every row stored every block
    reserved_share: float  # of activations, that room on the host was made for

    @property
    def device_budget_bytes(self) -> int:
        """The cap on device memory; without one, what the plan takes."""
        return self.plan.device_bytes + (self.stage_limit_bytes or 0)

    @property
    def full_host_bytes(self) -> int:
        """What the cache takes on the host at its full length, as if every row stored every block.

        With what was reserved for the form that it turned out to need less of.
        """
        placement, geometry, share = self.placement, self.geometry, self.placement.activation_share
        resident = placement.resident_kv_blocks + placement.resident_activation_blocks
        num_blocks = max(0, geometry.max_tokens // placement.block_tokens - resident)
        reserved = reserved_blocks(num_blocks, self.reserved_share)
        x, t = (max(pair) for pair in zip(reserved, reserved_blocks(num_blocks, share), strict=True))
        token_bytes = x * geometry.activation_bytes_per_token + t * geometry.kv_bytes_per_token
        return geometry.num_offloaded_layers * placement.block_tokens * token_bytes

    @property
    def fits_on_host(self) -> bool:
        """Whether it does at its full length."""
        return self.full_host_bytes <= self.host_cap_bytes

    def check_host(self) -> None:
        """Refuse before any token if the cache cannot fit on the host at its full length.

        Raises:
            HostMemoryError: with the numbers.
        """
        check_full_host(self.geometry, self.placement.prompt_tokens, self.full_host_bytes, self.host_cap_bytes)


class GenerationPlanner:
    """Makes the choices of a session.

    Args:
        config: the user's options.
        shape: of the model.
        backend: of the session.
        profile: asked for only when a prediction is wanted; None from it means the link has no known speed.
        stored: asked for otherwise, where the link is real: what is known of it without measuring, or None.
    """

    def __init__(
        self,
        config: OffloadConfig,
        shape: ModelShape,
        backend: Backend,
        profile: Callable[[], HardwareProfile],
        stored: Callable[[], HardwareProfile | None] = lambda: None,
    ) -> None:
        self.config = config
        self.shape = shape
        self.backend = backend
        self._profile = profile
        self._stored = (lambda: None) if backend.emulated else stored
        self.limits = MemoryLimits(config, shape, backend)
        self.measured = MeasuredRates()

    def plan_for(self, geometry: Geometry, *, can_recompute: bool = True, **known: Any) -> GenerationPlan:
        """Sizes, plan and placement for a cache; the sizes of plain transfer where those are predicted to be faster.

        Recomputing takes memory for activations, which under a cap leaves less for resident blocks. Arguments and
        errors as of `plan_sizes_for`.
        """
        if not can_recompute or split_to_plan(self.config, geometry) is not None or self.config.schedule != "pipelined":
            return self.plan_sizes_for(geometry, can_recompute=can_recompute, **known)
        found, why = [], None
        for recomputes in (True, False):
            try:
                found.append(self.plan_sizes_for(geometry, can_recompute=recomputes, **known))
            except (InfeasiblePlanError, HostMemoryError) as error:
                why = why or error
        if not found:
            assert why is not None
            raise why
        if len(found) == 1:
            return found[0]
        free, plain = found
        # A plan that may recompute can be corrected later, so only a real gain decides against it.
        if plain.plan.predicted_step_s < (1 - MIN_GAIN_FRACTION) * free.plan.predicted_step_s:
            return plain
        full_s = min(free.plan.full_transfer_step_s, plain.plan.predicted_step_s)
        return replace(free, plan=replace(free.plan, full_transfer_step_s=full_s))

    def plan_sizes_for(
        self,
        geometry: Geometry,
        *,
        prompt_tokens: int,
        knows_length: bool,
        host_held_bytes: int,
        device_held_bytes: int = 0,
        can_recompute: bool = True,
    ) -> GenerationPlan:
        """Sizes, plan and placement for a cache that keeps activations or does not.

        Args:
            geometry: its shape.
            prompt_tokens: tokens of the prompt.
            knows_length: whether `geometry.max_tokens` is more than a guess.
            host_held_bytes: host memory the session holds already.
            device_held_bytes: device memory the session holds already, and will use again.
            can_recompute: False where K/V of this model turned out not to follow from the activation.

        Raises:
            InfeasiblePlanError, HostMemoryError: before any token, with the numbers.
        """
        config, fixed_split = self.config, 0.0 if not can_recompute else split_to_plan(self.config, geometry)
        profile = self._profile() if self._wants_profile else self._stored()
        rates: Rates | None = None
        recomputes = fixed_split != 0
        if not self.backend.emulated:
            geometry = replace(geometry, least_gap_s=LEAST_GAP_S)
            recomputes = chunks_may_be_recomputed(self.config, geometry)
        if profile is not None:
            least = least_chunk_bytes(profile, self.shape, recomputes=recomputes)
            geometry = replace(geometry, least_chunk_bytes=least)
        elif self.backend.emulated:  # no copy is too small, only the host's time per chunk counts
            least = max(MIN_SEGMENT_BYTES, MIN_SEGMENT_ROWS * geometry.kv_row_bytes)
            geometry = replace(geometry, least_chunk_bytes=least)
        if profile is not None and profile.h2d is not None:
            rates = self._rates(profile, geometry)
        device_bytes = self.limits.device_cap_bytes(geometry, prompt_tokens, device_held_bytes)
        may_recompute = fixed_split != 0 and (fixed_split is not None or rates is not None)
        sizes = choose_sizes(geometry, config, keeps_activations=may_recompute, device_bytes=device_bytes, rates=rates)
        host_cap = self.limits.full_host_cap_bytes(geometry, prompt_tokens, host_held_bytes)
        inputs = self._inputs(geometry, sizes, rates, prompt_tokens, device_bytes, host_cap, fixed_split)
        if rates is None:
            inputs = replace(inputs, split=fixed_split or 0.0, rates=_UNKNOWN)
        self.limits.check_least_host(geometry, inputs, prompt_tokens, host_held_bytes)
        plan = planner.solve(inputs)
        if rates is None:
            plan = replace(plan, predicted_step_s=0.0, full_transfer_step_s=0.0)
        share = plan.split_fraction if fixed_split is None else fixed_split
        room = None if device_bytes is None else max(0, device_bytes - plan.device_bytes)
        chosen = GenerationPlan(
            stage_limit_bytes=room,
            host_cap_bytes=host_cap,
            reserved_share=share,
            geometry=geometry,
            sizes=sizes,
            plan=plan,
            placement=Placement(
                block_tokens=sizes.block_tokens,
                chunk_blocks=sizes.chunk_blocks,
                resident_kv_blocks=plan.resident_kv_blocks,
                resident_activation_blocks=plan.resident_activation_blocks,
                activation_share=share,
                may_change=fixed_split is None and rates is not None,
                max_tokens=geometry.max_tokens if knows_length else None,
                prompt_tokens=prompt_tokens,
            ),
            inputs=None if rates is None else inputs,
        )
        chosen.check_host()
        return chosen

    def prolong(self, chosen: GenerationPlan, max_tokens: int, host_held_bytes: int) -> GenerationPlan:
        """The same for a cache that a further turn makes longer than was planned.

        Raises:
            HostMemoryError: before any token of that turn, with the numbers.
        """
        geometry = replace(chosen.geometry, max_tokens=max(chosen.geometry.max_tokens, max_tokens))
        longer = replace(
            chosen,
            geometry=geometry,
            sizes=grown(chosen.sizes, geometry),
            placement=replace(chosen.placement, max_tokens=max_tokens),
            host_cap_bytes=self.limits.full_host_cap_bytes(geometry, chosen.placement.prompt_tokens, host_held_bytes),
        )
        longer.check_host()
        return longer

    def carries_positions(self, chosen: GenerationPlan, token_bytes: int) -> bool:
        """Whether position embeddings travel with the blocks, as their table on the device would become too large.

        Args:
            chosen: for the cache.
            token_bytes: what a token takes in the table.
        """
        table_bytes = chosen.geometry.max_tokens * token_bytes
        return chosen.placement.needs_activations and table_bytes > POSITION_SHARE * chosen.device_budget_bytes

    @property
    def _wants_profile(self) -> bool:
        """Whether a prediction decides something (a free split over a link with a speed), or was paid for already."""
        if not self.backend.has_speed:
            return False
        return self.config.fixed_split is None or self.config.profile != "auto"

    def _rates(self, profile: HardwareProfile, geometry: Geometry) -> Rates:
        sizes = uncapped_sizes(geometry, self.config)
        rates = rates_from_profile(
            profile,
            self.shape,
            batch=geometry.rows,
            block_tokens=sizes.block_tokens,
            chunk_blocks=sizes.chunk_blocks,
            cached_tokens=geometry.max_tokens,
        )
        return self.measured.correct(rates, geometry.rows)

    def _inputs(
        self,
        geometry: Geometry,
        sizes: Sizes,
        rates: Rates | None,
        prompt_tokens: int,
        device_bytes: int | None,
        host_cap_bytes: int,
        split: float | None,
    ) -> PlanInputs:
        mean_tokens = (prompt_tokens + geometry.max_tokens) // 2 if prompt_tokens else geometry.max_tokens
        num_blocks = max(1, mean_tokens // sizes.block_tokens)
        # A kv block is resident in the form it has; the cap is checked at the full length by what is fixed.
        return PlanInputs(
            num_layers=self.shape.num_layers,
            num_offloaded_layers=geometry.num_offloaded_layers,
            num_blocks=num_blocks,
            block_tokens=sizes.block_tokens,
            kv_bytes_per_token=geometry.kv_bytes_per_token,
            activation_bytes_per_token=geometry.activation_bytes_per_token,
            rates=rates or _UNKNOWN,
            chunk_blocks=sizes.chunk_blocks,
            num_slots=max(2, sizes.num_slots),
            device_bytes=sizes.fixed_device_bytes if device_bytes is None else device_bytes,
            fixed_device_bytes=sizes.fixed_device_bytes,
            host_bytes=_host_bytes(host_cap_bytes, geometry, num_blocks, sizes.block_tokens),
            split=split,
            schedule=self.config.schedule,
            is_segmented=geometry.is_segmented,
        )

    # ---- checked, not believed -----------------------------------------------------------------------------------

    def measure_chunk(
        self,
        chosen: GenerationPlan,
        prepare: Callable[[int], Callable[[], None]],
        ring: Callable[[], Sequence[torch.Tensor]] = tuple,
    ) -> GenerationPlan:
        """Time one chunk both ways and plan again with what was measured.

        Args:
            chosen: made from the profile.
            prepare: returns the recomputation of that many tokens of all rows of one layer.
            ring: returns slots that lie idle.
        """
        if chosen.inputs is None or not chosen.placement.may_change:
            return chosen
        self.measured.time_chunk(self.backend, self.shape, chosen.geometry, chosen.sizes, prepare, ring)
        rates = self.measured.correct(chosen.inputs.rates, chosen.geometry.rows)
        inputs = replace(chosen.inputs, rates=rates)
        plan = planner.solve(inputs)
        logger.info(
            "one layer checked: %.3g s per token recomputed, plan stores %.2f of the offloaded tokens as activations",
            rates.recompute_s_per_token,
            plan.split_fraction,
        )
        placement = replace(
            chosen.placement,
            resident_kv_blocks=plan.resident_kv_blocks,
            resident_activation_blocks=plan.resident_activation_blocks,
            activation_share=plan.split_fraction,
        )
        corrected = replace(
            chosen, inputs=inputs, plan=plan, placement=placement, reserved_share=placement.activation_share
        )
        # The plan is for the mean length; at the full one only the form that was asked for first may fit.
        return corrected if corrected.fits_on_host else replace(chosen, inputs=inputs)

    def note_gap(self, chosen: GenerationPlan, between_steps_s: float | None) -> None:
        """What passed between the attention of two real steps corrects the gap that was assumed.

        Where the device is the CPU the gap is part of its work, and is left as it is.
        """
        if chosen.inputs is not None and not self.backend.emulated:
            self.measured.take_gap(between_steps_s, chosen.inputs.rates)

    def replan(self, chosen: GenerationPlan, stored_kv_blocks: int, stored_activation_blocks: int) -> GenerationPlan:
        """The plan for blocks still to come, at the rates measured so far and with the blocks there are.

        Where no plan is within the caps any more the decision stays: whether the blocks fit is for the store to say.
        """
        if chosen.inputs is None or not chosen.placement.may_change:
            return chosen
        num_blocks = max(
            chosen.inputs.num_blocks,
            stored_kv_blocks
            + stored_activation_blocks
            + chosen.placement.resident_kv_blocks
            + chosen.placement.resident_activation_blocks
            + 1,
        )
        inputs = replace(
            chosen.inputs,
            rates=self.measured.correct(chosen.inputs.rates, chosen.geometry.rows),
            num_blocks=num_blocks,
            host_bytes=_host_bytes(chosen.host_cap_bytes, chosen.geometry, num_blocks, chosen.inputs.block_tokens),
            stored_kv_blocks=stored_kv_blocks,
            stored_activation_blocks=stored_activation_blocks,
            stored_resident_blocks=chosen.placement.resident_kv_blocks,
            stored_resident_activation_blocks=chosen.placement.resident_activation_blocks,
        )
        try:
            plan = replace(planner.solve(inputs), version=chosen.plan.version + 1)
        except InfeasiblePlanError as error:
            logger.debug("the plan stays as it is: %s", error)
            return chosen
        placement = replace(chosen.placement, activation_share=plan.split_fraction)
        changed = replace(chosen, inputs=inputs, plan=plan, placement=placement)
        return changed if changed.fits_on_host else chosen


def _host_bytes(cap_bytes: int, geometry: Geometry, num_blocks: int, block_tokens: int) -> int:
    """The part of a cap on the full length that so many blocks may take."""
    return int(cap_bytes * min(1.0, num_blocks * block_tokens / max(1, geometry.max_tokens)))
