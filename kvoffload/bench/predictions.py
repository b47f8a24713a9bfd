"""Predicted against measured steps of random work, through the real engine.

Owns the drawing of the combinations and their rows. A combination is a batch, a context, a split and a link speed; the
prediction is the cost model's at rates measured right before and after the run, as in `decode.measure`.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from typing import NamedTuple

from kvoffload import cost
from kvoffload.bench import rows
from kvoffload.bench.decode import measure
from kvoffload.bench.lab import Lab
from kvoffload.bench.presets import PRESETS
from kvoffload.types import HardwareProfile

BENCH = "predictions"
BATCHES = (2, 4, 8)
CONTEXTS = (256, 512, 768, 1024)
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
    base = PRESETS["cpu-balanced"]
    preset = replace(base, batch=one.batch, cached_tokens=one.context, recompute_to_link=one.recompute_to_link)
    lab = Lab(preset)
    split = one.split_sixteenths / 16
    row = measure(lab, "planned", profile, new_tokens, split)
    rates = lab.rates("planned")
    plan = row["plan"]
    inputs = lab.inputs(rates, split=split, is_segmented=True)
    link_s = cost.link_s(inputs, plan["activation_blocks"], plan["kv_blocks"])
    device_s = cost.device_s(inputs, 0, plan["activation_blocks"])
    return Checked(
        one,
        statistics.mean(row["bounds_s"]),
        statistics.median(row["decode_step_s"]),
        link_s / device_s,
        lab.link_name,
    )


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
