"""The ways to do a workload, by one name each in code, JSON and charts, and which of them is best.

Owns the names, what people read for them, and the one margin from which on a way is worth more trouble than a simpler
one. Does not own the figures (`task`, `comparison`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Way = Literal["on_device", "sub_batches", "offload", "drafts", "full_transfer", "kvpr"]
# the simplest first
LABELS: dict[Way, str] = {
    "on_device": "no offload",  # the whole batch on the device
    "sub_batches": "sub-batches",  # the largest part of it that fits, as often as needed
    "offload": "offload",  # the plan: residency, transfer and recomputation in one pipeline
    "drafts": "offload, drafts",  # several tokens for one pass over the link, at an assumed acceptance
    "full_transfer": "full transfer",  # the same without recomputation
    "kvpr": "paper's schedule",  # KVPR's barrier between layers (arXiv 2411.17089)
}
# options of the ways that all others are compared with: no K or V in fewer bytes
AS_THEY_ARE: dict[str, Any] = {"packing": "off", "kv_dtype": "model"}
LEAST_GAIN = 1.05  # predictions are not better than that


def best_of(total_s: Mapping[Way, float]) -> Way | None:
    """The simplest way that takes at most `LEAST_GAIN` times as long as the fastest; None where nothing works.

    Args:
        total_s: seconds of the whole task, of every way that works.
    """
    limit_s = LEAST_GAIN * min(total_s.values(), default=0.0)
    return next((way for way in LABELS if way in total_s and total_s[way] <= limit_s), None)
