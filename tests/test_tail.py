"""The newest tokens keep their order and their bits while the oldest leave for blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from matrix import FAST_LINK

from kvoffload.backend import EmulatedBackend
from kvoffload.store.tail import KVShape, NewTokens, RowShape, Tail

SHAPE = KVShape(2, 3, 2, 3, torch.float32)


@pytest.fixture
def backend() -> Iterator[EmulatedBackend]:
    backend = EmulatedBackend(FAST_LINK)
    yield backend
    backend.close()


def new(count: int, start: int) -> NewTokens:
    """Tokens whose numbers tell which they are."""
    keys = (torch.arange(start, start + count).float().view(-1, 1, 1, 1)).expand(count, 2, 2, 3)
    return NewTokens(keys, keys + 0.5, keys[..., 0].repeat(1, 1, 2) + 0.25)


@pytest.mark.parametrize("keeps_activations", [False, True])
@pytest.mark.parametrize(
    "steps", [[(3, 0), (9, 8), (5, 4)], [(11, 4), (1, 4), (6, 0), (2, 8)], [(7, 3), (0, 1), (0, 2)]]
)
def test_what_is_left_is_the_newest_in_order(
    steps: list[tuple[int, int]], keeps_activations: bool, backend: EmulatedBackend
) -> None:
    """(new tokens, tokens that leave): also where more stay than leave, and their places overlap."""
    tail = Tail(backend, SHAPE, RowShape(4, torch.float32) if keeps_activations else None, 2, 4)
    everything, gone = 0, 0
    for count, leave in steps:
        left = tail.num_tokens + count - leave
        tail.grow(left)
        tail.advance(leave, new(count, everything) if count else NewTokens())
        everything, gone = everything + count, gone + leave
        assert tail.num_tokens == left
        numbers = torch.arange(gone, everything).float()
        keys, values = SHAPE.split(tail.kv)
        assert torch.equal(keys[:, 1, 1, 2], numbers)
        assert torch.equal(values[:, 0, 0, 0], numbers + 0.5)
        if keeps_activations:
            out = torch.empty(left, 2, 4)
            tail.copy("activation", out, 0, left, 1, NewTokens())
            assert torch.equal(out[:, 1, 3], numbers + 0.25)


def test_a_copy_reaches_over_the_tail_into_the_new_tokens(backend: EmulatedBackend) -> None:
    tail = Tail(backend, SHAPE, None, 2, 4)
    tail.advance(0, new(3, 0))
    out = torch.full((5, 1, SHAPE.width), torch.nan)
    tail.copy("kv", out, 1, 6, 2, new(4, 3))
    assert torch.equal(SHAPE.split(out)[0][:, 0, 0, 0], torch.arange(1, 6).float())


def test_rows_follow_an_index_and_may_become_more(backend: EmulatedBackend) -> None:
    tail = Tail(backend, SHAPE, None, 2, 4)
    tokens = new(3, 0)
    assert tokens.keys is not None
    tail.advance(0, tokens._replace(keys=tokens.keys + torch.tensor([0.0, 100.0]).view(1, 2, 1, 1)))
    tail.select_rows(torch.tensor([1, 1, 0]))
    assert SHAPE.split(tail.kv)[0][2, :, 0, 0].tolist() == [102.0, 102.0, 2.0]
    tail.select_rows(torch.tensor([2, 0]))
    assert SHAPE.split(tail.kv)[0][0, :, 0, 0].tolist() == [0.0, 100.0]


def test_a_tail_whose_rows_part_holds_no_copies(backend: EmulatedBackend) -> None:
    tail = Tail(backend, SHAPE, RowShape(4, torch.float32), 2, 4)
    assert tail.rows_are_copies(2)  # of nothing
    tail.advance(0, new(3, 0))
    assert tail.rows_are_copies(2)
    tokens = new(1, 3)
    assert tokens.activation is not None
    other = tokens.activation.clone()
    other[0, 1] += 1
    tail.advance(0, tokens._replace(activation=other))
    assert not tail.rows_are_copies(2)


def test_rows_are_copies_where_all_of_a_group_are_equal_in_every_part() -> None:
    keys = torch.randn(3, 2, 2, 3).repeat_interleave(2, dim=1)  # four rows in pairs
    parts = (keys, keys + 1, keys[..., 0])
    assert NewTokens(*parts).rows_are_copies(2)
    assert NewTokens(*parts[:2]).rows_are_copies(2)
    assert not NewTokens(*parts).rows_are_copies(4)
    for idx in range(3):
        changed = [part.clone() for part in parts]
        changed[idx][2, 3] += 1
        assert not NewTokens(*changed).rows_are_copies(2)
