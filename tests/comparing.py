"""A run of `generate()` without and with offloading, whose logits must be the same.

Not a test module. The tests beside it are on llama, which stands for all that the matrix covers by architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matrix import FAST_LINK, TOLERANCE, FixedRates, checking_backend, distance, profile, row_bytes
from modes import outcome
from transformers import PreTrainedModel

from kvoffload import OffloadConfig
from kvoffload.session.session import Session

SPLITS: list[Any] = ["transfer", "recompute", 0.5, "auto"]

PLAN: dict[str, Any] = {"link": FAST_LINK, "device_gib": "min", "block_tokens": 4, "chunk_blocks": 2}


def config(split: Any, **kwargs: Any) -> OffloadConfig:
    return OffloadConfig(split=split, profile=profile(), **{**PLAN, **kwargs})


def compare(
    model: PreTrainedModel,
    run: Callable[[], Any],
    split: Any,
    *,
    tolerance: float = TOLERANCE,
    wraps: Any = None,
    **options: Any,
) -> Session:
    """Run plain and offloaded; the session, for its statistics.

    Args:
        model: the transformers model.
        run: generates with it (or with what wraps it) and returns what generate returned.
        split: of the plan.
        tolerance: for the logits.
        wraps: what is given to the session, if not the model.
        options: of the plan.
    """
    wanted = run()
    session = Session(wraps or model, config(split, **options), checking_backend())
    if split == "auto":
        session.planner.measured = FixedRates(*row_bytes(model))
    with session:
        found = run()
    assert distance(outcome([found]), outcome([wanted])) <= tolerance
    assert session.stats is not None
    assert session.stats.h2d_bytes > 0
    assert (session.stats.recomputed_tokens > 0) == (split != "transfer")
    return session
