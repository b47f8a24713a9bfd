"""Position embeddings of cached tokens against a model that simply keeps all of them."""

from __future__ import annotations

import random

import pytest
import torch

from kvoffload import UnsupportedModelError
from kvoffload.store.positions import PositionTable

WIDTH = 6


def embedding(rows: int, tokens: int, seed: int) -> torch.Tensor:
    """[rows, tokens, width], different everywhere."""
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def rotary(rows: int, start: int, tokens: int, padding: list[int]) -> torch.Tensor:
    """What a model gives: a function of the position, which differs between rows by their padding."""
    position = torch.arange(start, start + tokens).float().unsqueeze(0) - torch.tensor(padding[:rows]).unsqueeze(1)
    return position.clamp(min=0).unsqueeze(-1) * torch.linspace(0.1, 1, WIDTH)


@pytest.mark.parametrize("seed", range(20))
def test_embeddings_read_back_are_those_that_were_captured(seed: int) -> None:
    """Random forwards, crops and reorderings; `kept` is [rows, tokens, width] of the logical rows."""
    draw = random.Random(seed)
    rows = draw.choice([1, 2, 3, 6])
    padding = [draw.choice([0, 0, 3, 11]) for _ in range(rows)] if draw.random() < 0.7 else [4] * rows
    store = PositionTable(draw.choice([0, 16, 500]))
    kept = torch.empty(rows, 0, WIDTH)
    stored_tokens = 0  # in blocks: their rows do not move
    for step in range(40):
        operation = draw.random()
        tokens = kept.shape[1]
        if operation < 0.6 or tokens == 0:
            new = rotary(rows, tokens, draw.choice([1, 1, 1, 2, 7, 30]), padding)
            given = new[:1] if len(set(padding)) == 1 and draw.random() < 0.5 else new  # models may pass one row
            assert store.capture(step, 0, (given,), tokens) == (0,)
            kept = torch.cat([kept, new], dim=1)
            stored_tokens = kept.shape[1] // 4 * 4 if draw.random() < 0.7 else stored_tokens
        elif operation < 0.8:
            tokens = draw.randrange(tokens + 1)
            store.truncate(tokens)
            kept, stored_tokens = kept[:, :tokens], min(stored_tokens, tokens // 4 * 4)
        else:
            indices = torch.tensor([draw.randrange(rows) for _ in range(rows)])
            store.select(indices, stored_tokens, rows)
            # Blocks keep their rows, the tail follows. Padding belongs to the row a token was written for.
            kept = torch.cat([kept[:, :stored_tokens], kept[indices, stored_tokens:]], dim=1)
            padding = [padding[i] for i in indices.tolist()]
        if kept.shape[1]:
            start = draw.randrange(kept.shape[1])
            stop = draw.randrange(start, kept.shape[1]) + 1
            (found,) = store.read((0,), start, stop, rows, 1)
            assert torch.equal(found.expand(rows, -1, -1), kept[:, start:stop])


def test_every_second_row_can_be_read() -> None:
    store, new = PositionTable(0), embedding(6, 5, seed=0)
    store.capture(0, 0, (new,), 0)
    (found,) = store.read((0,), 1, 4, 3, 2)
    assert torch.equal(found, new[::2, 1:4])


@pytest.mark.parametrize("columns", [[2, 0, 0], [1, 2], [0, 0, 1, 1, 2, 2]], ids=str)
def test_a_block_in_logical_order_again_reads_as_the_rows_it_has_now(columns: list[int]) -> None:
    store, new, rows = PositionTable(0), embedding(3, 8, seed=0), len(columns)
    store.capture(0, 0, (new,), 0)
    store.restore(2, 6, torch.tensor(columns), 3)
    store.restore(8, 12, torch.tensor(columns), 3)  # which has not been cached
    assert torch.equal(store.read((0,), 2, 6, rows, 1)[0], new[columns, 2:6])
    for start, stop in ((0, 2), (6, 8)):
        assert torch.equal(store.read((0,), start, stop, 3, 1)[0], new[:, start:stop])


@pytest.mark.parametrize("indices", [[2, 0], [0, 0, 1, 1, 2, 2]], ids=str)
def test_the_newest_tokens_follow_rows_that_become_fewer_or_more(indices: list[int]) -> None:
    store, new = PositionTable(0), embedding(3, 8, seed=0)
    store.capture(0, 0, (new,), 0)
    store.select(torch.tensor(indices), 5, 3)
    assert torch.equal(store.read((0,), 5, 8, len(indices), 1)[0], new[indices, 5:])
    assert torch.equal(store.read((0,), 0, 5, 3, 1)[0], new[:, :5])


def test_a_block_of_equal_rows_has_one_order_only() -> None:
    store, new = PositionTable(0), embedding(1, 8, seed=0)
    store.capture(0, 0, (new,), 0)
    store.restore(2, 6, torch.tensor([2, 0, 1]), 3)
    assert torch.equal(store.read((0,), 0, 8, 3, 1)[0], new)


def test_equal_rows_are_stored_once() -> None:
    store, new = PositionTable(100), embedding(1, 40, seed=0)
    store.capture(0, 0, (new.expand(8, -1, -1),), 0)
    (found,) = store.read((0,), 0, 40, 8, 1)
    assert found.shape == (1, 40, WIDTH)
    assert torch.equal(found, new)
    assert store.device_bytes == 100 * (WIDTH * 4 + 4)


def test_rows_that_differ_by_padding_share_their_vectors() -> None:
    store = PositionTable(0)
    store.capture(0, 0, (rotary(8, 0, 64, [0, 1, 2, 3, 4, 5, 6, 7]),), 0)
    (found,) = store.read((0,), 0, 64, 8, 1)
    assert torch.equal(found, rotary(8, 0, 64, [0, 1, 2, 3, 4, 5, 6, 7]))
    assert store.device_bytes == 64 * WIDTH * 4 + 64 * 8 * 4  # 64 vectors, an index for each token of each row


@pytest.mark.parametrize("tail", [1, 5])
def test_a_beam_search_does_not_make_the_table_grow(tail: int) -> None:
    store = PositionTable(64)
    store.capture(0, 0, (rotary(4, 0, 32, [0, 2, 5, 9]),), 0)
    store.read((0,), 0, 32, 4, 1)
    before = store.device_bytes
    for step in range(200):
        store.select(torch.tensor([step % 4, 1, 0, 3]), 32 - tail, 4)
        store.read((0,), 0, 32, 4, 1)
    assert store.device_bytes == before


def test_layers_that_share_a_tensor_share_its_storage() -> None:
    store = PositionTable(0)
    for forward in range(3):
        cos, sin = embedding(1, 4, seed=2 * forward), embedding(1, 4, seed=2 * forward + 1)
        other = embedding(1, 4, seed=100 + forward)
        assert store.capture(forward, 0, (cos, sin), 4 * forward) == (0, 1)
        assert store.capture(forward, 1, (other, sin), 4 * forward) == (2, 1)
        assert store.capture(forward, 2, (cos, sin), 4 * forward) == (0, 1)
    found = store.read((0, 2), 0, 12, 1, 1)
    assert torch.equal(found[0], torch.cat([embedding(1, 4, seed=2 * f) for f in range(3)], dim=1))
    assert torch.equal(found[1], torch.cat([embedding(1, 4, seed=100 + f) for f in range(3)], dim=1))


def test_layers_that_stop_sharing_are_refused() -> None:
    store = PositionTable(0)
    shared = embedding(1, 4, seed=0)
    store.capture(0, 0, (shared,), 0)
    store.capture(0, 1, (shared,), 0)
    store.capture(1, 0, (embedding(1, 4, seed=1),), 4)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 .*split='transfer'"):
        store.capture(1, 1, (embedding(1, 4, seed=2),), 4)


def test_what_a_failed_forward_left_behind_goes_when_it_is_tried_again() -> None:
    store = PositionTable(0)
    tries = [embedding(1, 4, seed=seed) for seed in range(3)]
    store.capture(0, 0, (tries[0],), 0)
    store.capture(1, 0, (tries[1],), 4)  # fails before its tokens are cached
    store.capture(2, 0, (tries[2],), 4)
    (found,) = store.read((0,), 0, 8, 1, 1)
    assert torch.equal(found, torch.cat([tries[0], tries[2]], dim=1))


def test_a_sequence_that_was_cropped_goes_on_as_one_and_is_read_as_it_lies() -> None:
    store, new = PositionTable(64), embedding(1, 12, seed=0)
    store.capture(0, 0, (new[:, :8],), 0)
    (first,) = store.read((0,), 0, 8, 4, 1)
    store.truncate(5)
    store.capture(1, 0, (new[:, 5:],), 5)
    (found,) = store.read((0,), 2, 12, 4, 1)
    assert torch.equal(found, new[:, 2:])
    assert found.data_ptr() == first[:, 2:].data_ptr(), "a view of the table, no copy"
    other = embedding(3, 4, seed=1)
    store.capture(2, 0, (other,), 12)  # rows that differ end that
    assert torch.equal(store.read((0,), 12, 16, 3, 1)[0], other)
    assert torch.equal(store.read((0,), 0, 12, 3, 1)[0][:1], new)


def test_rows_that_are_alike_and_more_than_there_were_are_read_and_chosen() -> None:
    """A padded batch of two, of which one row goes on and becomes four."""
    store, first, alike = PositionTable(0), embedding(2, 6, seed=0), embedding(1, 8, seed=1)
    store.capture(0, 0, (first,), 0)
    store.read((0,), 0, 6, 2, 1)
    store.capture(1, 0, (alike,), 6)
    assert torch.equal(store.read((0,), 6, 14, 4, 1)[0], alike)
    store.select(torch.tensor([3, 2]), 6, 4)
    assert torch.equal(store.read((0,), 6, 14, 2, 1)[0][:1], alike)
    store.restore(6, 10, torch.tensor([3, 1, 2, 0]), 4)
    assert torch.equal(store.read((0,), 6, 10, 4, 1)[0][:1], alike[:, :4])
    third = embedding(6, 2, seed=2)
    store.capture(2, 0, (third,), 14)  # more rows than before: the table of indices becomes wider
    assert torch.equal(store.read((0,), 14, 16, 6, 1)[0], third)
    (wide,) = store.read((0,), 6, 14, 6, 1)
    assert all(torch.equal(row, alike[0]) for row in wide)
