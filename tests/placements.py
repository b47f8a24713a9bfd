"""Planning problems with round numbers, and plans for any placement of their blocks. Not a test module."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import closed_forms

from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.plan import Plan
from kvoffload.planning.rates import Rates

RATES = Rates(
    h2d_bytes_per_s={"activation": 80.0, "kv": 200.0},
    restore_s_per_token={"activation": 0.25},
    attention_s_per_token=0.125,
    dense_s=3.0,
    head_s=5.0,
    gap_s=0.0,
    host_s_per_layer=7.0,
    host_s_per_chunk=0.5,
)
INPUTS = PlanInputs(
    num_layers=4,
    num_offloaded_layers=3,
    num_blocks=10,
    block_tokens=2,
    bytes_per_token={"kv": 40, "activation": 20},
    rates=RATES,
    chunk_blocks=2,
    num_slots=2,
    device_bytes=10_000,
    fixed_device_bytes=1_000,
    host_bytes=10_000,
)


def changed(rates: Rates, **changes: Any) -> Rates:
    """Other rates; `h2d_kv_bytes_per_s`, `h2d_activation_bytes_per_s`, `recompute_s_per_token`: of one form."""
    link, restore = dict(rates.h2d_bytes_per_s), dict(rates.restore_s_per_token)
    for form in ("kv", "activation"):
        link[form] = changes.pop(f"h2d_{form}_bytes_per_s", link[form])
    restore["activation"] = changes.pop("recompute_s_per_token", restore["activation"])
    return dataclasses.replace(rates, **{"h2d_bytes_per_s": link, "restore_s_per_token": restore} | changes)


def with_rates(inputs: PlanInputs, **changes: Any) -> PlanInputs:
    return dataclasses.replace(inputs, rates=changed(inputs.rates, **changes))


def bytes_per_token(kv: int, activation: int) -> dict[str, int]:
    return {"kv": kv, "activation": activation}


def placed(inputs: PlanInputs, r: int, r_x: int, x: int, t: int) -> Plan:
    """A plan for any placement, good or bad."""
    step_s, binding = closed_forms.predict_step_s(inputs, r, r_x, x, t)
    return Plan(
        **{name: getattr(inputs, name) for name in ("num_layers", "num_offloaded_layers", "block_tokens")},
        **{name: getattr(inputs, name) for name in ("chunk_blocks", "num_slots", "schedule", "is_segmented")},
        num_micro_batches=inputs.num_micro_batches,
        blocks={"resident_kv": r, "resident_activation": r_x, "activation": x, "kv": t},
        bytes_per_token=inputs.bytes_per_token,
        weight_bytes_per_step=inputs.weight_bytes_per_step,
        predicted_step_s=step_s,
        full_transfer_step_s=closed_forms.full_transfer_step_s(inputs),
        binding_constraint=binding,
    )


# A ring that hides the gap, as it is sized, and slots for a whole activation.
LONG = dataclasses.replace(
    with_rates(INPUTS, dense_s=0.5, head_s=0.5, host_s_per_layer=0.01, host_s_per_chunk=0.0, gap_s=0.2),
    num_layers=8,
    num_offloaded_layers=8,
    num_blocks=60,
    num_slots=30,
)


def random_placement(rng: random.Random) -> tuple[PlanInputs, tuple[int, int, int, int]]:
    """Any placement on a machine of any balance, `LONG` in all else."""
    before = {"recompute_s_per_token": LONG.rates.restore_s_per_token["activation"]}
    before |= {
        name: getattr(LONG.rates, name) for name in ("attention_s_per_token", "dense_s", "head_s", "host_s_per_layer")
    }
    changes = {name: value * rng.choice([0.0, 0.1, 1.0, 5.0]) for name, value in before.items()}
    inputs = with_rates(LONG, host_s_per_chunk=rng.choice([0.0, 0.1]), **changes)
    inputs = dataclasses.replace(inputs, num_layers=rng.choice([8, 10]), weight_bytes_per_step=rng.choice([0, 9999]))
    cuts = sorted(rng.randint(0, 60) for _ in range(3))
    return inputs, (cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1], 60 - cuts[2])
