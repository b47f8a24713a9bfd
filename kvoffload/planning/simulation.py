"""Decode steps played chunk by chunk: one link, one compute queue, the host ahead of both, and finite slots.

Owns the recurrence over chunks, layers and steps, which knows what the formulas of `step_time` leave out: when a slot
is free, and who waits for whom. Does not own rates (`rates`), the choice (`planner`), nor what is made of the stretches
it records (`timeline`). Plain numbers, no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kvoffload.planning.chunk_order import transfer_order
from kvoffload.planning.forms import FORMS
from kvoffload.planning.placement import PLAIN, FormName
from kvoffload.planning.plan import Plan
from kvoffload.planning.rates import Rates
from kvoffload.timeline import Lane, Span


class Simulation(NamedTuple):
    """A step in the steady state, as `simulate` sees it."""

    step_s: float
    link_busy_fraction: float
    device_busy_fraction: float


def simulate(
    plan: Plan,
    rates: Rates,
    *,
    overlap: bool = True,
    num_steps: int = 6,
    record: Callable[[Span], None] | None = None,
) -> Simulation:
    """Play `num_steps` decode steps chunk by chunk and return the average of the later half.

    One link and one compute stream, each in order. Per layer: weights if streamed, then its chunks in
    `transfer_order`; the next layer's right behind them, layer 0 of the next step during the gap. A chunk that is not
    plain K and V needs a free slot (free when its recomputation ended), plain ones one of two layer buffers (free when
    attention of the layer two before ended); where attention takes chunks one by one every chunk needs a slot, free
    when it was attended to. Compute of a layer begins when the host has issued it. Each chunk is computed when it has
    arrived, and behind it a share of the resident blocks (where a whole layer is put together: of the recomputation of
    those stored as activations). The rest of the layer's attention and the dense part follow; after the last layer the
    head, then the gap.

    `plan.schedule == "kvpr"`: copies of a layer with activations start after attention of the layer before, and its
    recomputation when its whole activation has arrived, or as much of it as the slots hold.

    Args:
        plan: the placement.
        rates: the machine, e.g. newer measurements than the plan was made with.
        overlap: False makes copies and compute wait for each other.
        num_steps: steps played, at least 2; the pipeline fills in the first half.
        record: called with every stretch of link and compute, and at each step's start (`timeline.assemble` takes
            them). Resident activations count as "recompute", the head as "dense".
    """
    num_layers = max(1, plan.num_offloaded_layers)
    ordinary = plan.num_layers / num_layers  # layers per offloaded one, for work that all layers do
    work_s = {form: rates.restore_s_per_token.get(form, 0.0) for form in FORMS if form != PLAIN}
    # decoded while attention reads, where it takes chunks one by one
    read_s = {form: seconds for form, seconds in work_s.items() if FORMS[form].is_encoded and plan.is_segmented}
    restore_s = {form: 0.0 if form in read_s else work_s.get(form, 0.0) for form in FORMS}
    chunks = [chunk for kind, n in plan.placed.items() if kind.tier == "host" for chunk in _chunks(kind.form, n, plan)]
    plain_chunks = [chunk for chunk in chunks if chunk.form == PLAIN]
    other_chunks = [chunk for chunk in chunks if chunk.form != PLAIN]
    kvpr = plan.schedule == "kvpr" and bool(other_chunks)
    order = transfer_order(len(other_chunks), len(plain_chunks), plan.schedule)
    weights_s = rates.weights_s(plan.weight_bytes_per_step) / num_layers
    resident_s = plan.block_tokens * sum(
        n * restore_s[kind.form] for kind, n in plan.placed.items() if kind.tier == "device"
    )
    attention_s = plan.num_blocks * plan.block_tokens * rates.attention_s_per_token
    num_chunks = len(chunks)
    resident_attention_s = plan.block_tokens * sum(
        n * (rates.attention_s_per_token + read_s.get(kind.form, 0.0))
        for kind, n in plan.placed.items()
        if kind.tier == "device"
    )
    chunks_issue_s = num_chunks * rates.host_s_per_chunk
    issue_s = plan.num_micro_batches * (ordinary * rates.host_s_per_layer + chunks_issue_s)

    link = compute = host = 0.0  # when each is free
    link_busy = compute_busy = 0.0
    released = [0.0] * plan.num_slots  # when the slot of each chunk that needs one became free, in order
    num_copied = 0  # of these: the next one takes over the slot released[num_copied]
    first_gate = min(len(other_chunks), plan.num_slots) - 1 if kvpr else 0  # last chunk to await before the first
    attended = deque([0.0, 0.0], maxlen=2)  # the two layer buffers, older first
    weights_used = deque([0.0, 0.0], maxlen=2)

    def copy(seconds: float, free_s: float, num_bytes: float, lane: Lane = "h2d") -> float:
        nonlocal link, link_busy
        barrier_s = attended[-1] if kvpr else 0.0
        start = max(link, free_s, barrier_s, 0.0 if overlap else max(compute, host))
        link = start + seconds
        link_busy += seconds
        if record is not None and seconds:
            record(Span(lane, start, link, round(num_bytes)))
        return link

    def work(lane: Lane, seconds: float, ready_s: float) -> float:
        nonlocal compute, compute_busy
        start = max(compute, ready_s, 0.0 if overlap else link)
        if record is not None and start > compute:
            record(Span("wait", compute, start))
        compute = start + seconds
        compute_busy += seconds
        if record is not None and seconds:
            record(Span(lane, start, compute))
        return compute

    def copy_chunk(chunk: _Chunk, free_s: float) -> float:
        num_bytes = chunk.tokens * plan.bytes_per_token[chunk.form]
        return copy(num_bytes / rates.h2d_bytes_per_s[chunk.form], free_s, num_bytes)

    def restore(done: int, arrived: list[float]) -> int:
        """All chunks of the layer that have been copied, each followed by its share of the resident blocks."""
        for idx in range(done, len(arrived)):
            gate = min(max(idx, first_gate), len(arrived) - 1)
            chunk = other_chunks[idx]
            released.append(work("recompute", chunk.tokens * restore_s[chunk.form], arrived[gate]))
            work("recompute", resident_s / len(other_chunks), 0.0)
        return len(arrived)

    def attend_chunks() -> None:
        """All chunks of a layer through slots, each attended to when it is there; then the rest of its attention."""
        nonlocal num_copied
        turns = {True: iter(other_chunks), False: iter(plain_chunks)}
        for is_other in order:
            chunk = next(turns[is_other])
            there_s = copy_chunk(chunk, released[num_copied])
            num_copied += 1
            if restore_s[chunk.form]:
                there_s = work("recompute", chunk.tokens * restore_s[chunk.form], there_s)
            attend_s = rates.attention_s_per_token + read_s.get(chunk.form, 0.0)
            released.append(work("attention", chunk.tokens * attend_s, there_s))
            work("recompute", resident_s / num_chunks, 0.0)
            work("attention", resident_attention_s / num_chunks, 0.0)
        if not num_chunks:
            work("recompute", resident_s, host)
            work("attention", resident_attention_s, 0.0)

    marks = []
    for _ in range(num_steps):
        if record is not None:
            record(Span("step", compute, compute))
        for _ in range(num_layers):
            host += issue_s
            weights_arrived = copy(weights_s, weights_used[0], plan.weight_bytes_per_step / num_layers, "weights")
            arrived: list[float] = []  # of the other chunks
            plain_arrived, num_plain = 0.0, 0
            restored = 0
            if plan.is_segmented:
                work("recompute", 0.0, host)
                attend_chunks()
                weights_used.append(work("dense", ordinary * rates.dense_s, weights_arrived))
                continue
            work("recompute", 0.0 if other_chunks else resident_s, host)
            for is_other in order:
                if is_other:
                    if num_copied >= len(released):  # its slot is freed by a chunk of this layer
                        restored = restore(restored, arrived)
                    arrived.append(copy_chunk(other_chunks[len(arrived)], released[num_copied]))
                    num_copied += 1
                    if len(arrived) - 1 >= first_gate:
                        restored = restore(restored, arrived)
                else:
                    plain_arrived = copy_chunk(plain_chunks[num_plain], attended[0])
                    num_plain += 1
            restore(restored, arrived)
            attended.append(work("attention", attention_s, plain_arrived))
            weights_used.append(work("dense", ordinary * rates.dense_s, weights_arrived))
        host = work("dense", rates.head_s, 0.0) + rates.gap_s  # the host waits for the sampled token
        marks.append((compute, link_busy, compute_busy))
    if record is not None:
        record(Span("end", compute, compute))

    counted = num_steps // 2
    seconds, copied_s, worked_s = (b - a for a, b in zip(marks[-counted - 1], marks[-1], strict=True))
    if seconds <= 0:
        return Simulation(0.0, 0.0, 0.0)
    return Simulation(seconds / counted, copied_s / seconds, worked_s / seconds)


class _Chunk(NamedTuple):
    form: FormName
    tokens: int


def _chunks(form: FormName, blocks: int, plan: Plan) -> list[_Chunk]:
    """Chunks of one layer and form; the last one may be shorter."""
    starts = range(0, blocks, plan.chunk_blocks)
    return [_Chunk(form, min(plan.chunk_blocks, blocks - start) * plan.block_tokens) for start in starts]
