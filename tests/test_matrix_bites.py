"""The comparison of the matrix notices every kind of error it is there for, with every architecture.

Each error is planted once, after the prefill, into an otherwise correct generation: two blocks swapped on the host,
keys recomputed without their rotation, positions off by one, stored numbers rounded to bfloat16.

Attention does not care for the order of its keys once they are rotated, so misplaced tokens only show where places
differ: all runs are padded on the left, where some places are masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import (
    ARCHITECTURES,
    FAST_LINK,
    TOLERANCE,
    distance,
    model_for,
    not_recomputable,
    profile,
)
from matrix import reference as plain
from models import RECOMPUTABLE
from modes import MODES, outcome

from kvoffload import OffloadConfig
from kvoffload.backend import EmulatedBackend
from kvoffload.hf import OffloadedHFCache, given_cache
from kvoffload.session.session import Session
from kvoffload.store.positions import PositionTable

# Keys of their full-attention layers are not rotated: positions are added to the input (opt, gpt2), or used in the
# sliding layers only (cohere2, exaone4).
WITHOUT_ROPE = ("opt", "gpt2", "cohere2", "exaone4")
MODE = "left_padding"

Damage = Callable[[OffloadedHFCache], None]


def error_after(architecture: str, split: str, damage: Damage | None) -> float:
    """Distance to plain generate when `damage` is done to the cache between the prefill and the first decode step."""
    model = model_for(architecture, False)
    config = OffloadConfig(
        split=split, link=FAST_LINK, profile=profile(), device_gib="min", block_tokens=4, chunk_blocks=2
    )
    wanted = plain(architecture, False, MODE)
    with not_recomputable(architecture, split), Session(model, config, EmulatedBackend(FAST_LINK)) as session:
        done = []

        def before(module: Any, args: Any, kwargs: Any) -> None:
            cache = given_cache((), kwargs)
            if cache.core.layers[0].num_tokens and not done:
                session.backend.synchronize()
                session.engine.drop()  # what was prefetched is still right
                done.append(True)
                if damage is not None:
                    damage(cache)

        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            outputs = MODES[MODE].run(model, None)
        finally:
            handle.remove()
        assert done
        assert session.stats is not None
        assert session.stats.h2d_bytes > 0
    return distance(outcome(outputs), wanted)


def swap_blocks(cache: OffloadedHFCache) -> None:
    """The first and the last stored block of every layer change places."""
    for layer in cache.core.layers:
        first, last = layer.blocks[0].bytes, layer.blocks[-1].bytes
        kept = first.clone()
        first.copy_(last)
        last.copy_(kept)


def shift_tokens(cache: OffloadedHFCache) -> None:
    """Every stored token stands one place later, the last of a block in its first place."""
    for layer in cache.core.layers:
        for block in layer.blocks:
            tokens = block.bytes.view(cache.core.placement.block_tokens, -1)
            tokens.copy_(tokens.roll(1, dims=0))


def round_to_bfloat16(cache: OffloadedHFCache) -> None:
    """Stored numbers keep 8 bits of their mantissa."""
    for layer in cache.core.layers:
        for block in layer.blocks:
            numbers = block.bytes.view(torch.float32)
            numbers.copy_(numbers.bfloat16())


def splits(architecture: str) -> list[str]:
    return ["transfer", "recompute"] if architecture in RECOMPUTABLE else ["transfer"]


CASES = [(architecture, split) for architecture in ARCHITECTURES for split in splits(architecture)]
ROTATED = [name for name in RECOMPUTABLE if name not in WITHOUT_ROPE]


@pytest.mark.parametrize(("architecture", "split"), CASES)
def test_without_an_error_nothing_is_noticed(architecture: str, split: str) -> None:
    assert error_after(architecture, split, None) <= TOLERANCE


@pytest.mark.parametrize("damage", [swap_blocks, round_to_bfloat16])
@pytest.mark.parametrize(("architecture", "split"), CASES)
def test_wrong_stored_bytes_are_noticed(architecture: str, split: str, damage: Damage) -> None:
    assert error_after(architecture, split, damage) > TOLERANCE


def change_embeddings(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[int, torch.Tensor], torch.Tensor]
) -> Callable[[OffloadedHFCache], None]:
    """Damage that changes the position embeddings which keys are recomputed with."""
    original = PositionTable.read

    def read(self: PositionTable, *args: Any) -> tuple[torch.Tensor, ...]:
        return tuple(change(index, part) for index, part in enumerate(original(self, *args)))

    return lambda cache: monkeypatch.setattr(PositionTable, "read", read)


def no_rotation(index: int, embedding: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(embedding) if index == 0 else torch.zeros_like(embedding)  # cos, sin


def one_later(index: int, embedding: torch.Tensor) -> torch.Tensor:
    return embedding.roll(1, dims=1)


@pytest.mark.parametrize("change", [no_rotation, one_later])
@pytest.mark.parametrize("architecture", ROTATED)
def test_wrong_rotations_of_recomputed_keys_are_noticed(
    architecture: str, change: Callable[[int, torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert error_after(architecture, "recompute", change_embeddings(monkeypatch, change)) > TOLERANCE


@pytest.mark.parametrize("architecture", WITHOUT_ROPE)
def test_the_keys_of_these_are_not_rotated_at_all(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error_after(architecture, "recompute", change_embeddings(monkeypatch, no_rotation)) <= TOLERANCE


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ROTATED])
def test_tokens_one_place_late_are_noticed_where_keys_are_not_rotated_again(architecture: str) -> None:
    assert error_after(architecture, "transfer", shift_tokens) > TOLERANCE
