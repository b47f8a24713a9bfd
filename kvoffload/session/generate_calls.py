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
from kvoffload.errors import ConfigError, KVOffloadError
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.session.cache_plans import CachePlans
from kvoffload.session.drafted_call import DraftedCall
from kvoffload.session.generation import Generation
from kvoffload.session.generation_planner import GenerationPlanner
from kvoffload.session.plain_generation import plain_generation
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
        self._drafts = DraftedCall(planner.config)
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
            self._engine.drop_weights()  # whoever holds the model may have changed them since
            self._plans.weights.absorb()
            self._engine.is_generating = True
            self._drafts = DraftedCall(self._config, has_own_loop=bool(kwargs.get("custom_generate")))
            output = original(*args, **kwargs)
            self._drafts.settle()
            if generation.cache is not None:
                plan = self._plans[generation.cache]
                self._planner.note_gap(plan, generation.between_steps_s)
                held_bytes = self._engine.account.total_bytes + generation.cache.other_device_bytes
                self.stats = generation.finish(
                    plan.plan,
                    self._pool,
                    self._planner.measured.gap_s,
                    drafts=self._drafts.figures(plan),
                    plain=plain_generation(self._planner, plan, self._plans.weights, held_bytes),
                )
            if hf.returned_cache(output) is generation.cache:
                generation.owns_cache = False  # the caller has it now
            return output
        except BaseException:
            self._rescue()
            raise
        finally:
            ended, self.current = self.current, None
            self._engine.is_generating = False
            self._plans.weights.slice_rows(None)
            self._drafts.close()
            self._allocation.stop()
            try:
                if not self._owner.is_closed:
                    if self._backend.is_recording:
                        self._backend.stop_recording()
                    self._engine.drop()
                    self._engine.drop_weights()
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
                self._drafts.settle()
                if not cache.core.layers[0].num_tokens:
                    cache.reset()  # what was planned for it was for this call
                return
        except BaseException:
            cache.close()
            raise
        cache.close()

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
        self._reap()  # what nobody holds is no other cache's memory
        began = time.perf_counter()
        drafts = self._drafts.is_wanted(
            generation_config,
            generation_mode,
            offers_segments=self._plans.offers_segments,
            has_hooks=lambda: not self._are_hooks_alone(),
        )
        by_the_way = generation_config.output_attentions or getattr(self._model.config, "output_router_logits", False)
        self._plans.weights.need_whole_rows(bool(by_the_way))
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
            generation.use(cache)  # from now on an error in a forward closes it
            mask = model_kwargs.get("attention_mask")
            # as transformers tells a whole prompt from its newest tokens
            num_masked = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            if num_masked == prompt_tokens:
                cache.take_back_last(prompt_tokens)
        if drafts:
            chosen = self._plans.get(cache)
            self._drafts.start(
                self._model,
                cache,
                self._backend,
                generation_config,
                chosen,
                lambda count: self._note_forward(cache, count),
                lambda: self._plans.switch_near_cache(cache),
            )
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
        self._drafts.note_prefix(args[0] if args else kwargs.get("input_ids"))
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
            if not self._drafts.is_drafting:  # else it says which are answered from an earlier one
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
