"""What is known of a link: a GPU's is measured, an emulated one's speed is given and what it achieves is measured.

Owns the choice of sizes, of host memory and of what is given. Does not own how copies are timed (`link`, which shows
the timeline and its rules).

    a GPU           from memory the backend pins, and in full also from pageable memory; where nothing can be pinned the
                    pageable rate stands for the link's, since the runtime will copy at it
    emulated        curves built from bandwidth and latency, "assumed"; beside them the copies it achieves, of sizes
                    that take at most `MAX_COPY_S`: a slow link would take minutes for large ones
    unpaced         nothing: how long a copy takes depends only on what else the CPU is doing
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvoffload.backend import Backend, EmulatedBackend
from kvoffload.config import EmulatedLink
from kvoffload.machine import system_memory
from kvoffload.machine.quantities import SIZES_BYTES, Curve, given_curve
from kvoffload.profiler.budget import Budget, ProgressParts
from kvoffload.profiler.link import MAX_COPY_S, LinkCurves, measure_link

MEMORY_SHARE = 8  # a copy is at most this part of the memory that is free on either side


class Copies(NamedTuple):
    """What is known of the link."""

    h2d: Curve | None
    d2h: Curve | None
    others: dict[str, Curve]
    pinned: bool
    noisy: list[str]


def measure_copies(backend: Backend, budget: Budget, steps: ProgressParts) -> Copies:
    """A GPU's link from pinned and pageable memory; of an emulated one what is given, and what is achieved."""
    steps.begin("link")
    if isinstance(backend, EmulatedBackend):
        h2d, d2h = given_curves(backend.link)
        sizes = [] if h2d is None or d2h is None else _emulated_sizes(h2d, d2h)
        if not sizes:
            return Copies(h2d, d2h, {}, False, [])
        budget_s = budget.emulated_s
        achieved = measure_link(backend, sizes_bytes=tuple(sizes), budget_s=budget_s, progress=steps.within)
        return Copies(h2d, d2h, achieved.named("_achieved"), False, [f"emulated {one}" for one in achieved.noisy])
    free_bytes = min(system_memory.available_bytes(), torch.cuda.mem_get_info(backend.device)[0])
    sizes = [size for size in budget.sizes_bytes if size <= free_bytes // MEMORY_SHARE] or [SIZES_BYTES[0]]

    def copies(budget_s: float, pageable: bool) -> LinkCurves:
        return measure_link(
            backend,
            sizes_bytes=tuple(sizes),
            budget_s=budget_s,
            max_copy_s=budget.max_copy_s,
            pageable=pageable,
            progress=steps.within,
        )

    first = copies(budget.link_s, False)
    others, noisy = {"both": first.both}, [*first.noisy]
    steps.begin("link, pageable memory")
    if budget.pageable_s and first.pinned:
        pageable = copies(budget.pageable_s, True)
        others |= pageable.named("_pageable")
        noisy += pageable.noisy
    return Copies(first.h2d, first.d2h, others, first.pinned, noisy)


def _emulated_sizes(h2d: Curve, d2h: Curve) -> list[int]:
    """Sizes that take no longer than `MAX_COPY_S` either way: a slow link would take minutes for large ones."""
    return [s for s in SIZES_BYTES if max(h2d.seconds(s), d2h.seconds(s)) <= MAX_COPY_S]


def given_curves(link: EmulatedLink) -> tuple[Curve | None, Curve | None]:
    """H2D and D2H of an emulated link; None each where it is not paced."""
    d2h_gb_per_s = link.d2h_gb_per_s if link.d2h_gb_per_s is not None else link.h2d_gb_per_s
    rates = (link.h2d_gb_per_s, d2h_gb_per_s)
    h2d, d2h = (None if rate is None else given_curve(rate * 1e9, link.latency_s) for rate in rates)
    return h2d, d2h
