"""Predicted against measured steps of random work, through the real engine.

Owns the drawing of the combinations, their rates and their rows. A combination is a batch, a context, a split and a
link speed. The prediction is the cost model's at rates measured right before and after the run:

    engine_rates     a run at split 0 and one at split 1 over a link too fast to matter: what a step computes, and what
                     recomputing adds to it, with the host's time per chunk, which on a CPU is the device's as well
    the run itself   at the combination's own split and link
    engine_rates     again
    the run itself   again; all of it is repeated while two of a kind differ by more than 10 %

So the rates are of the same shape, but neither of the split nor of the link that is predicted.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from typing import NamedTuple

from campaign import rows
from kvoffload.bench.decode import MAX_RATE_DRIFT_FRACTION, MAX_TRIES, NUM_UNEVEN_STEPS, steps
from kvoffload.bench.lab import Lab
from kvoffload.bench.presets import PRESETS
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.planning import step_time
from kvoffload.planning.forms import FORMS
from kvoffload.planning.rates import Rates

BENCH = "predictions"
BATCHES = (2, 4, 8)
CONTEXTS = (256, 512, 768, 1024)
FAST_BYTES_PER_S = 20e9
LINK_BOUND = 1.5  # the link takes so many times as long as the device
MAX_ERROR = {True: 0.05, False: 0.10}  # link-bound or not


class Combination(NamedTuple):
    """What is run."""

    batch: int
    context: int
    split_sixteenths: int
    recompute_to_link: float  # seconds to recompute a token over seconds to bring its activation

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, {self.context} tokens, split {self.split_sixteenths}/16, "
            f"recompute/link {self.recompute_to_link:.2f}"
        )


class Checked(NamedTuple):
    """One combination and what came of it."""

    combination: Combination
    predicted_s: float
    measured_s: float
    link_over_device: float
    link_name: str

    @property
    def error(self) -> float:
        """Measured over predicted, minus 1."""
        return self.measured_s / self.predicted_s - 1

    @property
    def is_link_bound(self) -> bool:
        """Whether the link is the bound by far."""
        return self.link_over_device >= LINK_BOUND

    @property
    def is_within(self) -> bool:
        """Whether the error is what it may be."""
        return abs(self.error) <= MAX_ERROR[self.is_link_bound]


def draw(number: int, seed: int) -> list[Combination]:
    """`number` combinations, the same for the same seed."""
    generator = random.Random(seed)
    return [
        Combination(
            generator.choice(BATCHES),
            generator.choice(CONTEXTS),
            generator.randint(0, 16),
            round(10 ** generator.uniform(-0.6, 0.6), 2),
        )
        for _ in range(number)
    ]


def check(one: Combination, profile: HardwareProfile, new_tokens: int) -> Checked:
    """Run one combination."""
    preset = replace(
        PRESETS["cpu-balanced"], batch=one.batch, cached_tokens=one.context, recompute_to_link=one.recompute_to_link
    )
    lab = Lab(preset)
    split = one.split_sixteenths / 16
    for _ in range(MAX_TRIES):
        bounds, measured = [], []
        for _ in range(2):
            rates = engine_rates(lab, profile, new_tokens)
            bounds.append(lab.bound_s("planned", rates, split))
            measured.append(_step_s(lab, profile, new_tokens, split))
        if all(max(pair) <= (1 + MAX_RATE_DRIFT_FRACTION) * min(pair) for pair in (bounds, measured)):
            break
    inputs = lab.inputs(rates, split=split, is_segmented=True)
    activation_blocks = one.split_sixteenths * inputs.num_blocks // 16
    blocks = {"activation": activation_blocks, "kv": inputs.num_blocks - activation_blocks}
    found = step_time.predict(inputs, blocks)
    balance = found.link_s / found.device_s
    return Checked(one, statistics.mean(bounds), statistics.mean(measured), balance, lab.link_name)


def engine_rates(lab: Lab, profile: HardwareProfile, new_tokens: int) -> Rates:
    """What a step computes, from two runs over a link that is no limit."""
    speed = lab.bytes_per_s
    lab.set_link_bytes_per_s(FAST_BYTES_PER_S)
    try:
        without, with_all = (_step_s(lab, profile, new_tokens, split) for split in (0.0, 1.0))
    finally:
        lab.set_link_bytes_per_s(speed)
    tokens = lab.preset.layers * (lab.preset.cached_tokens // lab.block_tokens) * lab.block_tokens
    return Rates(
        h2d_bytes_per_s=dict.fromkeys(FORMS, speed),
        restore_s_per_token={"activation": max(0.0, with_all - without) / tokens},
        attention_s_per_token=0.0,
        dense_s=0.0,
        head_s=without,  # attention, dense parts, head and host time in one piece
    )


def _step_s(lab: Lab, profile: HardwareProfile, new_tokens: int, split: float) -> float:
    stats = steps(lab, lab.config("planned", profile, split), new_tokens)
    return statistics.median(stats.decode_step_s[NUM_UNEVEN_STEPS:])


def rows_of(checked: Checked) -> list[rows.Row]:
    """Both times and the error."""
    config = checked.combination._asdict()
    x = str(checked.combination)
    return [
        rows.row(BENCH, "planned", metric, unit, x, [value], config, checked.link_name)
        for metric, unit, value in (
            ("predicted_step", "s", checked.predicted_s),
            ("decode_step", "s", checked.measured_s),
            ("error", "fraction", checked.error),
            ("link_over_device", "ratio", checked.link_over_device),
        )
    ]
