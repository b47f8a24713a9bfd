"""In which order a layer's chunks travel. Torch-free: the engine follows it, and the simulation plays it."""

from __future__ import annotations

from kvoffload.config import Schedule


def transfer_order(num_others: int, num_plain: int, schedule: Schedule) -> list[bool]:
    """In which order a layer's chunks travel: False for plain K and V, True for another form.

    Spread evenly, so that activations arrive at the pace at which they are recomputed: with all of them in front the
    link would stand still behind a full ring while plain chunks could travel. "kvpr" keeps the paper's order.
    """
    if schedule == "kvpr":
        return [True] * num_others + [False] * num_plain
    keyed = [((idx + 0.5) / num_others, True) for idx in range(num_others)]
    keyed += [((idx + 1) / num_plain, False) for idx in range(num_plain)]
    return [is_other for _, is_other in sorted(keyed, key=lambda item: (item[0], not item[1]))]
