"""Calls of a model's `generate()`: one at a time, each with its cache, its statistics, and everything tidy afterwards.

Owns what stands in the place of methods of the model: `generate` (the guard, timing, clean-up),
`_prepare_cache_for_generation` (which is told the maximum length, the batch and the beams),
`prepare_inputs_for_generation`, and those of continuous batching, which are refused. Does not own what is planned for a
cache (`cache_plans`) nor what is counted (`generation`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from kvoffload import hf
from kvoffload.draft.lengths import FixedLength, Lengths, PlannedLength
from kvoffload.errors import ConfigError, KVOffloadError
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.planning.drafts import expected_rounds
from kvoffload.session.cache_plans import CachePlans
from kvoffload.session.drafting import Drafting, cannot_draft
from kvoffload.session.generation import DraftFigures, Generation
from kvoffload.session.generation_plan import GenerationPlan
from kvoffload.session.generation_planner import GenerationPlanner
from kvoffload.session.progress import AllocationProgress
from kvoffload.session.stats import GenerationStats
from kvoffload.store.pool import HostPool
from kvoffload.timeline import Timeline, assemble

logger = logging.getLogger(__name__)
PLANNED_AHEAD_TOKENS = 3  # before a block is full: the solver takes a step or two


class GenerateCalls:
    """The calls of one model's `generate()`, one at a time.

    Args:
        model: whose methods are stood in for, until `remove`.
        owner: the session; caches that belong to another are refused.
        engine: whose buffers are for one call at a time.
        pool: of host memory.
        planner: told what a call measured.
        plans: by cache.
        allocation: stopped when a call is over.
        progress: counts the calls.
        new_cache: makes an empty cache of the session.
        reap: takes back the memory of caches that nobody holds any more.
        are_hooks_alone: whether nobody else has hooks on the model.
    """

    def __init__(
        self,
        model: Any,
        owner: Any,
        *,
        engine: TransferEngine,
        pool: HostPool,
        planner: GenerationPlanner,
        plans: CachePlans,
        allocation: AllocationProgress,
        progress: hf.Progress,
        new_cache: Callable[[], hf.OffloadedHFCache],
        reap: Callable[[], None],
        are_hooks_alone: Callable[[], bool],
    ) -> None:
        self.current: Generation | None = None
        self.stats: GenerationStats | None = None  # of the last call
        self._model, self._owner, self._config = model, owner, planner.config
        self._drafting: Drafting | None = None
        self._why_one_by_one: str | None = None
        self._engine, self._backend, self._pool = engine, engine.backend, pool
        self._planner, self._plans = planner, plans
        self._allocation, self._progress = allocation, progress
        self._new_cache, self._reap = new_cache, reap
        self._are_hooks_alone = are_hooks_alone
        self._lock = threading.Lock()
        self._records_timeline = False  # from the next call on
        self._has_timeline = False
        self._shadows = hf.Shadows(
            model,
            {
                "generate": self.generate,
                "_prepare_cache_for_generation": self.prepare_cache,
                "prepare_inputs_for_generation": self.prepare_inputs,
                **dict.fromkeys(hf.CONTINUOUS_BATCHING, _refuse_continuous_batching),
            },
        )
        self._originals = self._shadows.originals

    def remove(self) -> None:
        """Give the model its own methods back."""
        self._shadows.remove()

    # ---- in the place of the model's methods ---------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, guarded, timed and cleaned up after."""
        original = self._originals["generate"]
        if getattr(kwargs.get("generation_config"), "is_assistant", False):
            return original(*args, **kwargs)  # the model drafts for itself (early exit), with transformers' cache
        if not self._lock.acquire(blocking=False):
            raise KVOffloadError(
                "a generate() of this model is running already (from another thread, or from inside itself); "
                "an offloaded model serves one call at a time"
            )
        self._progress.generations += 1
        try:
            self._engine.account.take_peak()
            if self._records_timeline:
                self._backend.start_recording()  # anew
                self._has_timeline = True
            generation = self.current = Generation(
                self._backend, self._engine, self._progress, prompt_tokens=_prompt_tokens(args, kwargs)
            )
            self._why_one_by_one = None
            if kwargs.get("custom_generate"):
                self._why_one_by_one = "custom_generate is a loop of its own"
            output = original(*args, **kwargs)
            if self._drafting is not None:
                self._drafting.settle()
            if generation.cache is not None:
                plan = self._plans[generation.cache]
                self._planner.note_gap(plan, generation.between_steps_s)
                self.stats = generation.finish(
                    plan.plan, self._pool, self._planner.measured.gap_s, drafts=self._draft_figures(plan)
                )
            if hf.returned_cache(output) is generation.cache:
                generation.owns_cache = False  # the caller has it now
            return output
        except BaseException:
            self._rescue()
            raise
        finally:
            ended, self.current = self.current, None
            if self._drafting is not None:
                self._drafting.close()
                self._drafting = None
            self._allocation.stop()
            try:
                if not self._owner.is_closed:
                    if self._backend.is_recording:
                        self._backend.stop_recording()
                    self._engine.drop()
                    self._engine.release_stages()
                    if ended is not None and ended.cache is not None and ended.owns_cache:
                        ended.cache.close()
                    self._reap()
            finally:
                self._lock.release()

    def _rescue(self) -> None:
        """A call failed: between two forwards a user's cache is as after the last token asked for, else it is lost."""
        generation = self.current
        if generation is None or generation.cache is None:
            return
        cache = generation.cache
        try:
            if not (cache.is_torn or generation.owns_cache):
                if self._drafting is not None:
                    self._drafting.settle()
                return
        except BaseException:
            cache.close()
            raise
        cache.close()

    def _drafts(self, generation_config: Any, generation_mode: Any) -> bool:
        """Whether tokens are drafted in this call.

        Raises:
            ConfigError: a number of drafts was asked for, and the call cannot be served by them.
        """
        number = self._config.fixed_drafts
        if number == 0:
            return False
        reason = self._why_one_by_one
        if generation_mode not in hf.ONE_BY_ONE:
            reason = f"{generation_mode.value.replace('_', ' ')} asks for more than the next token"
        elif number is None and generation_config.do_sample:
            reason = "tokens are sampled: 'auto' drafts for greedy decoding only, a number for both"
        elif number is None and not self._are_hooks_alone():
            reason = "hooks on the model would see drafts"
        elif not self._plans.offers_segments:
            reason = "its attention puts whole layers together on the device (attention='whole_layer', or no other way)"
        if number is not None and reason is not None:
            raise cannot_draft(number, reason)
        self._why_one_by_one = reason
        return reason is None

    def _draft_figures(self, chosen: GenerationPlan) -> DraftFigures:
        """What drafts did in the call that is about to end."""
        if self._drafting is None:
            reason = self._why_one_by_one if self._config.fixed_drafts is None else None
            return DraftFigures(reason=reason)
        rounds = self._drafting.rounds
        return DraftFigures(
            rounds.num_asked,
            rounds.num_passes,
            rounds.num_drafted,
            rounds.num_accepted,
            tuple(rounds.survivals),
            chosen.round_times,
            self._drafting.reason,
        )

    def _why_not_expected(self, chosen: GenerationPlan | None) -> str:
        """Why a plan has no drafts, where they were possible."""
        if chosen is None or chosen.inputs is None:
            return "nothing is known that would predict what drafts gain (the link has no speed, or the split is fixed)"
        return "drafts are not expected to gain anything here"

    def _start_drafts(self, cache: hf.OffloadedHFCache, generation_config: Any) -> None:
        """From the next forward on, `generate()` is answered from rounds of drafts."""
        number, chosen = self._config.fixed_drafts, self._plans.get(cache)
        if number is not None:
            lengths: Lengths = FixedLength(number)
        elif chosen is None or chosen.round_times is None:
            self._why_one_by_one = self._why_not_expected(chosen)
            return
        elif self._config.deterministic:
            lengths = FixedLength(expected_rounds(chosen.round_times, chosen.geometry.rows).drafts)
        else:
            lengths = PlannedLength(chosen.round_times, chosen.geometry.rows)
        self._drafting = Drafting(
            self._model,
            cache,
            self._backend,
            generation_config,
            lengths,
            is_asked_for=number is not None,
            before_pass=lambda drafts: self._note_forward(cache, drafts),
        )

    def prepare_cache(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        if generation_config.is_assistant:
            original = self._originals["_prepare_cache_for_generation"]
            return original(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        if generation_config.use_cache is False:
            raise ConfigError("use_cache=False leaves nothing to offload: call generate() outside the session")
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ConfigError(
                f"cache_implementation={generation_config.cache_implementation!r} asks for another cache than the "
                "session's: leave it out, or call generate() outside the session"
            )
        generation = self.current
        assert generation is not None
        began = time.perf_counter()
        drafts = self._drafts(generation_config, generation_mode)
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        cache = hf.given_cache((), model_kwargs)
        if cache is None:
            cache = self._new_cache()
            generation.owns_cache = True
            generation.use(cache)
            prompt_tokens = min(generation.prompt_tokens, max_cache_length) or max_cache_length
            self._plans.lay_out_as_before(
                cache, batch_size * copies, copies, prompt_tokens, max_cache_length, drafts=drafts
            )
            self._shorten_prefill(generation_config, cache, prompt_tokens)
        elif not isinstance(cache, hf.OffloadedHFCache) or cache.session is not self._owner:
            raise ConfigError(
                f"generate() was given a {type(cache).__name__} that does not belong to this session: "
                "use session.new_cache(), or call generate() outside the session"
            )
        else:
            cache.check_rows(batch_size * copies)
            vars(cache)["_is_user_defined"] = True  # what transformers does to a cache it is given
            prompt_tokens = min(generation.prompt_tokens, max_cache_length)
            if cache in self._plans:
                self._plans.prolong(cache, prompt_tokens, max_cache_length, drafts=drafts)
            elif prompt_tokens and not cache.core.layers[0].num_tokens:
                self._plans.lay_out_as_before(
                    cache, batch_size * copies, 1, prompt_tokens, max_cache_length, lives_on=True, drafts=drafts
                )
                self._shorten_prefill(generation_config, cache, prompt_tokens)
            generation.use(cache)  # from now on an error closes it
            mask = model_kwargs.get("attention_mask")
            # as transformers tells a whole prompt from its newest tokens
            num_masked = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            if num_masked == prompt_tokens:
                cache.take_back_last(prompt_tokens)
        if drafts:
            self._start_drafts(cache, generation_config)
        model_kwargs[hf.generation_name()] = cache
        generation.setup_before_forward_s += time.perf_counter() - began
        return None

    def _shorten_prefill(self, generation_config: Any, cache: hf.OffloadedHFCache, prompt_tokens: int) -> None:
        chunk = self._plans.prefill_chunk_tokens(cache, prompt_tokens)
        if chunk is not None and generation_config.prefill_chunk_size is None:
            logger.info("prefilling in chunks of %d tokens so that the prompt fits on the device", chunk)
            generation_config.prefill_chunk_size = chunk

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Put back a cache of ours that the model drops, as LongRoPE does beyond the original length.

        There transformers begins anew with the whole text and no cache, since every token is rotated differently; ours
        begins anew as well.
        """
        inputs = self._originals["prepare_inputs_for_generation"](*args, **kwargs)
        if self._drafting is not None:
            self._drafting.rounds.prefix = args[0] if args else kwargs.get("input_ids")
        generation, cache = self.current, hf.given_cache(args, kwargs)
        is_ours = generation is not None and isinstance(cache, hf.OffloadedHFCache) and cache is generation.cache
        if is_ours and hf.given_cache((), inputs) is None:
            if cache.core.layers[0].num_tokens:
                logger.info("the model starts its cache anew beyond its original length")
                self._plans.start_anew(cache)
            inputs[hf.generation_name()] = cache
        return inputs

    # ---- during a call -------------------------------------------------------------------------------------------

    @property
    def prompt_tokens(self) -> int:
        """Of the call in progress; 0 if unknown, or if there is none."""
        return 0 if self.current is None else self.current.prompt_tokens

    def refuse_other_threads(self) -> None:
        """Refuse a cache in a thread while another generates.

        Raises:
            KVOffloadError: so it is.
        """
        if self.current is not None and self.current.thread != threading.get_ident():
            raise KVOffloadError(
                "a generate() of this model is running in another thread, and an offloaded model serves one call at a "
                "time: wait for it"
            )

    def before_forward(self, cache: hf.OffloadedHFCache) -> None:
        """A forward of the model begins, with a cache of the session."""
        generation = self.current
        if generation is not None and generation.cache is cache:
            if self._drafting is None:  # else it says which are answered from an earlier one
                self._note_forward(cache)
        elif generation is None and cache.core.layers[0].num_tokens:
            self._engine.release_stages()  # the prefill, or a part of it, is over

    def _note_forward(self, cache: hf.OffloadedHFCache, drafts: int = 0) -> None:
        """A forward begins; of a round of drafts the one that is predicted to take as long as all of it."""
        generation = self.current
        assert generation is not None
        chosen = self._plans.get(cache)
        predicted_s = 0.0 if chosen is None else chosen.plan.predicted_step_s
        if drafts and chosen is not None:
            predicted_s = 0.0 if chosen.round_times is None else chosen.round_times.round_s(drafts)
        generation.note_forward(predicted_s)

    def end_forward(self, cache: hf.OffloadedHFCache) -> None:
        """A forward has cached its tokens: take a plan that is ready, and begin one where blocks are about to fill.

        The rates of real steps may change the form of blocks still to come.
        """
        generation = self.current
        if generation is None or generation.cache is not cache or not generation.is_decoding:
            return
        if self._config.deterministic or cache not in self._plans or not self._plans[cache].placement.may_become:
            return
        self._plans.follow(cache)
        plan, left = self._plans[cache], cache.core.placement.block_tokens - cache.core.layers[0].tail_tokens
        if left <= PLANNED_AHEAD_TOKENS:
            rates = generation.rates_if_surprised(plan.plan.predicted_step_s)
            if rates is not None:
                self._planner.measured.take(*rates)
            self._planner.note_gap(plan, generation.between_steps_s)
            self._plans.plan_ahead(cache)

    # ---- timeline ------------------------------------------------------------------------------------------------

    def record_timeline(self, is_wanted: bool) -> None:
        """From the next call on, keep what ran when; False ends it, and frees what is kept."""
        self._records_timeline = is_wanted
        if not is_wanted:
            self._has_timeline = False
            self._backend.stop_recording(keep=False)

    def timeline(self) -> Timeline:
        """What ran when in the last call.

        Raises:
            KVOffloadError: nothing is recorded.
        """
        if not self._has_timeline:
            raise KVOffloadError("nothing is recorded: call session.record_timeline() before generate()")
        return assemble(self._backend.recorded())


def _prompt_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens per sequence that `generate` was given; 0 if it was given none."""
    named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    for value in (*args[:1], *named):
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            return value.shape[1]
    return 0


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    raise ConfigError(
        "continuous batching (generate_batch, cache_implementation='paged') has a paged cache of its own: call it "
        "outside the session, or generate() without it"
    )
