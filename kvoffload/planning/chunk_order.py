"""In which order a layer's chunks travel. Torch-free: the engine follows it, and the simulation plays it."""

from __future__ import annotations

from kvoffload.config import Schedule


def transfer_order(num_activation_chunks: int, num_kv_chunks: int, schedule: Schedule) -> list[bool]:
    """In which order a layer's chunks travel: True for an activation chunk, False for a kv chunk.

    Spread evenly, so that activations arrive at the pace at which they are recomputed: with all of them in front the
    link would stand still behind a full ring while kv chunks could travel. "kvpr" keeps the paper's order.
    """
    if schedule == "kvpr":
        return [True] * num_activation_chunks + [False] * num_kv_chunks
    keyed = [((idx + 0.5) / num_activation_chunks, True) for idx in range(num_activation_chunks)]
    keyed += [((idx + 1) / num_kv_chunks, False) for idx in range(num_kv_chunks)]
    return [is_activation for _, is_activation in sorted(keyed, key=lambda item: (item[0], not item[1]))]
