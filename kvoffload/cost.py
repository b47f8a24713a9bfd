"""The cost model: seconds of one decode step and bytes of memory, for a placement of the cached blocks.

Owns every formula between measured rates and a predicted step: the three terms of the planning problem
(link, device, host), the paper's schedule, memory use, rates from a hardware profile, and the simulation of one
step chunk by chunk. Does not own the choice (`planner`) nor any measurement (`profiler/`). Plain numbers, no torch.

Source: KVPR (arXiv 2411.17089) for splitting the cache between transfer and recomputation; section 7 of the design
for the terms, which differ from the paper's formula by having no barrier between layers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kvoffload.errors import ProfileError
from kvoffload.hardware_profile import HardwareProfile
from kvoffload.timeline import Lane, Span
from kvoffload.types import Constraint, ModelShape, Plan, PlanInputs, Rates, Schedule

CHUNK_SPEED_FRACTION = 0.95
HOST_TIME_FRACTION = 0.25  # of a chunk's copy, that the host may take to issue the chunk
LARGEST_CHUNK_BYTES = 32 * 2**20


class Terms(NamedTuple):
    """The cost model of one instance: seconds per step, all layers together; a "block" is one of every layer."""

    activation_link_s: float  # per block of x
    kv_link_s: float  # per block of t
    link_fixed_s: float
    recompute_s: float  # per block of x + r_x
    attention_s: float
    device_fixed_s: float  # attention included
    chunk_host_s: float  # per chunk of every layer
    host_fixed_s: float
    chunk_blocks: int
    schedule: Schedule

    def link_s(self, x: int, t: int) -> float:
        """When the link has moved `x` activation and `t` kv blocks; see `link_s` below."""
        return self.link_fixed_s + self.activation_link_s * x + self.kv_link_s * t

    def schedule_s(self, x: int, t: int) -> float:
        """`link_s`, and for "kvpr" what its barrier adds; see `predict_step_s`."""
        seconds = self.link_s(x, t)
        if self.schedule == "kvpr" and x:
            seconds += max(0.0, self.recompute_s * x - self.kv_link_s * t)  # recomputation outlasting the kv transfer
            seconds += self.attention_s
        return seconds

    def device_s(self, recomputed: int) -> float:
        """When the device has recomputed `x + r_x` blocks and done the rest."""
        return self.device_fixed_s + self.recompute_s * recomputed

    def host_s(self, x: int, t: int) -> float:
        """When the host has issued everything."""
        num_chunks = -(-x // self.chunk_blocks) - (-t // self.chunk_blocks)  # both rounded up
        return self.host_fixed_s + self.chunk_host_s * num_chunks

    def step_s(self, r_x: int, x: int, t: int) -> tuple[float, Constraint]:
        """The longest of the three, and which it is; see `predict_step_s`."""
        link, device, host = self.schedule_s(x, t), self.device_s(x + r_x), self.host_s(x, t)
        if link >= device and link >= host:
            return link, "link"
        return (device, "device") if device >= host else (host, "host")


def terms(inputs: PlanInputs) -> Terms:
    """The coefficients of `inputs`; every other function here is a sum of them.

    Streamed weights cross the link once per step for all micro-batches, so `num_micro_batches` does not multiply
    them; the host issues layers and chunks once per micro-batch.
    """
    rates = inputs.rates
    layer_tokens = inputs.num_offloaded_layers * inputs.block_tokens  # L * tokens of a block
    attention_s = layer_tokens * inputs.num_blocks * rates.attention_s_per_token  # L * s * gamma_a
    ring_s = inputs.ring_bytes / rates.h2d_kv_bytes_per_s  # how far the link can run ahead between steps
    return Terms(
        activation_link_s=layer_tokens * inputs.activation_bytes_per_token / rates.h2d_activation_bytes_per_s,
        kv_link_s=layer_tokens * inputs.kv_bytes_per_token / rates.h2d_kv_bytes_per_s,
        link_fixed_s=inputs.weight_bytes_per_step / rates.h2d_kv_bytes_per_s + max(0.0, rates.gap_s - ring_s),
        recompute_s=layer_tokens * rates.recompute_s_per_token,  # L * gamma_r
        attention_s=attention_s,
        device_fixed_s=inputs.num_layers * rates.dense_s + rates.head_s + attention_s,  # N * t_dense + t_head
        chunk_host_s=inputs.num_offloaded_layers * inputs.num_micro_batches * rates.host_s_per_chunk,  # L * o_chunk
        host_fixed_s=inputs.num_layers * inputs.num_micro_batches * rates.host_s_per_layer,  # N * o_layer
        chunk_blocks=inputs.chunk_blocks,
        schedule=inputs.schedule,
    )


def link_s(inputs: PlanInputs, x: int, t: int) -> float:
    """Seconds the link needs for one step with `x` activation and `t` kv blocks per layer.

    `L*(beta_x*x/B_x + beta_kv*t/B_kv) + weights/B_kv + max(0, t_gap - ring_bytes/B_kv)`; the last part is zero where
    the ring is sized as the design says.
    """
    return terms(inputs).link_s(x, t)


def device_s(inputs: PlanInputs, r_x: int, x: int) -> float:
    """Seconds the device computes in one step: `N*t_dense + t_head + L*(gamma_r*(x + r_x) + gamma_a*s)`."""
    return terms(inputs).device_s(x + r_x)


def host_s(inputs: PlanInputs, x: int, t: int) -> float:
    """Seconds the host needs to issue one step: `N*o_layer + o_chunk*num_chunks(x, t)`, chunks of all layers."""
    return terms(inputs).host_s(x, t)


def predict_step_s(inputs: PlanInputs, r: int, r_x: int, x: int, t: int) -> tuple[float, Constraint]:
    """Seconds of one step when everything overlaps that may: the longest of link, device and host.

    With `schedule="kvpr"` and x > 0 the link term is the paper's formula plus attention, for which the next layer's
    activations wait: `L*(beta_x*x/B_x + max(gamma_r*x, beta_kv*t/B_kv) + gamma_a*s)`, plus the fixed part of `link_s`
    (the dense part of a layer overlaps with the next layer's activations). It assumes slots for a whole activation.

    Args:
        inputs: the instance.
        r: resident kv blocks per layer; they cost memory only.
        r_x: resident activation blocks per layer, recomputed in every step.
        x: blocks per layer transferred as activations.
        t: blocks per layer transferred as K/V.

    Returns:
        Seconds, and which of "link", "device", "host" is the longest (the first of them when equal).
    """
    assert r + r_x + x + t == inputs.num_blocks, "every cached block has one place"
    return terms(inputs).step_s(r_x, x, t)


def sequential_step_s(inputs: PlanInputs, r_x: int, x: int, t: int) -> float:
    """Seconds of one step with `overlap=False`: copies, the gap between steps and compute, one after another."""
    gap_s = inputs.rates.gap_s
    c = terms(inputs)
    weights_s = inputs.weight_bytes_per_step / inputs.rates.h2d_kv_bytes_per_s
    in_turn = c.activation_link_s * x + c.kv_link_s * t + weights_s + gap_s + device_s(inputs, r_x, x)
    return max(in_turn, host_s(inputs, x, t))


def resident_capacity_bytes(inputs: PlanInputs) -> int:
    """The largest `beta_kv*r + beta_x*r_x` that fits beside the working buffers; negative if not even those fit."""
    layer_tokens = max(1, inputs.num_offloaded_layers * inputs.block_tokens)
    return (inputs.device_bytes - inputs.fixed_device_bytes) // layer_tokens


def host_capacity_bytes(inputs: PlanInputs) -> int:
    """The largest `beta_x*x + beta_kv*t` that fits, bytes per token of one layer as above."""
    return inputs.host_bytes // max(1, inputs.num_offloaded_layers * inputs.block_tokens)


def full_transfer_step_s(inputs: PlanInputs) -> float:
    """Predicted seconds of plain full transfer (x = r_x = 0) with as many kv blocks resident as fit.

    The reference every plan is compared with, so stored blocks and the host limit are left out of account.
    """
    fitting = max(0, resident_capacity_bytes(inputs)) // max(1, inputs.kv_bytes_per_token)
    r = min(inputs.num_blocks, fitting)
    return predict_step_s(inputs, r, 0, 0, inputs.num_blocks - r)[0]


def device_bytes(inputs: PlanInputs, r: int, r_x: int) -> int:
    """Bytes held on the device: working buffers plus `r` kv and `r_x` activation blocks of every offloaded layer."""
    per_token = inputs.kv_bytes_per_token * r + inputs.activation_bytes_per_token * r_x
    return inputs.fixed_device_bytes + inputs.num_offloaded_layers * inputs.block_tokens * per_token


def host_bytes(inputs: PlanInputs, x: int, t: int) -> int:
    """Bytes of host memory for `x` activation and `t` kv blocks of every offloaded layer."""
    per_token = inputs.activation_bytes_per_token * x + inputs.kv_bytes_per_token * t
    return inputs.num_offloaded_layers * inputs.block_tokens * per_token


def rates_from_profile(
    profile: HardwareProfile,
    shape: ModelShape,
    *,
    batch: int,
    block_tokens: int,
    chunk_blocks: int,
    cached_tokens: int | None = None,
) -> Rates:
    """The rates of one model at one batch on the profiled machine.

    Every curve is read at the size the runtime will use: copies and recomputation at a full chunk, the dense part at
    the batch. The dense part and the head take the longer of computing and of reading their weights. Where the device
    is the CPU the host's time is its own, and part of both.

    Args:
        profile: the machine; GEMM and attention curves are taken as measured, whatever their dtype.
        shape: the model.
        batch: sequences decoded at once (`Workload.rows`).
        block_tokens: tokens per block.
        chunk_blocks: blocks per chunk.
        cached_tokens: tokens attended per sequence; None takes the attention rate of the largest measured size, and
            one chunk per layer.

    Raises:
        ProfileError: the profile holds no link bandwidth (an unpaced emulated link).
    """
    if profile.h2d is None:
        raise ProfileError(
            f"this machine's link is {profile.link_name}, which has no bandwidth to plan with: give it one "
            "(--link-gb-per-s, EmulatedLink(h2d_gb_per_s=...)), name the hardware to plan for (--hardware, a preset or "
            "a profile), or use split='transfer'"
        )
    chunk_rows = chunk_blocks * block_tokens * batch  # tokens of all sequences in one chunk
    kv_token_bytes = batch * shape.kv_row_bytes
    kv_width = shape.num_kv_heads * shape.head_dim
    recompute_flops_per_s = profile.gemm_flops_per_s(chunk_rows, kv_width, shape.hidden_size)
    attended_bytes = profile.attention.points[-1].x[0] if profile.attention.points else 0.0
    if cached_tokens is not None:
        attended_bytes = cached_tokens * kv_token_bytes

    layer_weights = shape.dense_flops // 2  # multiply-add
    head_weights = shape.vocab_size * shape.hidden_size
    weight_itemsize_bytes = shape.weight_bytes / (shape.num_layers * layer_weights + head_weights)

    def gemm_s(num_weights: int, n: int) -> float:
        flops_per_s = profile.gemm_flops_per_s(batch, n, shape.hidden_size)
        read_s = num_weights * weight_itemsize_bytes / profile.device_copy_bytes_per_s
        return max(2 * batch * num_weights / flops_per_s, read_s)

    dense_s, head_s = gemm_s(layer_weights, shape.intermediate_size), gemm_s(head_weights, shape.vocab_size)
    if profile.emulated_link:  # nothing is issued ahead of a CPU
        num_chunks = max(1, math.ceil((cached_tokens or 0) / (chunk_blocks * block_tokens)))
        dense_s += profile.host_s_per_layer + num_chunks * profile.host_s_per_chunk
        head_s += profile.gap_s
    return Rates(
        h2d_activation_bytes_per_s=profile.h2d.rate(chunk_rows * shape.activation_row_bytes),
        h2d_kv_bytes_per_s=profile.h2d.rate(chunk_rows * shape.kv_row_bytes),
        recompute_s_per_token=batch * shape.recompute_flops / recompute_flops_per_s,
        attention_s_per_token=kv_token_bytes / profile.attention.rate(attended_bytes),
        dense_s=dense_s,
        head_s=head_s,
        gap_s=profile.gap_s,
        host_s_per_layer=profile.host_s_per_layer,
        host_s_per_chunk=profile.host_s_per_chunk,
    )


def least_chunk_bytes(profile: HardwareProfile, shape: ModelShape, *, recomputes: bool) -> int:
    """K/V bytes of the smallest chunk that keeps link, recomputation and host out of each other's way.

    That is a power of two at which the link and the GEMM of recomputation reach `CHUNK_SPEED_FRACTION` of their speed
    at `LARGEST_CHUNK_BYTES`, and the host's time per chunk is at most `HOST_TIME_FRACTION` of the copy's; where the
    device is the CPU, and has to do both, at most what the fraction leaves.

    Args:
        profile: the machine.
        shape: the model.
        recomputes: whether activations may be stored at all.
    """

    host_fraction = 1 - CHUNK_SPEED_FRACTION if profile.emulated_link else HOST_TIME_FRACTION

    def is_fast(num_bytes: int) -> bool:
        if profile.h2d is not None and profile.host_s_per_chunk > host_fraction * profile.h2d.seconds(num_bytes):
            return False
        rates = [] if profile.h2d is None else [profile.h2d.rate]
        if recomputes:
            n, k = shape.num_kv_heads * shape.head_dim, shape.hidden_size
            rates.append(lambda size: profile.gemm_flops_per_s(max(1, int(size // shape.kv_row_bytes)), n, k))
        return all(rate(num_bytes) >= CHUNK_SPEED_FRACTION * rate(LARGEST_CHUNK_BYTES) for rate in rates)

    sizes = (2**exponent for exponent in range(16, LARGEST_CHUNK_BYTES.bit_length()))
    return next((num_bytes for num_bytes in sizes if is_fast(num_bytes)), LARGEST_CHUNK_BYTES)


def transfer_order(num_activation_chunks: int, num_kv_chunks: int, schedule: Schedule) -> list[bool]:
    """In which order a layer's chunks travel: True for an activation chunk, False for a kv chunk.

    Spread evenly, so that activations arrive at the pace at which they are recomputed: with all of them in front the
    link would stand still behind a full ring while kv chunks could travel. "kvpr" keeps the paper's order.
    """
    if schedule == "kvpr":
        return [True] * num_activation_chunks + [False] * num_kv_chunks
    keyed = [((idx + 0.5) / num_activation_chunks, True) for idx in range(num_activation_chunks)]
    keyed += [((idx + 1) / num_kv_chunks, False) for idx in range(num_kv_chunks)]
    return [is_activation for _, is_activation in sorted(keyed, key=lambda item: (item[0], not item[1]))]


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
    `transfer_order`; the next layer's right behind them, layer 0 of the next step during the gap. An activation chunk
    needs a free slot (free when its recomputation ended), kv chunks one of two layer buffers (free when attention of
    the layer two before ended); where attention takes chunks one by one every chunk needs a slot, free when it was
    attended to. A layer computes once the host has issued it: each chunk when it has arrived and a share of the
    resident blocks behind it (of their recomputation behind activation chunks, where a layer is put together), then
    the rest of its attention and the dense part; after the last layer the head, then the gap.

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
    activation_chunks = _chunk_tokens(plan.activation_blocks, plan)
    kv_chunks = _chunk_tokens(plan.kv_blocks, plan)
    kvpr = plan.schedule == "kvpr" and bool(activation_chunks)
    order = transfer_order(len(activation_chunks), len(kv_chunks), plan.schedule)
    activation_s = plan.activation_bytes_per_token / rates.h2d_activation_bytes_per_s  # on the link, per token
    kv_s = plan.kv_bytes_per_token / rates.h2d_kv_bytes_per_s
    weights_s = plan.weight_bytes_per_step / num_layers / rates.h2d_kv_bytes_per_s
    resident_s = plan.resident_activation_blocks * plan.block_tokens * rates.recompute_s_per_token
    attention_s = plan.num_blocks * plan.block_tokens * rates.attention_s_per_token
    num_chunks = len(activation_chunks) + len(kv_chunks)
    resident_tokens = plan.block_tokens * (plan.resident_kv_blocks + plan.resident_activation_blocks)
    resident_attention_s = resident_tokens * rates.attention_s_per_token
    chunks_issue_s = num_chunks * rates.host_s_per_chunk
    issue_s = plan.num_micro_batches * (ordinary * rates.host_s_per_layer + chunks_issue_s)

    link = compute = host = 0.0  # when each is free
    link_busy = compute_busy = 0.0
    released = [0.0] * plan.num_slots  # when the slot of each activation chunk became free, in order
    num_copied = 0  # activation chunks: the next one takes over the slot released[num_copied]
    first_gate = min(len(activation_chunks), plan.num_slots) - 1 if kvpr else 0  # last chunk to await before the first
    attended = deque([0.0, 0.0], maxlen=2)  # the two layer buffers, older first
    weights_used = deque([0.0, 0.0], maxlen=2)

    def copy(seconds: float, free_s: float, num_bytes: float) -> float:
        nonlocal link, link_busy
        barrier_s = attended[-1] if kvpr else 0.0
        start = max(link, free_s, barrier_s, 0.0 if overlap else max(compute, host))
        link = start + seconds
        link_busy += seconds
        if record is not None and seconds:
            record(Span("h2d", start, link, round(num_bytes)))
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

    def copy_chunk(tokens: int, is_activation: bool, free_s: float) -> float:
        if is_activation:
            return copy(tokens * activation_s, free_s, tokens * plan.activation_bytes_per_token)
        return copy(tokens * kv_s, free_s, tokens * plan.kv_bytes_per_token)

    def recompute(done: int, arrived: list[float]) -> int:
        """All chunks of the layer that have been copied, each followed by its share of the resident activations."""
        for idx in range(done, len(arrived)):
            gate = min(max(idx, first_gate), len(arrived) - 1)
            released.append(work("recompute", activation_chunks[idx] * rates.recompute_s_per_token, arrived[gate]))
            work("recompute", resident_s / len(activation_chunks), 0.0)
        return len(arrived)

    def attend_chunks() -> None:
        """All chunks of a layer through slots, each attended to when it is there; then the rest of its attention."""
        nonlocal num_copied
        chunks = {True: iter(activation_chunks), False: iter(kv_chunks)}
        for is_activation in order:
            tokens = next(chunks[is_activation])
            there_s = copy_chunk(tokens, is_activation, released[num_copied])
            num_copied += 1
            if is_activation:
                there_s = work("recompute", tokens * rates.recompute_s_per_token, there_s)
            released.append(work("attention", tokens * rates.attention_s_per_token, there_s))
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
            weights_arrived = copy(weights_s, weights_used[0], plan.weight_bytes_per_step / num_layers)
            arrived: list[float] = []  # activation chunks
            kv_arrived, num_kv = 0.0, 0
            recomputed = 0
            if plan.is_segmented:
                work("recompute", 0.0, host)
                attend_chunks()
                weights_used.append(work("dense", ordinary * rates.dense_s, weights_arrived))
                continue
            work("recompute", 0.0 if activation_chunks else resident_s, host)
            for is_activation in order:
                if is_activation:
                    if num_copied >= len(released):  # its slot is freed by a chunk of this layer
                        recomputed = recompute(recomputed, arrived)
                    arrived.append(copy_chunk(activation_chunks[len(arrived)], True, released[num_copied]))
                    num_copied += 1
                    if len(arrived) - 1 >= first_gate:
                        recomputed = recompute(recomputed, arrived)
                else:
                    kv_arrived = copy_chunk(kv_chunks[num_kv], False, attended[0])
                    num_kv += 1
            recompute(recomputed, arrived)
            attended.append(work("attention", attention_s, kv_arrived))
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


def _chunk_tokens(blocks: int, plan: Plan) -> list[int]:
    """Tokens of each chunk of one layer and form; the last one may be shorter."""
    starts = range(0, blocks, plan.chunk_blocks)
    return [min(plan.chunk_blocks, blocks - start) * plan.block_tokens for start in starts]
