"""What one `generate()` call did: times, bytes, and the verdict. Plain data; measuring is the session's work."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from kvoffload.errors import ConfigError
from kvoffload.planning.drafts import RoundTimes
from kvoffload.planning.forms import FORMS
from kvoffload.planning.plan import Plan, paragraphs
from kvoffload.planning.verdicts import beside_full_transfer, beside_plain
from kvoffload.units import count, counted, duration, gb

SLOW = 2.0  # times the predicted step, from where on a cause is named


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStats:
    """Statistics of the last `generate()` of a session. Decode figures leave out the prefill.

    `print(session.stats)` says them in words, with a verdict in the last paragraph: beside generation without
    offloading where weights and cache fit on the device (predicted, or measured by `compared_with`), and beside full
    transfer. In a chat they are of the last turn. Times are in seconds of the wall clock.

    Attributes:
        setup_s: allocating and pinning memory, measuring; in no other figure.
        prefill_s: the forwards over the prompt; in a later turn of a chat over its new tokens.
        ttft_s: time to first token.
        tpot_s: time per output token after the first; None without a decode step.
        decode_step_s: each decode step, in order; with drafts each round.
        tokens_per_s: new tokens of all sequences, decode only.
        h2d_bytes: to the device, over the whole call; `weight_bytes` among them.
        d2h_bytes: from the device, over the whole call.
        h2d_gb_per_s: GB/s while the link was copying, decode only; None where it was not.
        link_utilization: share of the decode time in which the link was copying to the device, 0..1.
        recompute_s: on the device, recomputing K and V.
        recomputed_tokens: sum over steps, layers and rows.
        exposed_wait_s: time compute waited for the link.
        device_busy_fraction: share of the decode time in which compute waited for neither link nor host, 0..1.
        plan: that it ran with; with `plain_step_s`, a predicted step without offloading.
        predicted_step_s: the median step, or round, that the plan predicted; None without a prediction.
        fraction_of_bound: predicted over measured median step: 1 is the bound of the cost model.
        prediction_error_fraction: measured median over predicted step, minus 1: above 0 is slower.
        host_bytes: of all caches of the session on the host.
        pinned_bytes: of all memory of the session on the host.
        device_kv_peak_decode_bytes: most that caches and buffers held on the device while decoding.
        device_kv_peak_prefill_bytes: the same before.
        exact: K and V that attention saw were the model's own bit for bit, or recomputed in float32. False: recomputed
            in half precision, where the last bit may differ, or stored with loss.
        lossy_form: the coarsest form with loss that blocks were stored in, such as "int4"; None without.
        kept_exact_blocks: that such a form could not hold: not finite. Over all layers.
        weight_bytes: of streamed layers, over the link; among `h2d_bytes`.
        device_weight_bytes: of decoder layers that stay on the device, and slabs for those that do not.
        packed_fraction: of the stored blocks, those that are packed without loss, 0..1.
        tokens_per_pass: over the link; 1 without drafts, None without decode steps.
        draft_acceptance: of the tokens drafted, the share that was asked for, 0..1; None without drafts.
        draft_survivals: share of the rounds in which the first draft was accepted, the first two, ...
        drafted_tokens: of each sequence.
        round_times: what rounds of drafts were planned to take; None without a prediction.
        draft_s: spent on drafts, in the decode steps.
        draft_cache: what drafts read beside residents: "window", or "int4" for copies of all blocks; None without.
        drafts_off_reason: why tokens were decoded one by one; None where drafts were made.
        prompt_tokens: of each sequence, cached when the first new token is decoded; those of earlier turns among them.
        cached_before_tokens: of these, by earlier turns in the same cache.
        cache_host_bytes: of the cache of this call; `host_bytes` counts those of other chats as well.
        fits_on_device: weights and the whole cache would, without offloading; None: not known.
        measured_plain_step_s: a step without offloading, as of `compared_with`; None without.
        link_name: such as "PCIe 4.0 x16", or "emulated 0.2 GB/s" where there is no GPU.
        link_has_speed: False: an emulated link that copies as fast as it can, of which nothing can be predicted.
    """

    setup_s: float
    prefill_s: float
    ttft_s: float
    tpot_s: float | None
    decode_step_s: list[float]
    tokens_per_s: float
    h2d_bytes: int
    d2h_bytes: int
    h2d_gb_per_s: float | None
    link_utilization: float | None
    recompute_s: float
    recomputed_tokens: int
    exposed_wait_s: float
    device_busy_fraction: float | None
    plan: Plan
    predicted_step_s: float | None
    fraction_of_bound: float | None
    prediction_error_fraction: float | None
    host_bytes: int
    pinned_bytes: int
    device_kv_peak_decode_bytes: int
    device_kv_peak_prefill_bytes: int
    exact: bool
    lossy_form: str | None = None
    kept_exact_blocks: int = 0
    weight_bytes: int = 0
    device_weight_bytes: int = 0
    packed_fraction: float = 0.0
    tokens_per_pass: float | None = None
    draft_acceptance: float | None = None
    draft_survivals: list[float] = field(default_factory=list)
    drafted_tokens: int = 0
    round_times: RoundTimes | None = None
    draft_s: float = 0.0
    draft_cache: str | None = None
    drafts_off_reason: str | None = None
    prompt_tokens: int = 0
    cached_before_tokens: int = 0
    cache_host_bytes: int = 0
    fits_on_device: bool | None = None
    measured_plain_step_s: float | None = None
    link_name: str = ""
    link_has_speed: bool = True

    @property
    def decode_step_s_p50(self) -> float | None:
        """Median decode step."""
        return statistics.median(self.decode_step_s) if self.decode_step_s else None

    @property
    def token_s(self) -> float | None:
        """Measured seconds for the next token of each sequence: the median step, or with drafts the mean."""
        return self.tpot_s if self.draft_acceptance is not None else self.decode_step_s_p50

    @property
    def slowdown(self) -> float | None:
        """Seconds for a token over those of generation without offloading on the device; above 1 is slower.

        Measured where `compared_with` gave a step, else both predicted by the plan's model. None where weights and
        cache do not fit on the device, or nothing is predicted.
        """
        if self.measured_plain_step_s is not None and self.token_s is not None:
            return self.token_s / self.measured_plain_step_s
        if self.plan.plain_step_s and self.predicted_step_s and self.token_s is not None:
            return self.predicted_step_s / (self.tokens_per_pass or 1.0) / self.plan.plain_step_s
        return None

    def compared_with(self, plain_step_s: float) -> GenerationStats:
        """The same with a measured step of generation without offloading, which the verdict then compares with.

        Args:
            plain_step_s: seconds of the median decode step of the same call outside the session.

        Raises:
            ConfigError: not a number above zero.
        """
        if isinstance(plain_step_s, bool) or not 0 < plain_step_s < math.inf:
            raise ConfigError(f"plain_step_s must be seconds above zero, got {plain_step_s!r}")
        return dataclasses.replace(self, measured_plain_step_s=plain_step_s)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file: every field, with the plan and `round_times` as dicts, and the derived values."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "plan"}
        data["plan"] = self.plan.to_json()
        data["round_times"] = None if self.round_times is None else dataclasses.asdict(self.round_times)
        for name in ("decode_step_s_p50", "token_s", "slowdown"):
            data[name] = getattr(self, name)
        return data

    def __str__(self) -> str:
        link = [] if self.h2d_gb_per_s is None else [f"at {gb(self.h2d_gb_per_s * 1e9)}/s"]
        if self.link_utilization is not None:
            link.append(f"busy {self.link_utilization:.2f} of the time")
        while_decoding = f"; while decoding {', '.join(link)}" if link else ""
        weights = f" ({gb(self.weight_bytes)} of weights)" if self.weight_bytes else ""
        kept = f"; weights of layers {gb(self.device_weight_bytes)} on the device" if self.weight_bytes else ""
        return paragraphs(
            f"first token {duration(self.ttft_s)}{self._prompt} (setup {duration(self.setup_s)} apart), {self._steps}, "
            f"{self.tokens_per_s:.1f} tokens/s while decoding",
            f"link ({self.link_name}): {gb(self.h2d_bytes)} to the device{weights}, {gb(self.d2h_bytes)} back"
            f"{while_decoding}",
            f"plan: {self.plan.in_words}; host {self._host}{kept}; K/V {self._precision}",
            *self._drafts,
            f"verdict: {self._verdict}",
        )

    @property
    def _prompt(self) -> str:
        """What the first token waited for: tokens of the prompt that were read, and those that a cache had already."""
        read = counted(self.prompt_tokens - self.cached_before_tokens, "prompt token")
        return f" after reading {read}, {count(self.cached_before_tokens)} were cached before"

    @property
    def _steps(self) -> str:
        step_s = self.decode_step_s_p50
        if step_s is None:
            return "no decode step"
        predicted = f", predicted {duration(self.predicted_step_s)}" if self.predicted_step_s else ""
        if self.draft_acceptance is None:
            return f"step {duration(step_s)} (median{predicted})"
        seen = "the newest tokens" if self.draft_cache == "window" else f"{self.draft_cache} copies of all blocks"
        return (
            f"round {duration(step_s)} (median{predicted}; {self.draft_acceptance:.2f} of the drafts from {seen} "
            "accepted)"
        )

    @property
    def _host(self) -> str:
        if self.cache_host_bytes >= self.host_bytes:
            return gb(self.host_bytes)
        return f"{gb(self.cache_host_bytes)}, of {gb(self.host_bytes)} of all caches"

    @property
    def _drafts(self) -> list[str]:
        """Why there were none, as a paragraph; nothing where there were some, or no step to draft for."""
        if self.drafted_tokens or not self.decode_step_s or self.drafts_off_reason is None:
            return []
        return [f"no drafts: {self.drafts_off_reason}"]

    @property
    def _precision(self) -> str:
        """How exact K and V were, in words."""
        if self.lossy_form is not None:
            kept = f", {counted(self.kept_exact_blocks, 'block')} kept exact" if self.kept_exact_blocks else ""
            return f"not exact: stored as {FORMS[self.lossy_form].label}{kept}"
        if not self.exact:
            return "recomputed in half precision"
        return f"exact, {self.packed_fraction:.2f} of the blocks packed" if self.packed_fraction else "exact"

    @property
    def _verdict(self) -> str:
        """How the steps compare; else why they cannot be compared, and what would change that."""
        if self.token_s is None:
            return "none, no decode step was run: the first token comes from the prefill, generate more"
        if self.slowdown is None:
            return self._beside_full_transfer(self.token_s)
        is_measured = self.measured_plain_step_s is not None
        plain = beside_plain(self.slowdown, 1.0, is_measured=is_measured, fits=bool(self.fits_on_device))
        if is_measured:
            plain += f" ({duration(self.token_s)} a token with, {duration(self.measured_plain_step_s or 0)} without)"
        if not self.h2d_bytes:
            return f"{plain}; {self._nothing_crossed}"
        if not self.plan.full_transfer_step_s:
            return plain
        return f"{plain}; {self._beside_full_transfer(self.token_s)}"

    @property
    def _nothing_crossed(self) -> str:
        """Why no byte of the cache came over the link."""
        if self.d2h_bytes:
            return "nothing had to come back over the link in so few tokens"
        return "nothing crossed the link: the whole cache stayed on the device"

    def _beside_full_transfer(self, token_s: float) -> str:
        full = self.plan.full_transfer_step_s
        many = "" if self.lossy_form is None else f"with {FORMS[self.lossy_form].label} (not exact), "
        if self.draft_acceptance is not None:
            many += f"{self.tokens_per_pass:.1f} tokens per pass, "
        fits = "; weights and cache fit on the device: try it without offloading" if self.fits_on_device else ""
        if not self.h2d_bytes:
            return f"none, {self._nothing_crossed}{fits}"
        if not full and not self.link_has_speed:
            return (
                "none, this link copies as fast as it can and has no speed to predict with. Without a GPU the cache is "
                "in host memory anyway, and offloading gains nothing: this shows that it works. To see a plan give the "
                f"link a speed: link=kvoffload.EmulatedLink(h2d_gb_per_s=...), or --link-gb-per-s{fits}"
            )
        if not full:
            return (
                "none, a given split needs no prediction and none was made: split='auto' makes one, or name a "
                f"profile=...{fits}"
            )
        if not many and self.plan.is_full_transfer:
            slow = token_s >= SLOW * full and (self.link_utilization or 1.0) < 0.5
            cause = ": the link was mostly idle, so that the device or other work on it was the limit" if slow else ""
            return (
                f"this is full transfer itself, a step took {token_s / full:.2f} times the predicted {duration(full)}"
                f"{cause}"
            )
        return f"{many}{beside_full_transfer(token_s, full)}"
