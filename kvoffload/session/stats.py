"""What one `generate()` call did: times, bytes, and the verdict. Plain data; measuring is the session's work."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

from kvoffload.planning.drafts import RoundTimes
from kvoffload.planning.forms import FORMS
from kvoffload.planning.placement import PLAIN
from kvoffload.planning.plan import Plan
from kvoffload.units import counted, duration, gb


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStats:
    """Statistics of the last `generate()` of a session. Decode figures leave out the prefill.

    `exact` is True when the K/V that attention saw were the model's own bit for bit, or recomputed in float32;
    False when K/V were recomputed in half precision, where the last bit may differ, or stored with loss.
    """

    setup_s: float  # allocating and pinning memory, measuring; in no other figure
    prefill_s: float
    ttft_s: float  # time to first token
    tpot_s: float | None  # time per output token after the first
    decode_step_s: list[float]
    tokens_per_s: float  # of all sequences, decode only
    h2d_bytes: int
    d2h_bytes: int
    h2d_gb_per_s: float | None  # while the link was copying, decode only
    link_utilization: float | None  # share of the decode time in which the link was copying to the device
    recompute_s: float
    recomputed_tokens: int  # sum over steps, layers and rows
    exposed_wait_s: float  # time compute waited for the link
    device_busy_fraction: float | None  # share of the decode time in which compute waited for neither link nor host
    plan: Plan
    predicted_step_s: float | None
    fraction_of_bound: float | None  # predicted over measured median step: 1 is the bound of the cost model
    prediction_error_fraction: float | None  # measured median over predicted step, minus 1: above 0 is slower
    host_bytes: int
    pinned_bytes: int
    device_kv_peak_decode_bytes: int
    device_kv_peak_prefill_bytes: int
    exact: bool
    lossy_form: str | None = None  # the coarsest form with loss that blocks were stored in, such as "int4"
    kept_exact_blocks: int = 0  # that such a form could not hold: not finite. Over all layers
    weight_bytes: int = 0  # of streamed layers, over the link; among `h2d_bytes`
    device_weight_bytes: int = 0  # of decoder layers that stay on the device, and slabs for those that do not
    packed_fraction: float = 0.0  # of the stored blocks, those that are packed without loss
    tokens_per_pass: float | None = None  # over the link; 1 without drafts, None without decode steps
    draft_acceptance: float | None = None  # of the tokens drafted, the share that was asked for
    # the share of rounds in which the first draft was accepted, the first two, ...
    draft_survivals: list[float] = field(default_factory=list)
    drafted_tokens: int = 0  # of each sequence
    round_times: RoundTimes | None = None  # what rounds of drafts were planned to take; None without a prediction
    draft_s: float = 0.0  # spent on drafts, in the decode steps
    draft_cache: str | None = None  # what drafts read beside residents: "window", or "int4" for copies of all blocks
    drafts_off_reason: str | None = None  # why speculate="auto" decoded one by one; None where it did not, or was off
    link_name: str = ""
    link_has_speed: bool = True  # False: an emulated link that copies as fast as it can

    @property
    def decode_step_s_p50(self) -> float | None:
        """Median decode step."""
        return statistics.median(self.decode_step_s) if self.decode_step_s else None

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "plan"}
        data["plan"] = self.plan.to_json()
        data["round_times"] = None if self.round_times is None else dataclasses.asdict(self.round_times)
        data["decode_step_s_p50"] = self.decode_step_s_p50
        return data

    def __str__(self) -> str:
        step = self.decode_step_s_p50
        step_text = "no decode step" if step is None else f"step {duration(step)} (median)"
        if step is not None and self.draft_acceptance is not None:
            seen = "the newest tokens" if self.draft_cache == "window" else f"{self.draft_cache} copies of all blocks"
            step_text = (
                f"round {duration(step)} (median, {self.draft_acceptance:.2f} of the drafts from {seen} accepted)"
            )
        link = "" if self.h2d_gb_per_s is None else f" at {gb(self.h2d_gb_per_s * 1e9)}/s"
        busy = "" if self.link_utilization is None else f", busy {self.link_utilization:.2f} of the time"
        weights = f" ({gb(self.weight_bytes)} of weights)" if self.weight_bytes else ""
        plan = self.plan
        resident = plan.count(tier="device")
        return "\n".join(
            [
                f"first token {duration(self.ttft_s)} (setup {duration(self.setup_s)} apart), {step_text}, "
                f"{self.tokens_per_s:.1f} tokens/s",
                f"link ({self.link_name}): {gb(self.h2d_bytes)} to the device{weights}{link}{busy}, "
                f"{gb(self.d2h_bytes)} back",
                f"plan: {_moved(plan)}; {resident} of {counted(plan.num_blocks, 'block')} "
                f"{'stays' if resident == 1 else 'stay'} on the device; host {gb(self.host_bytes)}; K/V "
                + self._precision,
                self._verdict(step),
            ]
        )

    @property
    def _precision(self) -> str:
        """How exact K and V were, in words."""
        if self.lossy_form is not None:
            kept = f", {counted(self.kept_exact_blocks, 'block')} kept exact" if self.kept_exact_blocks else ""
            return f"not exact: stored as {FORMS[self.lossy_form].label}{kept}"
        if not self.exact:
            return "recomputed in half precision"
        return f"exact, {self.packed_fraction:.2f} of the blocks packed" if self.packed_fraction else "exact"

    def _verdict(self, step_s: float | None) -> str:
        """How the steps compare with full transfer; else why they cannot be compared, and what would change that."""
        full = self.plan.full_transfer_step_s
        many = "" if self.lossy_form is None else f"with {FORMS[self.lossy_form].label} (not exact), "
        if self.draft_acceptance is not None and self.tpot_s is not None:
            step_s, many = self.tpot_s, many + f"{self.tokens_per_pass:.1f} tokens per pass, "
        if step_s is None:
            return "verdict: none, no decode step was run: the first token comes from the prefill, generate more"
        if not self.h2d_bytes:
            return "verdict: none, nothing crossed the link: the whole cache stayed on the device"
        if not full and not self.link_has_speed:
            return (
                "verdict: none, this link copies as fast as it can and has no speed to predict with: give it one with "
                "link=kvoffload.EmulatedLink(h2d_gb_per_s=...), or --link-gb-per-s"
            )
        if not full:
            return (
                "verdict: none, a given split needs no prediction and none was made: split='auto' makes one, or name a "
                "profile=..."
            )
        if not many and self.plan.count(tier="host", form=PLAIN) == self.plan.num_blocks:
            took = f"{step_s / full:.2f} times the predicted {duration(full)}"
            return f"verdict: this is full transfer itself, a step took {took}"
        return f"verdict: {many}{full / step_s:.2f}x as fast as the predicted full transfer ({duration(full)} a step)"


def _moved(plan: Plan) -> str:
    """In which form the offloaded tokens cross the link, in words."""
    shares = {form: share for form, share in plan.shares.items() if share}
    if not plan.count(tier="host"):
        return "nothing crosses the link"
    if not shares:
        return "offloaded tokens cross as K/V, none is recomputed"
    if not plan.count(tier="host", form=PLAIN) and len(shares) == 1:
        form = FORMS[next(iter(shares))]
        return f"offloaded tokens cross as {form.label}" + (", all are recomputed" if form.is_recomputed else "")
    parts = [
        f"{share:.2g} of the offloaded tokens cross as {FORMS[form].label}"
        + (" and are recomputed" if FORMS[form].is_recomputed else "")
        for form, share in shares.items()
    ]
    return ", ".join([*parts, "the rest as K/V"])
