"""Whether offloading helps with a task, and what to do where it does not: one word and one number.

Owns the judgement over the ways of a task. Does not own the ways' figures (`comparison`) nor the recommendation in
sentences (`advice`).

Offloading is what it is with verified drafts, at the acceptance that the task assumes, where these gain something.
The gain is over the *best* alternative: everything on the device, sub-batches there, or full transfer, which is
offloading without a plan. What gains less than `LEAST_GAIN` is not worth another cache.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from kvoffload.advise.comparison import WayFigures, compare_ways
from kvoffload.advise.streaming import best_batch, quantised_way, streams_weights
from kvoffload.advise.task import Task
from kvoffload.advise.ways import LEAST_GAIN, best_of

Answer = Literal[
    "faster",  # offload: nothing else is as fast
    "only way",  # offload: nothing else works, but planning gains nothing over full transfer
    "fits",  # no: run generate() as it is
    "parts",  # no: run the batch in parts, unless it must stay together
    "stream",  # yes, with a batch that pays for it: weights do not fit, and cross the link in every forward
    "weights",  # no: not even the least of the weights and the prefill leave room
    "nothing",  # no: it works in no way
]


class Verdict(NamedTuple):
    """What to do with a task."""

    answer: Answer
    gain: float = 0.0  # of offloading over the best alternative, in tokens/s; 0 where it does not work
    gain_together: float = 0.0  # the same where the batch must stay together
    parts: int = 1  # of the batch, where it is run on the device in parts
    tokens_per_s: float = 0.0  # of the workload, where weights are streamed
    best_batch: int = 0  # with which these are close to the most there can be
    best_tokens_per_s: float = 0.0
    quantised_tokens_per_s: float = 0.0  # of the workload in 4-bit weights that fit; 0: they do not
    reason: str = ""  # where nothing works


def judge(task: Task) -> Verdict:
    """The verdict on `task`."""
    if not task.has_room(task.workload.num_beams):
        return Verdict("weights", reason="weights and the prefill leave no room on the device")
    rows = compare_ways(task)
    found = of_rows(rows)
    if found.answer not in ("faster", "only way") or not streams_weights(task):
        return found
    rate = max(row.tokens_per_s for row in rows if row.name in ("offload", "drafts"))
    best = best_batch(task, beside_quantised=False)
    quantised = quantised_way(task)
    return found._replace(
        answer="stream",
        tokens_per_s=rate,
        best_batch=0 if best is None else best.batch,
        best_tokens_per_s=0.0 if best is None else best.found.tokens_per_s,
        quantised_tokens_per_s=0.0 if quantised is None else quantised.tokens_per_s,
    )


def of_rows(rows: tuple[WayFigures, ...]) -> Verdict:
    """The verdict on the ways of one task."""
    works = {row.name: row for row in rows if not row.problem}
    if "on_device" in works:
        return Verdict("fits", gain=1.0, gain_together=1.0)
    offload, parts, full = (works.get(name) for name in ("offload", "sub_batches", "full_transfer"))
    drafts = works.get("drafts")
    if drafts is not None and offload is not None and drafts.total_s < offload.total_s:
        offload = drafts
    if offload is None:
        if parts is not None:
            return Verdict("parts", parts=parts.runs)
        return Verdict("nothing", reason=next(row.problem for row in rows if row.name == "offload"))
    gain_together = _gain(offload, full)
    gain = min(gain_together, _gain(offload, parts))
    if parts is not None and best_of({"sub_batches": parts.total_s, "offload": offload.total_s}) == "sub_batches":
        return Verdict("parts", gain, gain_together, parts.runs)
    return Verdict("faster" if gain >= LEAST_GAIN else "only way", gain, gain_together)


def _gain(offload: WayFigures, other: WayFigures | None) -> float:
    """Infinite over what does not work."""
    return float("inf") if other is None else offload.tokens_per_s / other.tokens_per_s
