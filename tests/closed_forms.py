"""The cost model as formulas with the names of today's four places, written by hand. Not a test module.

An oracle for `kvoffload/planning/step_time.py`, which sums the rows of a table and knows no place by name.
"""

from __future__ import annotations

from typing import NamedTuple

from kvoffload.config import Schedule
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.plan import Constraint


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
    ring_s = inputs.ring_bytes / rates.h2d_bytes_per_s["kv"]  # how far the link can run ahead between steps
    return Terms(
        activation_link_s=layer_tokens * inputs.bytes_per_token["activation"] / rates.h2d_bytes_per_s["activation"],
        kv_link_s=layer_tokens * inputs.bytes_per_token["kv"] / rates.h2d_bytes_per_s["kv"],
        link_fixed_s=inputs.weight_bytes_per_step / rates.h2d_bytes_per_s["kv"] + max(0.0, rates.gap_s - ring_s),
        recompute_s=layer_tokens * rates.restore_s_per_token["activation"],  # L * gamma_r
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
    the ring covers the gap between steps.
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
    weights_s = inputs.weight_bytes_per_step / inputs.rates.h2d_bytes_per_s["kv"]
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
    fitting = max(0, resident_capacity_bytes(inputs)) // max(1, inputs.bytes_per_token["kv"])
    r = min(inputs.num_blocks, fitting)
    return predict_step_s(inputs, r, 0, 0, inputs.num_blocks - r)[0]


def device_bytes(inputs: PlanInputs, r: int, r_x: int) -> int:
    """Bytes held on the device: working buffers plus `r` kv and `r_x` activation blocks of every offloaded layer."""
    per_token = inputs.bytes_per_token["kv"] * r + inputs.bytes_per_token["activation"] * r_x
    return inputs.fixed_device_bytes + inputs.num_offloaded_layers * inputs.block_tokens * per_token


def host_bytes(inputs: PlanInputs, x: int, t: int) -> int:
    """Bytes of host memory for `x` activation and `t` kv blocks of every offloaded layer."""
    per_token = inputs.bytes_per_token["activation"] * x + inputs.bytes_per_token["kv"] * t
    return inputs.num_offloaded_layers * inputs.block_tokens * per_token
