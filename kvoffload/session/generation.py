"""One `generate()` in progress: readings at its start and at its first decode step, and the statistics made of them.

Readings are of counters that the backend keeps (events on CUDA, the link's thread on an emulated link); nothing here
synchronises.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from dataclasses import replace
from typing import NamedTuple

from kvoffload import hf
from kvoffload.backend import Backend, LinkUse, Pace
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.planning.drafts import RoundTimes
from kvoffload.planning.forms import FORMS
from kvoffload.planning.plan import Plan
from kvoffload.session.plain_generation import PlainGeneration
from kvoffload.session.stats import GenerationStats
from kvoffload.store.pool import HostPool


class _Readings(NamedTuple):
    """The backend's counters at one moment."""

    h2d: LinkUse
    recompute_s: float
    wait_s: float
    starved_s: float
    gaps: Pace  # between steps
    copied: Pace  # in bytes
    recompute: Pace  # in tokens of rows
    attention: Pace
    draft_s: float

    @classmethod
    def of(cls, backend: Backend) -> _Readings:
        return cls(
            h2d=backend.link_use("h2d"),
            recompute_s=backend.span_seconds("recompute"),
            wait_s=backend.span_seconds("exposed_wait"),
            starved_s=backend.starved_s,
            gaps=backend.spans("gap"),
            copied=backend.pace("h2d"),
            recompute=backend.pace("recompute"),
            attention=backend.pace("attention"),
            draft_s=backend.span_seconds("draft"),
        )


MIN_WINDOW_STEPS = 4  # fewer say little about a rate
MAX_PREDICTION_ERROR_FRACTION = 0.1  # above this the rates behind the prediction are measured again
SETTLING_STEPS = 2  # the first waits for the end of the write-back, the second empties the ring


class DraftFigures(NamedTuple):
    """What verified drafts did in a call."""

    asked: int = 0  # tokens of decode steps
    passes: int = 0  # over the link, that gave them
    drafted: int = 0
    acceptance: float | None = None  # share of them
    survivals: tuple[float, ...] = ()
    times: RoundTimes | None = None  # that were planned
    reason: str | None = None  # why there were none, where they might have been
    cache: str | None = None  # what they read: "window", or the form of copies of all blocks


class StepRates(NamedTuple):
    """Rates of recent steps; None where nothing was done."""

    recompute_s_per_row_token: float | None
    h2d_bytes_per_s: float | None
    attention_s_per_row_token: float | None


NO_DRAFTS = DraftFigures()


