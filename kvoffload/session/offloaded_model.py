"""One model, offloaded, until it is closed.

Owns the life cycle: what is attached to the model, the pools, the caches, and that all of it goes again; and answers
what its caches ask. What a user holds of it is a `session`: nothing here refers to that, so that it is noticed when it
is lost. The calls of `generate()` belong to `generate_calls`; what is planned for each cache, and the engine's buffers
for it, to `cache_plans`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from kvoffload import hf
from kvoffload.backend import Backend, backend_for
from kvoffload.cache.cache import CacheCore
from kvoffload.config import OffloadConfig
from kvoffload.errors import KVOffloadError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.live import shape_of_model
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.planning.placement import Placement
from kvoffload.profiler.stored import find_stored, resolve_profile
from kvoffload.session.attached import Attached
from kvoffload.session.cache_plans import CachePlans
from kvoffload.session.generate_calls import GenerateCalls
from kvoffload.session.generation_planner import GenerationPlanner
from kvoffload.session.model_weights import ModelWeights, device_for
from kvoffload.session.progress import AllocationProgress
from kvoffload.session.stats import GenerationStats
from kvoffload.store.pool import HostPool
from kvoffload.timeline import Timeline

_ATTRIBUTE = "_kvoffload_session"  # of an offloaded model


class OffloadedModel:
    """All that is attached to a model.

    Args:
        model: perhaps wrapped.
        config: the user's options.
        backend: in the place of the one that these choose.

    Raises:
        KVOffloadError: it is offloaded already.
    """

    def __init__(self, model: Any, config: OffloadConfig, backend: Backend | None = None) -> None:
        hf.check_release()
        self.model = hf.unwrap(model)
        hf.check_supported(self.model)
        if _ATTRIBUTE in vars(self.model):
            raise KVOffloadError(
                "this model is offloaded already: use that session, or close() it first; where it is lost, or in a "
                "notebook before this cell runs again, kvoffload.release(model)"
            )
        self.config = config
        self.progress = hf.Progress()
        self.is_closed = False
        self._layer_indices = hf.offloadable_layers(self.model)
        device = device_for(self.model, config)
        # A named profile is looked up before anything is set up, also where nothing will be predicted with it.
        is_measured = config.profile == "auto"
        self._profile = None if is_measured else resolve_profile(config.profile, device=device, link=config.link)
        self._attached = Attached()  # what is taken off again, the last first
        try:
            self._attach(device, backend)
        except BaseException:
            self.close()
            raise

    def _attach(self, device: torch.device, backend: Backend | None) -> None:
        """Set up all that a session has; whatever interrupts this, `close` takes off what is attached by then."""
        config = self.config
        self._attached.callback(vars(self.model).pop, _ATTRIBUTE, None)
        vars(self.model)[_ATTRIBUTE] = self
        self.backend = backend or backend_for(device, config)
        self._attached.callback(self.backend.close)
        self.planner = GenerationPlanner(
            config, shape_of_model(self.model), self.backend, self._load_profile, self._find_profile
        )
        self._allocation = AllocationProgress()
        self.pool = HostPool(self.backend, self.planner.limits.host_cap_bytes(), self._allocation.update)
        self._attached.callback(self.pool.close)
        self.engine = TransferEngine(self.backend, overlap=config.overlap, schedule=config.schedule)
        self._attached.callback(self.engine.close)
        self._caches: weakref.WeakSet[hf.OffloadedHFCache] = weakref.WeakSet()
        self._abandoned: deque[CacheCore] = deque()  # of caches that nobody holds any more
        self._hooks = hf.ModelHooks(
            self.model,
            self._layer_indices,
            on_any=self._before_any_forward,
            on_forward=self._before_forward,
            on_layers=self._before_layers,
        )
        self._attached.callback(self._hooks.remove)
        self._segment_attention: hf.SegmentAttention | None = None
        # An unpaced emulated link has no device behind it whose memory could be saved: there the model's own attention
        # is faster, and the same to the last bit.
        is_worth_it = self.backend.has_speed or bool(config.fixed_drafts)  # drafts attend to a part of the segments
        if config.attention == "auto" and config.schedule == "pipelined" and is_worth_it:
            self._segment_attention = hf.SegmentAttention.install(self.model, self._hooks)
        if self._segment_attention is not None:
            self._attached.callback(self._segment_attention.remove)
        self.engine.layer_indices = self._layer_indices
        self._weights = ModelWeights(self.model, config, self.engine, is_compiled=self._hooks.is_compiled)
        self._attached.callback(self._weights.close)
        self._plans = CachePlans(
            self.planner,
            self.engine,
            self.pool,
            self._allocation,
            num_layers=len(self._layer_indices),
            offers_segments=self.offers_segments,
            weights=self._weights,
        )
        self._attached.callback(self._close_caches)
        self._attached.callback(self._plans.close)
        self._calls = GenerateCalls(
            self.model,
            self,
            engine=self.engine,
            pool=self.pool,
            planner=self.planner,
            plans=self._plans,
            allocation=self._allocation,
            progress=self.progress,
            new_cache=self.new_cache,
            reap=self._reap,
            are_hooks_alone=lambda: self._hooks.are_alone(self.model),
        )
        self._attached.callback(self._calls.remove)
        self._weights.place()
        if self._weights.is_streaming:  # what they take on the host is not the cache's
            self.pool.cap_bytes = self.planner.limits.host_cap_bytes()

    @property
    def stats(self) -> GenerationStats | None:
        """Of the last `generate()`; None before the first."""
        return self._calls.stats

    # ---- life cycle ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the model as it was before, and give back all memory. Caches of this session are dead afterwards.

        After one that was interrupted another does what is left.
        """
        self.is_closed = True
        self._attached.close()  # whatever fails in one, the others go on: threads and pinned memory go in any case

    def on_close(self, tell: Callable[[], object]) -> None:
        """Called first when it is closed, from wherever."""
        self._attached.callback(tell)

    def _close_caches(self) -> None:
        for cache in list(self._caches):
            cache.close()
        self._reap()

    def new_cache(self) -> hf.OffloadedHFCache:
        """An empty cache of this model.

        Raises:
            KVOffloadError: it is closed.
        """
        if self.is_closed:
            raise KVOffloadError("this session is closed: call kvoffload.offload(model) again")
        self._reap()
        core = CacheCore(
            self.engine,
            self.pool,
            Placement(block_tokens=1, chunk_blocks=1),
            num_layers=len(self._layer_indices),
            rows=0,
        )
        return self._cache_of(core)

    def _cache_of(self, core: CacheCore) -> hf.OffloadedHFCache:
        """The cache of these layers, which goes with it."""
        modules = {idx: self._hooks.modules.get(idx) for idx in self._layer_indices}
        cache = hf.OffloadedHFCache(
            self.model,
            self,
            core,
            modules,
            self.progress,
            offers_segments=self.offers_segments,
            is_compiled=self._hooks.is_compiled,
            presence=self._presence,
        )
        # Python may collect a cache in the middle of a step of another, or in another thread: only take a note then.
        weakref.finalize(cache, self._abandoned.append, core)
        self._caches.add(cache)
        return cache

    def record_timeline(self, is_wanted: bool) -> None:
        """See `Session`."""
        self._calls.record_timeline(is_wanted)

    def timeline(self) -> Timeline:
        """See `Session`."""
        return self._calls.timeline()

    def _presence(self, position: int) -> AbstractContextManager[None]:
        """A context in which the weights of an offloaded layer can be read outside its forward."""
        return self._weights.present(self._layer_indices[position])

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

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedModel:
        raise KVOffloadError("a model cannot be copied while it is offloaded: close() the session first")

    # ---- what a cache asks -------------------------------------------------------------------------------------------

    @property
    def offers_segments(self) -> bool:
        """Whether attention over segments is installed on the model."""
        return self._segment_attention is not None

    def claim(self, cache: hf.OffloadedHFCache) -> None:
        """Called with each update: the cache is alive, and the engine's buffers are made for it."""
        if self.is_closed or cache.is_closed:
            raise KVOffloadError(
                "this cache belongs to a session or a generate() that failed or is over: take a new_cache()"
            )
        self._calls.refuse_other_threads()
        self._reap()
        self._plans.keep_buffers(cache)

    def settle(self, cache: hf.OffloadedHFCache, position: int, first: hf.FirstTokens) -> None:
        """A layer got its first tokens and stores them next: settle its forms; with the first layer also the plan."""
        was_measured = self._plans.settle(cache, position, first, self._calls.prompt_tokens)
        if was_measured and self._calls.current is not None:
            self._calls.current.leave_out(self.planner.measured.take_copied())

    def use_whole_layers(self, cache: hf.OffloadedHFCache) -> None:
        """A layer of a cache that was planned without layer buffers needs them."""
        self._plans.use_whole_layers(cache)

    def end_forward(self, cache: hf.OffloadedHFCache) -> None:
        """All layers have cached a forward's tokens; what they do with the next ones may change now."""
        self._calls.end_forward(cache)

    def forget(self, cache: hf.OffloadedHFCache) -> None:
        """What was decided for a cache that starts anew, perhaps with other rows."""
        self._plans.forget(cache)

    def copy_of(self, cache: hf.OffloadedHFCache) -> hf.OffloadedHFCache:
        """A copy of a cache, which shares the blocks stored so far; see `OffloadedHFCache.__deepcopy__`."""
        self.claim(cache)
        cache.check_copyable()
        self.engine.drop()  # nothing is in flight for either
        copied = self._cache_of(cache.core.fork())
        copied.copy_from(cache)
        self._plans.copy(cache, copied)
        return copied

    # ---- what the hooks tell -----------------------------------------------------------------------------------------

    def _before_any_forward(self) -> None:
        """A forward of the model begins, with whatever cache: outside `generate()` its weights may have changed."""
        if self._calls.current is None:
            self.engine.drop_weights()
            self._weights.absorb()

    def _before_forward(self, cache: hf.OffloadedHFCache) -> None:
        """A forward of the model begins, with a cache of ours."""
        self.engine.note_forward(cache.core)
        self._calls.before_forward(cache)

    def _before_layers(self) -> None:
        """A forward comes to the first offloaded layer."""
        self.progress.forwards += 1


def offloaded_model(model: Any) -> OffloadedModel | None:
    """What is attached to a model, perhaps wrapped; None where nothing is."""
    found: OffloadedModel | None = getattr(hf.unwrap(model), "__dict__", {}).get(_ATTRIBUTE)
    return found
