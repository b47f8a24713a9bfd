"""A session: one model, offloaded, until it is closed.

Owns the life cycle (what is attached to the model, the pools, the caches), the guard around `generate()`, and the
statistics. Two methods are shadowed on the model instance, and restored: `generate` (timing, clean-up, the guard)
and `_prepare_cache_for_generation` (which is told the maximum length, the batch and the beams). What its caches ask is
answered here as far as the `generate()` in progress matters (its time, its prompt); what is decided for each, and the
engine's buffers for it, belong to `decisions`.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from types import TracebackType
from typing import Any

import torch

from kvoffload import hf
from kvoffload.backend import Backend, CudaBackend, EmulatedBackend
from kvoffload.cache.cache import OffloadedCache
from kvoffload.cache.layer import CacheLayer
from kvoffload.config import EmulatedLink, OffloadConfig
from kvoffload.errors import ConfigError, KVOffloadError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.live import shape_of_model
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.planning.placement import Placement
from kvoffload.profiler.stored import find_stored, resolve_profile
from kvoffload.session.cache_plans import CachePlans
from kvoffload.session.generation import Generation
from kvoffload.session.generation_plan import GenerationPlanner
from kvoffload.session.progress import AllocationProgress
from kvoffload.session.stats import GenerationStats
from kvoffload.store.pool import HostPool
from kvoffload.timeline import Timeline, assemble

logger = logging.getLogger(__name__)


class Session:
    """See `kvoffload.offload`."""

    def __init__(self, model: Any, config: OffloadConfig, backend: Backend | None = None) -> None:
        hf.check_release()
        self.model = hf.unwrap(model)
        hf.check_supported(self.model)
        if "_kvoffload_session" in vars(self.model):
            raise KVOffloadError("this model is offloaded already: use that session, or close() it first")
        self.config = config
        self.stats: GenerationStats | None = None
        self.num_forwards = 0
        self.num_generations = 0
        self.is_closed = False
        self._layer_indices = hf.offloadable_layers(self.model)
        device = next(self.model.parameters()).device
        # A named profile is looked up before anything is set up, also where nothing will be predicted with it.
        is_measured = config.profile == "auto"
        self._profile = None if is_measured else resolve_profile(config.profile, device=device, link=config.link)
        self.backend = backend or _make_backend(device, config)
        self.engine = TransferEngine(self.backend, overlap=config.overlap, schedule=config.schedule)
        self.decider = GenerationPlanner(
            config, shape_of_model(self.model), self.backend, self._load_profile, self._find_profile
        )
        self._progress = AllocationProgress()
        self.pool = HostPool(self.backend, self.decider.limits.host_cap_bytes(), self._progress.update)
        self._lock = threading.Lock()
        self._run: Generation | None = None
        self._records_timeline = False  # from the next generate() on
        self._has_timeline = False
        self._caches: weakref.WeakSet[hf.OffloadedHFCache] = weakref.WeakSet()
        self._abandoned: deque[OffloadedCache] = deque()  # of caches that nobody holds any more
        self._hooks = hf.ModelHooks(
            self.model,
            self._layer_indices,
            on_forward=self._before_forward,
            on_layers=self._before_layers,
        )
        self._segment_attention: hf.SegmentAttention | None = None
        # An unpaced emulated link has no device behind it whose memory could be saved: there the model's own attention
        # is faster, and the same to the last bit.
        is_unpaced = self.backend.emulated and getattr(config.link, "h2d_gb_per_s", None) is None
        if config.attention == "auto" and config.schedule == "pipelined" and not is_unpaced:
            self._segment_attention = hf.SegmentAttention.install(self.model, self._hooks)
        self._decisions = CachePlans(
            self.decider,
            self.engine,
            self.pool,
            self._progress,
            num_layers=len(self._layer_indices),
            offers_segments=self.offers_segments,
        )
        self._shadows = hf.Shadows(
            self.model,
            {
                "generate": self._generate,
                "_prepare_cache_for_generation": self._prepare_cache,
                "prepare_inputs_for_generation": self._prepare_inputs,
                **dict.fromkeys(hf.CONTINUOUS_BATCHING, _refuse_continuous_batching),
            },
        )
        vars(self.model)["_kvoffload_session"] = self

    # ---- life cycle ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it was before, and give back all memory. Caches of this session are dead afterwards."""
        if self.is_closed:
            return
        self.is_closed = True
        self._hooks.remove()
        if self._segment_attention is not None:
            self._segment_attention.remove()
        self._shadows.remove()
        del vars(self.model)["_kvoffload_session"]
        try:
            for cache in list(self._caches):
                cache.close()
            self._reap()
            self.engine.close()
        finally:  # whatever interrupts this, the threads and the pinned memory go
            self.backend.close()
            self.pool.close()

    def new_cache(self) -> hf.OffloadedHFCache:
        """An empty cache for a custom loop or several turns; pass it as `cache` (`past_key_values` up to 5.23).

        Raises:
            KVOffloadError: the session is closed.
        """
        if self.is_closed:
            raise KVOffloadError("this session is closed: call kvoffload.offload(model) again")
        self._reap()
        core = OffloadedCache(
            self.engine,
            self.pool,
            Placement(block_tokens=1, chunk_blocks=1),
            num_layers=len(self._layer_indices),
            rows=0,
        )
        modules = {idx: self._hooks.modules.get(idx) for idx in self._layer_indices}
        cache = hf.OffloadedHFCache(self.model, self, core, modules, is_compiled=self._hooks.is_compiled)
        # Python may collect a cache in the middle of a step of another, or in another thread: only take a note then.
        weakref.finalize(cache, self._abandoned.append, core)
        reference = weakref.ref(cache)  # the core must not keep the cache alive
        core.before_blocks = lambda: self._before_blocks(reference())
        self._caches.add(cache)
        return cache

    def record_timeline(self, is_wanted: bool = True) -> None:
        """From the next `generate()` on, keep what ran when, for `timeline`. Off by default; costs nothing then.

        While it is on a decode step takes a little longer: a reading of the clock, or two CUDA events, at every
        attention to a chunk. Only `generate()` is recorded, not a loop of your own over `new_cache()`.

        Args:
            is_wanted: False ends it, and frees what is kept.
        """
        self._records_timeline = is_wanted
        if not is_wanted:
            self._has_timeline = False
            self.backend.stop_recording(keep=False)

    def timeline(self) -> Timeline:
        """What ran when in the last `generate()`, if `record_timeline` was called before; waits for the device.

        Returns:
            Copies, recomputation, attention and the rest, and where each decode step begins. Plain data, in seconds
            since that `generate()` began; the latest 200,000 stretches of it.

        Raises:
            KVOffloadError: nothing is recorded.
        """
        if not self._has_timeline:
            raise KVOffloadError("nothing is recorded: call session.record_timeline() before generate()")
        return assemble(self.backend.recorded())

    def _load_profile(self) -> HardwareProfile:
        if self._profile is None:
            self._profile = resolve_profile(self.config.profile, device=self.backend.device, link=self.config.link)
        return self._profile

    def _find_profile(self) -> HardwareProfile | None:
        if self._profile is None:
            self._profile = find_stored(self.backend.device)
        return self._profile

    def _reap(self) -> None:
        """Take back the memory of caches that nobody holds any more."""
        while self._abandoned:
            self._abandoned.popleft().reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        raise KVOffloadError("a model cannot be copied while it is offloaded: close() the session first")

    # ---- generate ------------------------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        original = self._shadows.originals["generate"]
        if getattr(kwargs.get("generation_config"), "is_assistant", False):
            return original(*args, **kwargs)  # the model drafts for itself (early exit), with transformers' cache
        if not self._lock.acquire(blocking=False):
            raise KVOffloadError(
                "a generate() of this model is running already (from another thread, or from inside itself); "
                "an offloaded model serves one call at a time"
            )
        self.num_generations += 1
        try:
            self.engine.take_peak()
            if self._records_timeline:
                self.backend.start_recording()  # anew
                self._has_timeline = True
            self._run = Generation(self.backend, self.engine, prompt_tokens=_prompt_tokens(args, kwargs))
            output = original(*args, **kwargs)
            if self._run.cache is not None:
                decision = self._decisions[self._run.cache]
                self.decider.note_gap(decision, self._run.between_steps_s)
                self.stats = self._run.finish(decision.plan, self.pool, self.decider.measured.gap_s)
            if hf.returned_cache(output) is self._run.cache:
                self._run.owns_cache = False  # the caller has it now
            return output
        except BaseException:
            if self._run is not None and self._run.cache is not None:
                self._run.cache.close()  # it may have stopped between two layers
            raise
        finally:
            run, self._run = self._run, None
            self._progress.stop()
            try:
                if not self.is_closed:
                    if self.backend.is_recording:
                        self.backend.stop_recording()
                    self.engine.drop()
                    self.engine.release_stages()
                    if run is not None and run.cache is not None and run.owns_cache:
                        run.cache.close()
                    self._reap()
            finally:
                self._lock.release()

    def _prepare_cache(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        if generation_config.is_assistant:
            original = self._shadows.originals["_prepare_cache_for_generation"]
            return original(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        if generation_config.use_cache is False:
            raise ConfigError("use_cache=False leaves nothing to offload: call generate() outside the session")
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ConfigError(
                f"cache_implementation={generation_config.cache_implementation!r} asks for another cache than the "
                "session's: leave it out, or call generate() outside the session"
            )
        run = self._run
        assert run is not None
        began = time.perf_counter()
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        cache = hf.given_cache((), model_kwargs)
        if cache is None:
            cache = self.new_cache()
            run.owns_cache = True
            run.use(cache)
            prompt_tokens = min(run.prompt_tokens, max_cache_length) or max_cache_length
            self._decisions.lay_out_as_before(cache, batch_size * copies, copies, prompt_tokens, max_cache_length)
            chunk = self._decisions.prefill_chunk_tokens(cache, prompt_tokens)
            if chunk is not None and generation_config.prefill_chunk_size is None:
                logger.info("prefilling in chunks of %d tokens so that the prompt fits on the device", chunk)
                generation_config.prefill_chunk_size = chunk
        elif not isinstance(cache, hf.OffloadedHFCache) or cache.session is not self:
            raise ConfigError(
                f"generate() was given a {type(cache).__name__} that does not belong to this session: "
                "use session.new_cache(), or call generate() outside the session"
            )
        else:
            cache.check_rows(batch_size * copies)
            run.use(cache)
            vars(cache)["_is_user_defined"] = True  # what transformers does to a cache it is given
            if cache in self._decisions:
                self._decisions.prolong(cache, max_cache_length)
        model_kwargs[hf.generation_name()] = cache
        run.setup_s += time.perf_counter() - began
        return None

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Put back a cache of ours that the model drops, as LongRoPE does beyond the original length.

        There transformers begins anew with the whole text and no cache, since every token is rotated differently; ours
        begins anew as well.
        """
        inputs = self._shadows.originals["prepare_inputs_for_generation"](*args, **kwargs)
        run, cache = self._run, hf.given_cache(args, kwargs)
        is_ours = run is not None and isinstance(cache, hf.OffloadedHFCache) and cache is run.cache
        if is_ours and hf.given_cache((), inputs) is None:
            if cache.core.layers[0].num_tokens:
                logger.info("the model starts its cache anew beyond its original length")
                self._decisions.start_anew(cache)
            inputs[hf.generation_name()] = cache
        return inputs

    # ---- what a cache asks -------------------------------------------------------------------------------------------

    @property
    def offers_segments(self) -> bool:
        """Whether attention over segments is installed on the model."""
        return self._segment_attention is not None

    def check_usable(self, cache: hf.OffloadedHFCache) -> None:
        """Called with each update: the cache is alive, and the engine's buffers are made for it."""
        if self.is_closed or cache.is_closed:
            raise KVOffloadError(
                "this cache belongs to a session or a generate() that failed or is over: take a new_cache()"
            )
        if self._run is not None and self._run.thread != threading.get_ident():
            raise KVOffloadError(
                "a generate() of this model is running in another thread, and an offloaded model serves one call at a "
                "time: wait for it"
            )
        self._reap()
        self._decisions.keep_buffers(cache)

    def forget(self, cache: hf.OffloadedHFCache) -> None:
        """What was decided for a cache that starts anew, perhaps with other rows."""
        self._decisions.forget(cache)

    def use_whole_layers(self, cache: hf.OffloadedHFCache) -> None:
        """A layer of a cache that was planned without layer buffers needs them."""
        self._decisions.use_whole_layers(cache)

    def carries_positions(
        self, cache: hf.OffloadedHFCache, first: hf.FirstTokens, *, row_bytes: int, token_bytes: int
    ) -> bool:
        """Called before the first tokens of the first layer are stored; see `Decisions.carries_positions`."""
        began = time.perf_counter()
        is_wanted = self._decisions.carries_positions(
            cache, first, self._prompt_tokens, row_bytes=row_bytes, token_bytes=token_bytes
        )
        self.add_setup(time.perf_counter() - began)
        return is_wanted

    def cannot_recompute(self, cache: hf.OffloadedHFCache, first: hf.FirstTokens) -> None:
        """Called before the first tokens are stored if the first layer's K/V do not follow from its activation."""
        began = time.perf_counter()
        self._decisions.transfer_all(cache, first, self._prompt_tokens)
        self.add_setup(time.perf_counter() - began)

    def before_first_append(
        self,
        cache: hf.OffloadedHFCache,
        layer: CacheLayer,
        first: hf.FirstTokens,
        measure: hf.Measure | None,
    ) -> None:
        """Called when a layer gets its first tokens, before any of them is stored; the first layer settles the plan.

        Args:
            cache: whose layer.
            layer: the layer.
            first: what the layer really caches per token.
            measure: prepares the recomputation of a chunk for timing; None where the layer cannot recompute.
        """
        began = time.perf_counter()
        self._decisions.settle(cache, layer, first, self._prompt_tokens)
        if layer.position == 0 and measure is not None:
            self._decisions.measure_chunk(cache, measure)
            if self._run is not None:
                self._run.restart_link()  # what was measured was not for this generation
        self.add_setup(time.perf_counter() - began)

    @property
    def _prompt_tokens(self) -> int:
        return 0 if self._run is None else self._run.prompt_tokens

    def add_setup(self, seconds: float) -> None:
        """Count time spent on memory and measurements during a forward as set-up, not as prefill."""
        if self._run is not None:
            self._run.add_setup(seconds)

    # ---- what real steps say -----------------------------------------------------------------------------------------

    def _before_forward(self, cache: hf.OffloadedHFCache) -> None:
        """Called at the start of each forward of the model with a cache of ours."""
        run = self._run
        if run is not None and run.cache is cache:
            run.note_forward()
        elif run is None and cache.core.layers[0].num_tokens:
            self.engine.release_stages()  # the prefill, or a part of it, is over

    def _before_blocks(self, cache: hf.OffloadedHFCache | None) -> None:
        """Called before a step stores new blocks: the rates of real steps may change their form."""
        run = self._run
        if cache is None or cache not in self._decisions or run is None or not run.is_decoding:
            return
        decision = self._decisions[cache]
        if not decision.placement.may_change:
            return
        rates = run.rates_if_surprised(decision.plan.predicted_step_s)
        if rates is not None:
            self.decider.measured.take(*rates)
        self.decider.note_gap(decision, run.between_steps_s)
        self._decisions.replan(cache)

    def _before_layers(self) -> None:
        """Called when a forward comes to the first offloaded layer."""
        self.num_forwards += 1


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


def _make_backend(device: torch.device, config: OffloadConfig) -> Backend:
    if isinstance(config.link, EmulatedLink):
        if device.type != "cpu":
            raise ConfigError(f"an emulated link needs the model on the CPU, it is on {device}")
        return EmulatedBackend(config.link)
    if device.type == "cuda":
        return CudaBackend(device)
    if device.type == "cpu":
        return EmulatedBackend(EmulatedLink())
    raise ConfigError(f"the model is on {device}; only CUDA devices and the CPU (with an emulated link) are supported")