class Generation:
    """Made when `generate()` begins.

    Args:
        backend: whose counters to read.
        engine: whose counters and peaks to read.
        progress: of the session.
        prompt_tokens: per sequence; 0 if unknown.
    """

    def __init__(self, backend: Backend, engine: TransferEngine, progress: hf.Progress, prompt_tokens: int) -> None:
        self.thread = threading.get_ident()
        self.prompt_tokens = prompt_tokens
        self.cache: hf.OffloadedHFCache | None = None
        self.owns_cache = False
        self._progress, self._setup_before_s = progress, progress.setup_s
        self.setup_before_forward_s = 0.0
        self._backend, self._engine = backend, engine
        self._written_before = engine.write_back.queued_bytes
        self._weights_before = engine.delivered_weight_bytes
        self._began = time.perf_counter()
        self._start = _Readings.of(backend)
        self._decode: _Readings | None = None  # at the first decode step
        self._window: tuple[_Readings, int] | None = None  # readings and forwards at its start
        self._settled_gaps = Pace(0, 0.0)  # before the steps that count
        self._recomputed_before = 0
        self._forwards: list[float] = []  # start of each forward
        self._predicted_s: list[float] = []  # for each decode step, by the plan that held
        self._num_prefill_forwards = 0
        self._cached_before = 0  # tokens of each sequence, when the first forward began
        self._cached_at_decode: int | None = None  # the same of the first decode step
        self._prefill_peak_bytes = 0

    def use(self, cache: hf.OffloadedHFCache) -> None:
        """The cache this run works with is known."""
        self.cache = cache
        self._recomputed_before = cache.core.recomputed_tokens

    def leave_out(self, copied: LinkUse) -> None:
        """What the link has carried to time something is not this generation's."""
        start = self._start.h2d
        without = LinkUse(
            start.copied_bytes + copied.copied_bytes, start.busy_s + copied.busy_s, start.copies + copied.copies
        )
        self._start = self._start._replace(h2d=without)

    @property
    def _setup_in_forward_s(self) -> float:
        """Time spent on memory and measurements during forwards; not counted as prefill."""
        return self._progress.setup_s - self._setup_before_s

    @property
    def setup_s(self) -> float:
        """All time spent on memory and measurements."""
        return self.setup_before_forward_s + self._setup_in_forward_s

    @property
    def is_decoding(self) -> bool:
        return self._decode is not None

    @property
    def recomputed_tokens(self) -> int:
        """Recomputed so far, summed over steps, layers and rows."""
        return 0 if self.cache is None else self.cache.core.recomputed_tokens - self._recomputed_before

    def note_forward(self, predicted_step_s: float) -> None:
        """A forward of the model begins; a decode step is predicted to take so long."""
        assert self.cache is not None
        self._forwards.append(time.perf_counter())
        is_first = len(self._forwards) == 1
        cached = self.cache.core.layers[0].num_tokens
        if is_first:
            self._cached_before = cached
        is_prefill = self._num_prefill_forwards == len(self._forwards) - 1
        is_prefill &= is_first or cached < self.prompt_tokens
        self._backend.mark("prefill" if is_prefill else "step")
        if is_prefill:
            self._num_prefill_forwards += 1
            return
        self._predicted_s.append(predicted_step_s)
        if self._decode is None:
            self._decode = _Readings.of(self._backend)
            self._cached_at_decode = cached
            self._engine.release_stages()
            self._prefill_peak_bytes = self._engine.account.take_peak()
        elif self._window is None and len(self._forwards) > self._num_prefill_forwards + SETTLING_STEPS:
            self._open_window()
            self._settled_gaps = self._backend.spans("gap")

    def _open_window(self) -> None:
        self._window = (_Readings.of(self._backend), len(self._forwards) - 1)

    def rates_if_surprised(self, predicted_step_s: float) -> StepRates | None:
        """What link, recomputation and attention did in the steps since the last call, if these were not as predicted.

        None while there are too few of them, or within `MAX_PREDICTION_ERROR_FRACTION` of the prediction.
        """
        if self._window is None or len(self._forwards) - 1 - self._window[1] < MIN_WINDOW_STEPS:
            return None
        start, first_forward = self._window
        self._open_window()
        step_s = statistics.median(b - a for a, b in itertools.pairwise(self._forwards[first_forward:]))
        # of rounds of drafts their own prediction
        expected = self._predicted_s[first_forward - self._num_prefill_forwards : -1]
        predicted_step_s = statistics.median(expected) if expected else predicted_step_s
        if predicted_step_s and abs(step_s / predicted_step_s - 1) <= MAX_PREDICTION_ERROR_FRACTION:
            return None
        now = _Readings.of(self._backend)
        byte_s = now.copied.since(start.copied)
        return StepRates(
            now.recompute.since(start.recompute),
            1 / byte_s if byte_s else None,
            now.attention.since(start.attention),
        )

    @property
    def between_steps_s(self) -> float | None:
        """From the last attention of a step to the first of the next, on the device; None until a few have passed."""
        if self._window is None:
            return None
        gaps, before = self._backend.spans("gap"), self._settled_gaps
        return gaps.since(before) if gaps.amount - before.amount >= MIN_WINDOW_STEPS else None

    def finish(
        self,
        plan: Plan,
        pool: HostPool,
        gap_s: float | None = None,
        *,
        drafts: DraftFigures = NO_DRAFTS,
        plain: PlainGeneration,
    ) -> GenerationStats:
        """The statistics, once `generate()` has returned.

        Args:
            plan: it ran with.
            pool: of the session.
            gap_s: that a device waited for its host between two steps; None where that is not known.
            drafts: what they did.
            plain: what generation without offloading would have done.
        """
        assert self.cache is not None
        self._backend.mark("end")
        if self._decode is None:
            self._engine.release_stages()
            self._prefill_peak_bytes = self._engine.account.take_peak()
        core, backend = self.cache.core, self._backend
        starts = [*self._forwards, time.perf_counter()]
        decode = starts[self._num_prefill_forwards :]
        steps = [after - before for before, after in itertools.pairwise(decode)]
        wall_s = decode[-1] - decode[0]
        end, decode_start = _Readings.of(backend), self._decode
        link = None if decode_start is None else end.h2d.since(decode_start.h2d)
        idle_s = 0.0
        if decode_start is not None:
            idle_s = end.wait_s - decode_start.wait_s + end.starved_s - decode_start.starved_s
            idle_s += (gap_s or 0.0) * (end.gaps.amount - decode_start.gaps.amount)
        cached = core.layers[0].num_tokens
        prompt_tokens = cached if self._cached_at_decode is None else self._cached_at_decode
        p50 = statistics.median(steps) if steps else None
        predicted = (statistics.median(self._predicted_s) if self._predicted_s else plan.predicted_step_s) or None
        others = self.cache.other_device_bytes
        stored = core.count_blocks()
        lossy = core.lossy_forms
        packed = sum(n for form, n in stored.items() if FORMS[form].is_encoded and FORMS[form].is_exact)
        return GenerationStats(
            setup_s=self.setup_s,
            prefill_s=decode[0] - starts[0] - self._setup_in_forward_s,
            ttft_s=decode[0] - self._began - self.setup_s,
            tpot_s=wall_s / (drafts.asked or len(steps)) if steps else None,
            decode_step_s=steps,
            tokens_per_s=core.rows * (cached - prompt_tokens) / wall_s if wall_s > 0 else 0.0,
            h2d_bytes=end.h2d.since(self._start.h2d).copied_bytes,
            d2h_bytes=self._engine.write_back.queued_bytes - self._written_before,
            h2d_gb_per_s=link.copied_bytes / link.busy_s / 1e9 if link and link.busy_s > 0 else None,
            link_utilization=min(1.0, link.busy_s / wall_s) if link and wall_s > 0 else None,
            recompute_s=end.recompute_s - self._start.recompute_s,
            recomputed_tokens=self.recomputed_tokens,
            exposed_wait_s=end.wait_s - self._start.wait_s,
            device_busy_fraction=1 - min(1.0, idle_s / wall_s) if wall_s > 0 else None,
            plan=replace(plan, plain_step_s=plain.step_s),
            fits_on_device=plain.fits,
            prompt_tokens=prompt_tokens,
            cached_before_tokens=self._cached_before,
            predicted_step_s=predicted,
            fraction_of_bound=predicted / p50 if predicted and p50 else None,
            prediction_error_fraction=p50 / predicted - 1 if predicted and p50 else None,
            host_bytes=pool.used_bytes,
            cache_host_bytes=core.host_bytes,
            pinned_bytes=pool.pinned_bytes,
            weight_bytes=self._engine.delivered_weight_bytes - self._weights_before,
            device_weight_bytes=self._engine.weight_device_bytes,
            device_kv_peak_decode_bytes=self._engine.account.take_peak() + others,
            device_kv_peak_prefill_bytes=self._prefill_peak_bytes + others,
            exact=not lossy and (self.recomputed_tokens == 0 or all(layer.is_full_precision for layer in core.layers)),
            lossy_form=max(lossy, key=lambda form: FORMS[form].loss, default=None),
            kept_exact_blocks=sum(core.kept_plain[form] for form in core.kept_plain if not FORMS[form].is_exact),
            packed_fraction=packed / max(1, sum(stored.values())),
            tokens_per_pass=drafts.asked / drafts.passes if drafts.passes else 1.0 if steps else None,
            draft_acceptance=drafts.acceptance,
            drafted_tokens=drafts.drafted,
            round_times=drafts.times,
            draft_survivals=list(drafts.survivals),
            draft_s=end.draft_s - self._start.draft_s,
            drafts_off_reason=drafts.reason,
            draft_cache=drafts.cache,
            link_name=backend.link_name,
            link_has_speed=backend.has_speed,
        )
