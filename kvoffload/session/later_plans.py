"""Plans of a cache that there is: for a further turn, and for blocks still to come.

Owns what stays of the plan before (blocks, where they are, how many tokens each has) and what follows the new length
and the rates measured since. Does not own the first plan (`generation_planner`) nor when another is made
(`cache_plans`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kvoffload.errors import HostMemoryError, InfeasiblePlanError
from kvoffload.planning import planner
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.placement import PLAIN, FormName
from kvoffload.planning.plan import Plan
from kvoffload.planning.problem import bytes_per_token, host_bytes_at, mean_tokens, pose
from kvoffload.planning.rates import Rates
from kvoffload.planning.sizes import grown, with_kv_rows
from kvoffload.session.generation_plan import (
    GenerationPlan,
    resident_with_room,
    stored_options,
    with_copies,
    without_packing,
)
from kvoffload.session.generation_planner import GenerationPlanner

logger = logging.getLogger(__name__)


class LaterPlans:
    """Makes them.

    Args:
        planner: made the first ones; its limits and measured rates count.
    """

    def __init__(self, planner: GenerationPlanner) -> None:
        self._planner = planner

    def prolong(self, chosen: GenerationPlan, max_tokens: int, *, drafts: bool = False, **known: Any) -> GenerationPlan:
        """As `_prolong`, with drafts only where they are asked for, or expected to pay; packed where there is room."""
        try:
            return self._with_drafts_or_not(chosen, max_tokens, drafts=drafts, **known)
        except HostMemoryError:
            plain = without_packing(chosen)
            if plain is None:
                raise
        return self._with_drafts_or_not(plain, max_tokens, drafts=drafts, **known)

    def _with_drafts_or_not(
        self, chosen: GenerationPlan, max_tokens: int, *, drafts: bool, **known: Any
    ) -> GenerationPlan:
        """`prolong`, packed as before."""
        undrafted = replace(
            chosen, geometry=replace(chosen.geometry, shadow_form=None), round_times=None, no_drafts_reason=""
        )
        if not drafts:
            return replace(self._prolong(undrafted, max_tokens, **known), round_times=None)
        ahead = self._planner.with_room_ahead(chosen.geometry)
        drafted = self._planner.with_best_near_cache(
            ahead, lambda settled: self._prolong(replace(chosen, geometry=settled), max_tokens, **known)
        )
        if self._planner.config.fixed_drafts is not None or drafted.expected_drafts:
            return replace(drafted, no_drafts_reason="")
        found = self._prolong(undrafted, max_tokens, **known)
        return replace(found, round_times=None, no_drafts_reason=drafted.why_no_drafts)

    def _prolong(
        self,
        chosen: GenerationPlan,
        max_tokens: int,
        *,
        prompt_tokens: int,
        on_host: Mapping[FormName, int],
        crossing: Mapping[FormName, int],
        on_device: Mapping[FormName, int],
        kv_row_bytes: int,
        is_uniform: bool,
        host_held_bytes: int,
        device_held_bytes: int,
        device_others_bytes: int,
        window_places: int = 0,
    ) -> GenerationPlan:
        """Plan anew for a further turn of a cache: what is stored stays, sizes and the form of new blocks follow.

        Args:
            chosen: what held so far, with the geometry that is to hold.
            max_tokens: cached at the end of the turn.
            prompt_tokens: cached when its first token is decoded.
            on_host: blocks of each layer on the host, by form.
            crossing: those of them that have no exact copy on the device.
            on_device: resident blocks of each layer, or places for them, by form.
            kv_row_bytes: K and V of one token of one sequence in the widest layer.
            is_uniform: whether all layers attend chunk by chunk, or all over whole layers; else sizes stay.
            host_held_bytes: host memory the session holds already.
            device_held_bytes: device memory the session holds already, and will use again.
            device_others_bytes: device memory that other caches of the session hold.
            window_places: for exact copies of the newest blocks.

        Raises:
            HostMemoryError: before any token of that turn, with the numbers.
            InfeasiblePlanError: copies of all blocks are wanted, and do not fit.
        """
        geometry = replace(chosen.geometry, max_tokens=max(prompt_tokens, max_tokens))
        has_window = geometry.shadow_form is None  # its places are residents that move
        resident = dict(on_device) if not has_window else _added(on_device, PLAIN, window_places)
        host_cap = self._planner.limits.full_host_cap_bytes(geometry, chosen.placement.prompt_tokens, host_held_bytes)
        longer = replace(
            chosen,
            geometry=geometry,
            sizes=grown(chosen.sizes, geometry),
            placement=replace(chosen.placement, max_tokens=max_tokens, ahead_tokens=geometry.ahead_tokens),
            host_cap_bytes=host_cap,
            other=None,
        )
        anew, why = None, InfeasiblePlanError("some layers attend in parts and others to all at once")
        if is_uniform:

            def cap_bytes(settled: Geometry) -> int | None:
                held = (device_held_bytes, device_others_bytes)
                return self._planner.limits.device_cap_bytes(settled, prompt_tokens, *held)

            stored = crossing if has_window else on_host
            try:
                anew = self._planned_anew(longer, prompt_tokens, stored, resident, kv_row_bytes, cap_bytes)
                anew = with_copies(self._planner.with_fitting_share(anew), on_device.get(PLAIN, 0))
                anew = self._planner.with_rounds(anew)
            except InfeasiblePlanError as error:
                logger.debug("the plan of the last turn stays: %s", error)
                why = error.with_traceback(None)  # which would keep this frame, and the cache of its callers
        if anew is not None and anew.fits_on_host:
            return anew
        if not has_window:
            raise why
        longer.check_host()
        return replace(longer, placement=replace(longer.placement, shadow_blocks=0))  # they were for the turn before

    def _planned_anew(
        self,
        longer: GenerationPlan,
        prompt_tokens: int,
        on_host: Mapping[FormName, int],
        on_device: Mapping[FormName, int],
        kv_row_bytes: int,
        cap_bytes: Callable[[Geometry], int | None],
    ) -> GenerationPlan:
        """Another plan for a cache that has become longer.

        Arguments as of `prolong`; `cap_bytes` is the cap on device memory, given the geometry with its chunk sizes.

        Raises:
            InfeasiblePlanError: there is none.
        """
        geometry, host_cap, max_tokens = longer.geometry, longer.host_cap_bytes, longer.placement.max_tokens
        assert max_tokens is not None
        # Blocks have the tokens they have, and stay where they are: those to come may be resident as well.
        config = replace(self._planner.config, block_tokens=longer.placement.block_tokens)
        settled = {} if geometry.shadow_form is not None else on_host  # any of them may have an exact copy, or none
        resident, token_bytes = on_device, bytes_per_token(geometry, longer.placement.block_tokens)
        resident_bytes = sum(n * token_bytes[form] for form, n in resident.items())
        resident_bytes *= geometry.num_offloaded_layers * longer.placement.block_tokens

        def left_beside_residents(settled: Geometry) -> int | None:
            cap = cap_bytes(settled)
            return None if cap is None else cap - resident_bytes

        geometry, sizes, inputs, left_bytes, has_rates = pose(
            self._planner.shape,
            geometry,
            config,
            self._planner.profile(),
            is_emulated=self._planner.backend.emulated,
            cached_tokens=mean_tokens(prompt_tokens, max_tokens),
            device_cap_bytes=left_beside_residents,
            host_cap_bytes=host_cap,
            can_recompute=longer.placement.keeps_activations,
            correct=lambda rates: self._planner.measured.correct(rates, geometry.rows),
        )
        inputs = replace(inputs, device_bytes=inputs.device_bytes + resident_bytes)
        inputs, plan, shares = self._solve_with(
            inputs,
            geometry,
            host_cap,
            stored_options(settled, resident),
            sum(on_host.values()) + sum(resident.values()),
        )
        plan = replace(plan, version=longer.plan.version + 1)
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
                resident=resident_with_room(plan, inputs, geometry),
                shares=kept,
            ),
        )

    def _solve_with(
        self, inputs: PlanInputs, geometry: Geometry, host_cap_bytes: int, stored: Mapping[str, int], there: int
    ) -> tuple[PlanInputs, Plan, dict[FormName, float]]:
        """The plan for the mean length or the blocks there are, and the shares of forms with one block more.

        Args:
            inputs: for the mean length.
            geometry: of the cache.
            host_cap_bytes: at the full length.
            stored: blocks that there are and whose option is settled.
            there: all blocks that there are.

        Raises:
            InfeasiblePlanError: they do not fit.
        """

        def at(num_blocks: int) -> PlanInputs:
            host_bytes = host_bytes_at(host_cap_bytes, geometry, num_blocks, inputs.block_tokens)
            return replace(inputs, num_blocks=num_blocks, host_bytes=host_bytes, stored=stored)

        now = at(max(inputs.num_blocks, there))
        return now, planner.solve(now), planner.solve(at(max(inputs.num_blocks, there + 1))).shares

    def rates(self, chosen: GenerationPlan) -> Rates | None:
        """Those that a plan was made with, corrected by what was measured since."""
        return self._planner.measured.correct(chosen.inputs.rates, chosen.geometry.rows) if chosen.inputs else None

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
        there = stored_options(on_host, on_device)
        try:
            inputs = replace(chosen.inputs, rates=rates)
            inputs, plan, shares = self._solve_with(
                inputs, chosen.geometry, chosen.host_cap_bytes, there, sum(there.values())
            )
            plan = replace(plan, version=chosen.plan.version + 1)
        except InfeasiblePlanError as error:
            logger.debug("the plan stays as it is: %s", error)
            return chosen
        changed = replace(chosen, inputs=inputs, plan=plan, placement=replace(chosen.placement, shares=shares))
        return changed if changed.fits_on_host else chosen


def _added(counts: Mapping[FormName, int], form: FormName, more: int) -> dict[FormName, int]:
    """With more blocks of a form."""
    return {**counts, form: counts.get(form, 0) + more} if more else dict(counts)
