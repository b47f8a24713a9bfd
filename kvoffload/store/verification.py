"""Whether recomputing agrees with what was computed: K and V from an activation, compared with those of the model.

Owns the comparison (and that of rows which should be copies of each other), on which tokens it is made, and a probe of
a layer that says later whether its module is still the same. One comparison is not evidence for good: hooks may act on
some tokens only, and weights, adapters and the precision may change between two turns of a cache. Does not decide what
follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from kvoffload.store.tail import KVShape, NewTokens

# Error allowed between a recomputed and the original K or V, relative to the largest value: GEMMs of other shapes
# differ in the last bits, another rotation or a missing norm by orders of magnitude more.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
MIN_SAMPLE_TOKENS, SAMPLE_ROW_TOKENS = 16, 256  # of tokens that are about to be stored

# Recomputes K and V: (activation [tokens, rows, hidden], position embeddings, out [tokens, rows, width])
Recompute = Callable[[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor], None]


def reproduces(
    path: Recompute, x: torch.Tensor, embeddings: tuple[torch.Tensor, ...], wanted: torch.Tensor, shape: KVShape
) -> bool:
    """Whether K and V of `x` [tokens, rows, hidden] are as `wanted`, [tokens, rows, width]; waits for the device."""
    out = torch.full_like(wanted, torch.nan)
    try:
        path(x, embeddings, out)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
        return False  # a module with other arguments or a fused layout; its K/V are transferred
    for found, right in zip(shape.split(out), shape.split(wanted), strict=True):
        if not right.numel():
            continue  # latent attention without positions has values of no width
        error = (found.float() - right.float()).abs().max()
        if not bool(error <= TOLERANCE[shape.dtype] * right.float().abs().max()):  # NaN is a no
            return False
    return True


def sampled(tokens: int, rows: int) -> Sequence[int]:
    """Some of that many tokens, spread from the first to the last; never a single one, which some hooks tell apart."""
    count = max(2, min(tokens, max(MIN_SAMPLE_TOKENS, SAMPLE_ROW_TOKENS // rows)))
    return [idx * (tokens - 1) // (count - 1) for idx in range(count)]


def rows_are_alike(new: NewTokens, copies: int) -> bool:
    """Whether each group of `copies` consecutive rows has the same K and V but for rounding; waits for the device.

    In at least half of some tokens: rounding may send a token of one row to another expert.
    """
    for part in (new.keys, new.values):
        if part is not None and part.numel():
            groups = part[sampled(*part.shape[:2])].flatten(2).float().unflatten(1, (-1, copies))
            error = (groups - groups[:, :, :1]).abs().flatten(1).amax(1).median()
            if bool(error > TOLERANCE[part.dtype] * groups.abs().max()):
                return False
    return True


class Probe(NamedTuple):
    """A token of all rows, twice, as a layer had it first; on the host, as it is read once a turn."""

    activation: torch.Tensor  # [2, rows, hidden]
    embeddings: tuple[torch.Tensor, ...]  # each [rows or 1, 2, width]
    kv: torch.Tensor  # [2, rows, width]

    @classmethod
    def of(
        cls,
        activation: torch.Tensor,
        embeddings: tuple[torch.Tensor, ...],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> Probe:
        """The last of activation [rows, tokens, hidden], of embeddings, and of keys [rows, heads, tokens, dim]."""
        kv = torch.cat([part[:, :, -1].flatten(1) for part in (keys, values)], dim=1)
        return cls(
            activation[:, -1].cpu().expand(2, -1, -1),
            tuple(part[:, -1:].cpu().expand(-1, 2, -1) for part in embeddings),
            kv.cpu().expand(2, -1, -1),
        )

    def agrees(self, path: Recompute, shape: KVShape, device: torch.device) -> bool:
        """Whether recomputing still gives the same."""
        embeddings = tuple(part.to(device) for part in self.embeddings)
        return reproduces(path, self.activation.to(device).contiguous(), embeddings, self.kv.to(device), shape)
