"""What a step of offloading would take with K and V stored in fewer bytes: the exact plan, and beside it what-ifs.

Owns which forms are compared. Does not own the plans (`planner`) nor how accurate a form is (docs/quality.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from kvoffload.advise.task import Task
from kvoffload.config import OffloadConfig
from kvoffload.errors import InfeasiblePlanError
from kvoffload.planning import planner
from kvoffload.planning.forms import FORMS

KV_DTYPES: tuple[Literal["model", "int8", "int4", "int2"], ...] = get_args(get_type_hints(OffloadConfig)["kv_dtype"])


class Precision(NamedTuple):
    """Offloading in one precision at the mean context."""

    kv_dtype: str
    packing: str
    label: str
    is_exact: bool
    step_s: float
    speedup: float  # over K and V as they are, planned likewise
    link_bytes: int  # of a step
    host_bytes: int


def precisions(task: Task) -> tuple[Precision, ...]:
    """K and V as they are, packed, and with loss in ever fewer bits; empty where offloading does not work.

    What makes no difference is left out: packing of anything but bfloat16, say.
    """
    found: list[Precision] = []
    for kv_dtype in KV_DTYPES:
        for packing in ("off", "auto") if kv_dtype == "model" else ("auto",):
            one = _precision(task, kv_dtype, packing, found[0].step_s if found else 0.0)
            if one is not None and (not found or one.link_bytes != found[-1].link_bytes):
                found.append(one)
    return tuple(found)


def _precision(task: Task, kv_dtype: Any, packing: Any, plain_s: float) -> Precision | None:
    asked = task._replace(config=replace(task.config, kv_dtype=kv_dtype, packing=packing))
    try:
        plan = planner.solve(asked.inputs(asked.mean_tokens()))
    except InfeasiblePlanError:
        return None
    if kv_dtype != "model":
        label = f"{FORMS[kv_dtype].label}"
    else:
        label = "K/V as they are" if packing == "off" else "packed K/V"
    return Precision(
        kv_dtype=kv_dtype,
        packing=packing,
        label=label,
        is_exact=kv_dtype == "model",
        step_s=plan.predicted_step_s,
        speedup=plain_s / plan.predicted_step_s if plain_s else 1.0,
        link_bytes=plan.link_bytes_per_step,
        host_bytes=plan.host_bytes,
    )


def in_words(found: tuple[Precision, ...]) -> str:
    """One line for people; "" where there is nothing to compare."""
    if len(found) < 2:
        return ""
    parts = [f"{one.label} {one.speedup:.2f}x{'' if one.is_exact else ' (not exact)'}" for one in found[1:]]
    return f"A step with fewer bytes of K/V, over K/V as they are: {', '.join(parts)}."
