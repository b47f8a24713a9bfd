"""One workload on several devices: for each what to do, how fast that is, and what bounds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from kvoffload.advise.advice import Advice
from kvoffload.advise.streaming import quantised_way
from kvoffload.advise.task import Alternative, Task
from kvoffload.advise.ways import LABELS, LEAST_GAIN
from kvoffload.errors import InfeasiblePlanError
from kvoffload.machine.hardware_profile import HardwareProfile


class Card(NamedTuple):
    """One device, and the best way to do the workload on it; without a way where `problem` says why there is none."""

    name: str
    link_name: str
    memory_bytes: int
    advice: Advice | None
    problem: str = ""
    quantised: Alternative | None = None  # the best way with weights in 4 bits, where it is faster
    best: Alternative | None = None  # the recommended way; None: nothing works

    @property
    def way(self) -> str:
        """The recommended way in two or three words."""
        best = self.best
        streams = self.advice is not None and self.advice.plan.weight_bytes_per_step
        if self.quantised is not None and (best is None or streams):
            return "quantise"
        if best is None:
            return "nothing works"
        if streams and best.way in ("offload", "drafts"):
            return "stream weights"
        return f"{best.runs} parts" if best.runs > 1 else LABELS[best.way]

    def to_json(self) -> dict[str, Any]:
        """Plain data; figures of a device on which nothing works are None."""
        best = self.best
        return {
            "hardware": self.name,
            "link": self.link_name,
            "device_memory_bytes": self.memory_bytes,
            "way": None if best is None else best.way,
            "streams_weights": bool(self.advice and self.advice.plan.weight_bytes_per_step),
            "tokens_per_s": None if best is None else best.tokens_per_s,
            "prefill_s": None if best is None else best.prefill_s,
            "step_s": None if best is None else best.step_s,
            "recommendation": None if self.advice is None else self.advice.plan.recommendation,
            "quantised_tokens_per_s": None if self.quantised is None else self.quantised.tokens_per_s,
            "problem": self.problem,
        }


def card(machine: HardwareProfile, task: Task, advise: Callable[[], Advice]) -> Card:
    """What `advise` says of a task on one device, with weights in 4 bits beside it."""
    advice, problem = None, ""
    try:
        advice = advise()
    except InfeasiblePlanError as error:
        problem = str(error)
    best, quantised = (task.on_device() if advice is None else advice.best), quantised_way(task)
    if quantised is not None and best is not None and quantised.tokens_per_s < LEAST_GAIN * best.tokens_per_s:
        quantised = None
    return Card(machine.device_name, machine.link_name, machine.device_memory_bytes, advice, problem, quantised, best)
