"""The choices of one generation: sizes, plan and placement, first from the profile, then checked against real steps.

Owns the path from "auto" to a `Placement`. Measured rates replace the profile's before anything irrevocable: at the
first layer of the first prefill the link and the recomputation of one chunk are timed (`measure_chunk`), and
activations are stored only if that wins. Later the decode steps themselves correct the rates (`replan`). Does not own
how much memory may be taken (`memory_limits`), the timing (`measured_rates`), nor which cache a plan is for
(`cache_plans`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from kvoffload.backend import Backend
from kvoffload.config import OffloadConfig
from kvoffload.errors import HostMemoryError, InfeasiblePlanError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.shape import ModelShape
from kvoffload.planning import planner
from kvoffload.planning.forms import FORMS, option_name
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.placement import PLAIN, FormName, Placement
from kvoffload.planning.plan import Plan
from kvoffload.planning.problem import bytes_per_token, does_without, host_bytes_at, may_do_without, mean_tokens, pose
from kvoffload.planning.rates import Rates
from kvoffload.planning.sizes import grown, with_kv_rows
from kvoffload.planning.sizing import planned_forms, split_to_plan
from kvoffload.session.generation_plan import GenerationPlan
from kvoffload.session.measured_rates import MeasuredRates
from kvoffload.session.memory_limits import MemoryLimits

logger = logging.getLogger(__name__)
POSITION_SHARE = 0.01  # of the device budget that a table of position embeddings takes at most


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
        if not can_recompute or not may_do_without(self.config, geometry):
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
        if does_without(free.plan.predicted_step_s, plain.plan.predicted_step_s):
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
        fixed_split = split_to_plan(self.config, geometry) if can_recompute else 0.0
        forms = planned_forms(self.config, geometry, can_recompute=can_recompute)
        host_cap = self.limits.full_host_cap_bytes(geometry, prompt_tokens, host_held_bytes)
        geometry, sizes, inputs, device_bytes, has_rates = pose(
            self.shape,
            geometry,
            self.config,
            self._profile() if self._wants_profile else self._stored(),
            is_emulated=self.backend.emulated,
            cached_tokens=mean_tokens(prompt_tokens, geometry.max_tokens),
            device_cap_bytes=lambda settled: self.limits.device_cap_bytes(settled, prompt_tokens, device_held_bytes),
            host_cap_bytes=host_cap,
            can_recompute=can_recompute,
            correct=lambda rates: self.measured.correct(rates, geometry.rows),
        )
        self.limits.check_least_host(geometry, inputs, prompt_tokens, host_held_bytes)
        plan = planner.solve(inputs)
        if not has_rates:
            plan = replace(plan, predicted_step_s=0.0, full_transfer_step_s=0.0)
        shares = plan.shares if fixed_split is None else _fixed_shares(plan, fixed_split)
        chosen = GenerationPlan(
            device_cap_bytes=device_bytes,
            host_cap_bytes=host_cap,
            reserved_shares=shares,
            geometry=geometry,
            sizes=sizes,
            plan=plan,
            placement=Placement(
                block_tokens=sizes.block_tokens,
                chunk_blocks=sizes.chunk_blocks,
                resident=_resident(plan, inputs, geometry),
                shares=shares,
                may_become=tuple(sorted(forms - {PLAIN})) if fixed_split is None and has_rates else (),
                max_tokens=geometry.max_tokens if knows_length else None,
                prompt_tokens=prompt_tokens,
            ),
            inputs=inputs if has_rates else None,
        )
        chosen = self._with_fitting_share(chosen)
        chosen.check_host()
        return chosen

    def _with_fitting_share(self, chosen: GenerationPlan) -> GenerationPlan:
        """The same with as many activations as it takes to fit on the host at the full length.

        A plan is for the mean length, where a larger part of the cache is resident.
        """
        if chosen.fits_on_host or chosen.inputs is None or not chosen.placement.may_become:
            return chosen
        inputs = replace(chosen.inputs, stored=_stored({}, chosen.placement.resident))
        num_blocks = max(inputs.num_blocks, chosen.geometry.max_tokens // inputs.block_tokens)
        host_bytes = host_bytes_at(chosen.host_cap_bytes, chosen.geometry, num_blocks, inputs.block_tokens)
        # less the block of each form that `reserved_blocks` has to spare
        spare_bytes = sum(inputs.bytes_per_token.values())
        host_bytes -= chosen.geometry.num_offloaded_layers * inputs.block_tokens * spare_bytes
        try:
            longest = planner.solve(replace(inputs, num_blocks=num_blocks, host_bytes=host_bytes))
            plan = planner.solve(replace(inputs, split=longest.split_fraction))
        except InfeasiblePlanError:
            return chosen
        plan, shares = replace(plan, version=chosen.plan.version), longest.shares
        return replace(chosen, plan=plan, reserved_shares=shares, placement=replace(chosen.placement, shares=shares))

    def prolong(
        self,
        chosen: GenerationPlan,
        max_tokens: int,
        *,
        prompt_tokens: int,
        on_host: Mapping[FormName, int],
        on_device: Mapping[FormName, int],
        kv_row_bytes: int,
        is_uniform: bool,
        host_held_bytes: int,
        device_held_bytes: int,
    ) -> GenerationPlan:
        """Plan anew for a further turn of a cache: what is stored stays, sizes and the form of new blocks follow.

        Args:
            chosen: what held so far.
            max_tokens: cached at the end of the turn.
            prompt_tokens: cached when its first token is decoded.
            on_host: blocks of each layer on the host, by form.
            on_device: blocks of each layer that memory on the device was made for, by form.
            kv_row_bytes: K and V of one token of one sequence in the widest layer.
            is_uniform: whether all layers attend chunk by chunk, or all over whole layers; else sizes stay.
            host_held_bytes: host memory the session holds already.
            device_held_bytes: device memory the session holds already, and will use again.

        Raises:
            HostMemoryError: before any token of that turn, with the numbers.
        """
        geometry = replace(chosen.geometry, max_tokens=max(prompt_tokens, max_tokens))
        host_cap = self.limits.full_host_cap_bytes(geometry, chosen.placement.prompt_tokens, host_held_bytes)
        longer = replace(
            chosen,
            geometry=geometry,
            sizes=grown(chosen.sizes, geometry),
            placement=replace(chosen.placement, max_tokens=max_tokens),
            host_cap_bytes=host_cap,
        )
        anew = None
        if is_uniform:
            there = (on_host, on_device)
            anew = self._planned_anew(longer, prompt_tokens, *there, kv_row_bytes, device_held_bytes)
            anew = anew and self._with_fitting_share(anew)
        if anew is None or not anew.fits_on_host:
            longer.check_host()
            return longer
        return anew

    def _planned_anew(
        self,
        longer: GenerationPlan,
        prompt_tokens: int,
        on_host: Mapping[FormName, int],
        on_device: Mapping[FormName, int],
        kv_row_bytes: int,
        device_held_bytes: int,
    ) -> GenerationPlan | None:
        """Another plan for a cache that has become longer; None where there is none. Arguments as of `prolong`."""
        geometry, host_cap, max_tokens = longer.geometry, longer.host_cap_bytes, longer.placement.max_tokens
        assert max_tokens is not None
        # Blocks have the tokens they have, and stay where they are: those to come may be resident as well.
        config = replace(self.config, block_tokens=longer.placement.block_tokens)
        resident, token_bytes = on_device, bytes_per_token(geometry)
        resident_bytes = sum(n * token_bytes[form] for form, n in resident.items())
        resident_bytes *= geometry.num_offloaded_layers * longer.placement.block_tokens

        def left_beside_residents(settled: Geometry) -> int | None:
            cap = self.limits.device_cap_bytes(settled, prompt_tokens, device_held_bytes)
            return None if cap is None else cap - resident_bytes

        try:
            geometry, sizes, inputs, left_bytes, has_rates = pose(
                self.shape,
                geometry,
                config,
                self._profile() if self._wants_profile else self._stored(),
                is_emulated=self.backend.emulated,
                cached_tokens=mean_tokens(prompt_tokens, max_tokens),
                device_cap_bytes=left_beside_residents,
                host_cap_bytes=host_cap,
                can_recompute=longer.placement.forms != {PLAIN},
                correct=lambda rates: self.measured.correct(rates, geometry.rows),
            )
            inputs = replace(inputs, device_bytes=inputs.device_bytes + resident_bytes)
            inputs, plan, shares = self._solve_with(inputs, geometry, host_cap, _stored(on_host, resident))
            plan = replace(plan, version=longer.plan.version + 1)
        except InfeasiblePlanError as error:
            logger.debug("the plan of the last turn stays: %s", error)
            return None
        if not has_rates:
            plan = replace(plan, predicted_step_s=0.0, full_transfer_step_s=0.0)
        sizes = with_kv_rows(sizes, geometry, kv_row_bytes)
        kept: Mapping[FormName, float] = shares if longer.placement.may_become else longer.placement.shares
        return replace(
            longer,
            geometry=geometry,
            sizes=sizes,
            plan=plan,
            inputs=inputs if has_rates else None,
            reserved_shares=kept,
            device_cap_bytes=None if left_bytes is None else left_bytes + resident_bytes,
            placement=replace(
                longer.placement,
                chunk_blocks=sizes.chunk_blocks,
                resident=_resident(plan, inputs, geometry),
                shares=kept,
            ),
        )

    def _solve_with(
        self, inputs: PlanInputs, geometry: Geometry, host_cap_bytes: int, stored: Mapping[str, int]
    ) -> tuple[PlanInputs, Plan, dict[FormName, float]]:
        """The plan for the mean length or the blocks there are, and the shares of forms with one block more.

        Args:
            inputs: for the mean length.
            geometry: of the cache.
            host_cap_bytes: at the full length.
            stored: blocks that there are, by option.

        Raises:
            InfeasiblePlanError: they do not fit.
        """

        def at(num_blocks: int) -> PlanInputs:
            host_bytes = host_bytes_at(host_cap_bytes, geometry, num_blocks, inputs.block_tokens)
            return replace(inputs, num_blocks=num_blocks, host_bytes=host_bytes, stored=stored)

        there = sum(stored.values())
        now = at(max(inputs.num_blocks, there))
        return now, planner.solve(now), planner.solve(at(max(inputs.num_blocks, there + 1))).shares

    def carries_positions(self, chosen: GenerationPlan, token_bytes: int) -> bool:
        """Whether position embeddings travel with the blocks, as their table on the device would become too large.

        Args:
            chosen: for the cache.
            token_bytes: what a token takes in the table.
        """
        table_bytes = chosen.geometry.max_tokens * token_bytes
        return chosen.placement.forms != {PLAIN} and table_bytes > POSITION_SHARE * chosen.device_budget_bytes

    @property
    def _wants_profile(self) -> bool:
        """Whether a prediction decides something (a free split over a link with a speed), or was paid for already."""
        if not self.backend.has_speed:
            return False
        return self.config.fixed_split is None or self.config.profile != "auto"

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
        if chosen.inputs is None or not chosen.placement.may_become:
            return chosen
        self.measured.time_chunk(self.backend, self.shape, chosen.geometry, chosen.sizes, prepare, ring)
        rates = self.measured.correct(chosen.inputs.rates, chosen.geometry.rows)
        inputs = replace(chosen.inputs, rates=rates)
        plan = planner.solve(inputs)
        logger.info(
            "one layer checked: %.3g s per token recomputed, plan stores %.2f of the offloaded tokens as activations",
            rates.restore_s_per_token["activation"],
            plan.split_fraction,
        )
        placement = replace(chosen.placement, resident=_resident(plan, inputs, chosen.geometry), shares=plan.shares)
        corrected = replace(chosen, inputs=inputs, plan=plan, placement=placement, reserved_shares=plan.shares)
        # The plan is for the mean length; at the full one only the form that was asked for first may fit.
        return corrected if corrected.fits_on_host else replace(chosen, inputs=inputs)

    def note_gap(self, chosen: GenerationPlan, between_steps_s: float | None) -> None:
        """What passed between the attention of two real steps corrects the gap that was assumed.

        Where the device is the CPU the gap is part of its work, and is left as it is.
        """
        if chosen.inputs is not None and not self.backend.emulated:
            self.measured.take_gap(between_steps_s, chosen.inputs.rates)

    def rates(self, chosen: GenerationPlan) -> Rates | None:
        """Those that a plan was made with, corrected by what was measured since."""
        return self.measured.correct(chosen.inputs.rates, chosen.geometry.rows) if chosen.inputs else None

    def replan(
        self,
        chosen: GenerationPlan,
        on_host: Mapping[FormName, int],
        on_device: Mapping[FormName, int],
        rates: Rates | None,
    ) -> GenerationPlan:
        """The plan for blocks still to come, at the rates measured so far and with the blocks there are.

        Where no plan is within the caps any more the decision stays: whether the blocks fit is for the store to say.

        Args:
            chosen: what held so far.
            on_host: blocks of each layer on the host, by form.
            on_device: the same on the device.
            rates: the newest.
        """
        if chosen.inputs is None or rates is None or not chosen.placement.may_become:
            return chosen
        there = _stored(on_host, on_device)
        try:
            inputs = replace(chosen.inputs, rates=rates)
            inputs, plan, shares = self._solve_with(inputs, chosen.geometry, chosen.host_cap_bytes, there)
            plan = replace(plan, version=chosen.plan.version + 1)
        except InfeasiblePlanError as error:
            logger.debug("the plan stays as it is: %s", error)
            return chosen
        changed = replace(chosen, inputs=inputs, plan=plan, placement=replace(chosen.placement, shares=shares))
        return changed if changed.fits_on_host else chosen


def _resident(plan: Plan, inputs: PlanInputs, geometry: Geometry) -> dict[FormName, int]:
    """Blocks on the device, by form: those of the plan, and of those that come after it as many as there is room for.

    A plan is for the mean length.
    """
    found = {kind.form: n for kind, n in plan.placed.items() if kind.tier == "device" and n}
    block_bytes = inputs.num_offloaded_layers * inputs.block_tokens * inputs.bytes_per_token[PLAIN]
    to_come = max(0, geometry.max_tokens // inputs.block_tokens - inputs.num_blocks)
    more = min(to_come, max(0, inputs.device_bytes - plan.device_bytes) // max(1, block_bytes))
    return found | ({PLAIN: found.get(PLAIN, 0) + more} if more else {})


def _stored(on_host: Mapping[FormName, int], resident: Mapping[FormName, int]) -> dict[str, int]:
    """Blocks that there are, by option."""
    found = {option_name(form, "host"): n for form, n in on_host.items()}
    return found | {option_name(form, "device"): n for form, n in resident.items()}


def _fixed_shares(plan: Plan, split: float) -> dict[FormName, float]:
    """A share that the user fixed, of the form that is recomputed."""
    return {form: split for form in plan.shares if FORMS[form].is_recomputed}
