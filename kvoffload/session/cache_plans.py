"""The plan that holds for each cache of a session, and the engine's buffers made for it.

Owns when a cache is planned, and when again: for its first tokens as they really are, a further turn, more rows, a
layer that needs layer buffers, steps that were not as predicted. Does not own how (`generation_planner`), nor anything
about one `generate()` (`generation`) or the model (`session`).
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kvoffload import hf
from kvoffload.cache.layer import CacheLayer
from kvoffload.cache.state import CACHE_ACCOUNT
from kvoffload.errors import HostMemoryError, InfeasiblePlanError
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.planning.forms import wanted_forms
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.sizes import grown, widened, with_kv_rows
from kvoffload.planning.sizing import LEAST_GAP_S
from kvoffload.session.generation_plan import GenerationPlan
from kvoffload.session.generation_planner import GenerationPlanner
from kvoffload.session.later_plans import LaterPlans
from kvoffload.session.model_weights import ModelWeights
from kvoffload.session.planning_ahead import PlanningAhead
from kvoffload.session.progress import AllocationProgress
from kvoffload.store.forms import activation as activations
from kvoffload.store.pool import HostPool

logger = logging.getLogger(__name__)


class CachePlans:
    """By cache, as long as the cache lives. Planning can raise `InfeasiblePlanError` and `HostMemoryError`.

    Args:
        planner: makes them.
        engine: whose buffers are for one cache at a time.
        pool: of host memory that the session holds.
        progress: told how much of it will be taken.
        num_layers: offloaded ones.
        offers_segments: whether attention over segments is installed on the model.
        weights: of the model.
    """

    def __init__(
        self,
        planner: GenerationPlanner,
        engine: TransferEngine,
        pool: HostPool,
        progress: AllocationProgress,
        *,
        num_layers: int,
        offers_segments: bool,
        weights: ModelWeights,
    ) -> None:
        self.weights = weights
        self._planner, self._later = planner, LaterPlans(planner)
        self._engine = engine
        self._pool = pool
        self._progress = progress
        self._num_layers = num_layers
        self.offers_segments = offers_segments
        self._plans: weakref.WeakKeyDictionary[hf.OffloadedHFCache, GenerationPlan] = weakref.WeakKeyDictionary()
        self._ahead: PlanningAhead[GenerationPlan] = PlanningAhead()
        self._configured_for: Callable[[], Any] = lambda: None  # a weak reference
        self._has_told_packing = False
        self._position_row_bytes: dict[tuple[int, int], int] = {}  # that blocks of (rows, copies) carried last

    def __contains__(self, cache: hf.OffloadedHFCache) -> bool:
        return cache in self._plans

    def __getitem__(self, cache: hf.OffloadedHFCache) -> GenerationPlan:
        return self._plans[cache]

    def get(self, cache: hf.OffloadedHFCache) -> GenerationPlan | None:
        """What holds for a cache; None where nothing is planned yet."""
        return self._plans.get(cache)

    def forget(self, cache: hf.OffloadedHFCache) -> None:
        """Drop what was planned for a cache that starts anew, perhaps with other rows."""
        self._plans.pop(cache, None)

    def lay_out_as_before(
        self,
        cache: hf.OffloadedHFCache,
        rows: int,
        copies: int,
        prompt_tokens: int,
        max_tokens: int,
        *,
        lives_on: bool = False,
        drafts: bool = False,
    ) -> None:
        """Plan a cache whose blocks carry what those of the last such cache did, if that is possible.

        Args:
            cache: an empty one.
            rows: of the cache.
            copies: rows per prompt (beams, or sequences returned).
            prompt_tokens: tokens of the prompt.
            max_tokens: cached at the end.
            lives_on: whether further turns may follow.
            drafts: whether tokens are drafted on what is on the device.
        """
        row_bytes = self._position_row_bytes.get((rows, copies), 0)
        how = (cache, rows, copies, prompt_tokens, max_tokens)
        try:
            self._lay_out(*how, position_row_bytes=row_bytes, lives_on=lives_on, drafts=drafts)
        except (HostMemoryError, InfeasiblePlanError):
            if not row_bytes:
                raise
            self._lay_out(*how, lives_on=lives_on, drafts=drafts)

    def start_anew(self, cache: hf.OffloadedHFCache) -> None:
        """Empty a cache and plan the same rows and length again; its prompt is all that it held, row by row."""
        before, num_tokens = self._plans[cache], cache.core.layers[0].num_tokens
        rows, max_tokens, lives_on = cache.core.rows, before.geometry.max_tokens, before.placement.lives_on
        cache.reset()
        self.lay_out_as_before(cache, rows, 1, num_tokens, max_tokens, lives_on=lives_on, drafts=before.drafts)

    def prefill_chunk_tokens(self, cache: hf.OffloadedHFCache, prompt_tokens: int) -> int | None:
        """How long a prefill chunk may be so that the prompt fits on the device; None if it fits whole.

        From then on as many rows of a prefill pass a layer with streamed weights at once as fit as well.
        """
        geometry = self._plans[cache].geometry
        held_bytes, _ = self._device_bytes(cache)
        parts = self._planner.limits.prefill_parts(geometry, prompt_tokens, held_bytes)
        if parts is None:
            return None
        self.weights.slice_rows(parts.rows)
        return None if parts.tokens == prompt_tokens else parts.tokens

    def prolong(self, cache: hf.OffloadedHFCache, prompt_tokens: int, max_tokens: int, *, drafts: bool = False) -> None:
        """A further turn begins: plan it anew, with what is stored.

        Args:
            cache: one that was planned before.
            prompt_tokens: of the turn, those that are cached already among them; 0 if unknown.
            max_tokens: cached at its end.
            drafts: whether tokens are drafted on what is on the device.
        """
        configured = before = self._plans[cache]
        before = replace(before, geometry=self._with_weights(before.geometry))
        layers, (held_bytes, others_bytes) = cache.core.layers, self._device_bytes(cache)
        if cache.core.rows > before.geometry.rows:  # they were repeated since
            before = self._widened(before, cache.core.rows)
        chosen = self._later.prolong(
            before,
            max_tokens,
            prompt_tokens=max(prompt_tokens, layers[0].num_tokens),
            on_host=layers[0].count("host"),
            crossing=layers[0].count_read("host"),
            on_device=layers[0].resident_places,
            is_uniform=all(layer.is_segmented == before.geometry.is_segmented for layer in layers),
            kv_row_bytes=max((layer.shape.row_bytes for layer in layers if layer.shape is not None), default=0),
            host_held_bytes=self._pool.slab_bytes,
            device_held_bytes=held_bytes,
            device_others_bytes=others_bytes,
            window_places=layers[0].window_places,
            drafts=drafts,
        )
        changed = chosen.sizes != configured.sizes or self._configured_for() is not cache
        self._change(cache, chosen)
        if chosen.placement.chunk_blocks != before.placement.chunk_blocks:
            cache.core.regroup()
        if changed:
            self._configure(cache)
        cache.core.make_room()

    def switch_near_cache(self, cache: hf.OffloadedHFCache) -> bool:
        """Between two forwards: drafts read the other near cache from now on. Whether there is a plan for that."""
        before = self._plans[cache]
        if before.other is None:
            return False
        placement = replace(before.other.placement, lives_on=before.placement.lives_on)
        chosen = replace(before.other, placement=placement, other=replace(before, other=None))
        logger.info("drafts read %s now", chosen.geometry.shadow_form or "a window of the newest tokens")
        self._engine.drop()  # what was prefetched may have other chunks
        try:
            self._take(cache, chosen, before)
        except HostMemoryError as error:
            logger.warning("drafts read what they read before: %s", error)
            self._take(cache, replace(before, other=None), chosen)
            return False
        return True

    def _take(self, cache: hf.OffloadedHFCache, chosen: GenerationPlan, before: GenerationPlan) -> None:
        """Another plan holds, with its buffers and its room."""
        self._change(cache, chosen)
        if chosen.placement.chunk_blocks != before.placement.chunk_blocks:
            cache.core.regroup()
        if chosen.sizes != before.sizes:
            self._configure(cache)
        cache.core.make_room()

    def keep_buffers(self, cache: hf.OffloadedHFCache) -> None:
        """Called with each update: the engine's buffers are those of this cache, and of all its rows."""
        chosen = self._plans.get(cache)
        if chosen is not None and cache.core.rows > chosen.geometry.rows:
            self._plans[cache] = self._widened(chosen, cache.core.rows)
            self._configure(cache)
        elif chosen is not None and self._configured_for() is not cache:
            self._configure(cache)

    @staticmethod
    def _widened(chosen: GenerationPlan, rows: int) -> GenerationPlan:
        """The same for more rows."""
        sizes = widened(chosen.sizes, chosen.geometry.rows, rows)
        return replace(chosen, geometry=replace(chosen.geometry, rows=rows), sizes=sizes, other=None)

    def use_whole_layers(self, cache: hf.OffloadedHFCache) -> None:
        """A layer of a cache that was planned without layer buffers needs them."""
        chosen = self._plans[cache]
        if chosen.geometry.is_segmented:
            geometry = replace(chosen.geometry, is_segmented=False)
            sizes = grown(replace(chosen.sizes, num_buffers=3 if geometry.beams > 1 else 2), geometry)
            self._plans[cache] = replace(chosen, geometry=geometry, sizes=sizes, other=None)
            self._configure(cache)

    def settle(self, cache: hf.OffloadedHFCache, position: int, first: hf.FirstTokens, prompt_tokens: int) -> bool:
        """The first tokens of a layer are here: settle the plan by them, and the forms that its blocks can have.

        Args:
            cache: whose layer.
            position: of the layer.
            first: what it was given.
            prompt_tokens: of the `generate()` in progress; 0 if unknown.

        Returns:
            Whether the rates of this machine were measured for it.
        """
        layer = cache.core.layers[position]
        self._fit(cache, layer, first, prompt_tokens)
        kv_dtype = self._planner.config.kv_dtype
        if self._planner.config.packing == "auto" and first.kv_dtype != "bfloat16" and not self._has_told_packing:
            self._has_told_packing = True
            logger.info("the cache is %s: packing is for bfloat16, and has no effect", first.kv_dtype)
        if kv_dtype != "model" and (why := first.why_not_encoded()):
            cache.warn_not_quantizable(first.module, kv_dtype, why)
        if not cache.core.placement.keeps_activations:
            return False
        if position == 0:
            is_carried = self._carries_positions(cache, first, prompt_tokens)
            cache.core.carry_positions(is_carried)
        if not cache.core.placement.keeps_activations:  # with what blocks carry
            return False
        settled = cache.core.layers[0].forms.get(activations.Stored.name)
        layout = settled.layout if isinstance(settled, activations.Stored) else None
        form = first.recomputing_form(None if layout is None else layout.row_bytes)
        if form is None:
            cache.warn_not_recomputable(position, first.module)
            if position == 0:
                self._lay_out_anew(cache, first, prompt_tokens, can_recompute=False)
            return False
        layer.forms[form.name] = form
        if position > 0:
            return False
        prepare = functools.partial(first.prepare_measurement, form.recompute)
        chosen = self._planner.measure_chunk(self._plans[cache], prepare, self._engine.buffers.idle_slots)
        self._change(cache, chosen)
        return True

    def _fit(self, cache: hf.OffloadedHFCache, layer: CacheLayer, first: hf.FirstTokens, prompt_tokens: int) -> None:
        """Plan, if nothing is planned for what a layer really caches per token, and make its buffers."""
        if cache not in self._plans:
            self._lay_out(cache, first.rows, 1, first.tokens, None, first, is_segmented=layer.is_segmented)
        geometry = self._plans[cache].geometry
        seen = replace(geometry, head_dim=first.kv_head_dim, kv_dtype=first.kv_dtype)
        seen = replace(seen, kv_row_bytes=first.kv_row_bytes, activation_row_bytes=first.activation_row_bytes)
        if layer.position == 0 and self._is_other(replace(seen, is_segmented=layer.is_segmented), geometry):
            self._lay_out_anew(cache, first, prompt_tokens)
        elif layer.position > 0 and first.kv_row_bytes > geometry.kv_row_bytes:
            self._widen_buffers(cache, first.kv_row_bytes)
        if layer.position > 0 and not layer.is_segmented:
            self.use_whole_layers(cache)
            self._engine.ensure_buffers(geometry.max_tokens * first.rows * first.kv_row_bytes)

    def _is_other(self, seen: Geometry, planned: Geometry) -> bool:
        """Whether a cache that was planned is to be planned again for what it is given."""
        if wanted_forms(self._planner.config, seen, has_rates=True) == wanted_forms(
            self._planner.config, planned, has_rates=True
        ):
            seen = replace(seen, head_dim=planned.head_dim, kv_dtype=planned.kv_dtype)
        return seen != planned

    def _widen_buffers(self, cache: hf.OffloadedHFCache, kv_row_bytes: int) -> None:
        """Buffers for a layer whose K and V are wider than those of the first."""
        chosen = self._plans[cache]
        sizes = with_kv_rows(chosen.sizes, chosen.geometry, kv_row_bytes)
        if sizes != chosen.sizes:
            logger.info("buffers grow to %d bytes on the device: K and V of layers differ", sizes.fixed_device_bytes)
            other = chosen.other
            if other is not None:
                other = replace(other, sizes=with_kv_rows(other.sizes, other.geometry, kv_row_bytes))
            self._plans[cache] = replace(chosen, sizes=sizes, other=other)
            self._configure(cache)

    def _carries_positions(self, cache: hf.OffloadedHFCache, first: hf.FirstTokens, prompt_tokens: int) -> bool:
        """Settle before the first tokens of the first layer are stored whether blocks carry position embeddings."""
        geometry, copies = self._plans[cache].geometry, cache.core.prompt_copies
        row_bytes = first.carried_row_bytes
        if not self._planner.carries_positions(self._plans[cache], first.position_token_bytes):
            row_bytes = 0
        if row_bytes != geometry.position_row_bytes:
            try:
                self._lay_out_anew(cache, first, prompt_tokens, position_row_bytes=row_bytes)
            except (HostMemoryError, InfeasiblePlanError) as error:
                if not row_bytes:
                    raise
                logger.info("position embeddings stay on the device: %s", error)
                row_bytes = 0
        self._position_row_bytes[first.rows, copies] = row_bytes
        return row_bytes > 0

    def follow(self, cache: hf.OffloadedHFCache) -> None:
        """Take the plan that was made for the blocks still to come, if there is one by now."""
        chosen = self._ahead.take(self._plans[cache])
        if chosen is not None:
            self._change(cache, chosen)

    def plan_ahead(self, cache: hf.OffloadedHFCache) -> None:
        """Begin to plan the blocks still to come, at the rates measured so far; it is taken by `follow`."""
        before, layer = self._plans[cache], cache.core.layers[0]
        if before.inputs is None:
            return
        there, rates = (layer.count_read("host"), layer.count_read("device")), self._later.rates(before)
        self._ahead.start(before, functools.partial(self._later.replan, before, *there, rates))

    def close(self) -> None:
        """Plan nothing any more."""
        self._ahead.close()

    def copy(self, cache: hf.OffloadedHFCache, other: hf.OffloadedHFCache) -> None:
        """What holds for a cache holds for a copy of it."""
        if cache in self._plans:
            self._plans[other] = self._plans[cache]

    def _change(self, cache: hf.OffloadedHFCache, chosen: GenerationPlan) -> None:
        """Another plan holds from now on; buffers stay as they are."""
        self._plans[cache] = chosen
        cache.core.placement = chosen.placement
        if self._configured_for() is cache:
            self._engine.stage_limit_bytes = chosen.stage_limit_bytes  # more resident blocks leave less for stages

    def _lay_out_anew(self, cache: hf.OffloadedHFCache, first: hf.FirstTokens, prompt_tokens: int, **how: Any) -> None:
        """Plan again for what an empty cache is really given."""
        before, copies = self._plans[cache].placement, cache.core.prompt_copies
        prompt_tokens = max(first.tokens, prompt_tokens)
        segmented = cache.core.layers[0].is_segmented
        how |= {"is_segmented": segmented, "lives_on": before.lives_on, "drafts": self._plans[cache].drafts}
        self._lay_out(cache, first.rows, copies, prompt_tokens, before.max_tokens, first, **how)

    def _lay_out(
        self,
        cache: hf.OffloadedHFCache,
        rows: int,
        copies: int,
        prompt_tokens: int,
        max_tokens: int | None,
        first: hf.FirstTokens | None = None,
        *,
        position_row_bytes: int = 0,
        can_recompute: bool = True,
        is_segmented: bool | None = None,
        lives_on: bool = False,
        drafts: bool = False,
    ) -> None:
        """Plan an empty cache and make the engine's buffers."""
        shape = first or self._planner.shape
        longest = max_tokens or max(256, 2 * prompt_tokens)
        geometry = Geometry(
            num_offloaded_layers=self._num_layers,
            rows=rows,
            max_tokens=longest,
            kv_row_bytes=shape.kv_row_bytes,
            head_dim=shape.kv_head_dim,
            kv_dtype=shape.kv_dtype,
            activation_row_bytes=shape.activation_row_bytes,
            position_row_bytes=position_row_bytes,
            beams=copies,
            lives_on=lives_on,
            other_device_bytes=self._planner.shape.other_layers_bytes(rows, longest),
            is_segmented=self.offers_segments if is_segmented is None else is_segmented,
            may_slice=self.weights.may_slice,
        )
        if drafts:
            geometry = self._planner.with_room_ahead(geometry)
        held_bytes, others_bytes = self._device_bytes(cache)
        if first is None:  # else a forward is under way
            ringed = replace(geometry, least_gap_s=LEAST_GAP_S)  # of a real link, as it will be planned
            self.weights.fit(
                lambda: self._planner.limits.weights_room_bytes(
                    ringed, prompt_tokens, held_bytes, self.weights.device_bytes
                )
            )
        geometry = self._with_weights(geometry)
        chosen = self._planner.plan_for(
            geometry,
            prompt_tokens=prompt_tokens,
            knows_length=max_tokens is not None,
            host_held_bytes=self._pool.slab_bytes,
            device_held_bytes=held_bytes,
            device_others_bytes=others_bytes,
            can_recompute=can_recompute,
        )
        self._apply(cache, replace(chosen, placement=replace(chosen.placement, lives_on=lives_on)))
        cache.core.rows, cache.core.prompt_copies = rows, copies

    def _with_weights(self, geometry: Geometry) -> Geometry:
        """The same beside the model's weights as they are."""
        weights = self.weights
        return replace(
            geometry,
            weight_bytes=weights.streamed_bytes,
            weights_are_pinned=weights.are_pinned,
            weight_device_bytes=weights.device_bytes,
        )

    def _apply(self, cache: hf.OffloadedHFCache, chosen: GenerationPlan) -> None:
        self._change(cache, chosen)
        self._configure(cache)
        self._progress.expect(self._pool.used_bytes + chosen.plan.host_bytes)

    def _configure(self, cache: hf.OffloadedHFCache) -> None:
        self._configured_for = lambda: None  # until all of it has worked
        chosen = self._plans[cache]
        sizes, self._engine.stage_limit_bytes = chosen.sizes, chosen.stage_limit_bytes
        self._engine.configure(
            slot_bytes=sizes.slot_bytes,
            num_slots=sizes.num_slots,
            buffer_bytes=sizes.buffer_bytes,
            d2h_slot_bytes=sizes.d2h_slot_bytes,
            scratch_bytes=sizes.scratch_bytes,
        )
        self._configured_for = weakref.ref(cache)

    def _device_bytes(self, cache: hf.OffloadedHFCache) -> tuple[int, int]:
        """Device memory that the session holds and this cache will use again, and that of its other caches' layers."""
        account, mine = self._engine.account, cache.core.account_name
        others = (name for name in account.held_bytes if name.startswith(CACHE_ACCOUNT) and name != mine)
        others_bytes = sum(account.held_bytes[name] for name in others)
        return account.total_bytes - others_bytes, others_bytes
