"""What follows from the first tokens of a layer: their sizes, and a measurement over all of the memory of a step."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvoffload.backend import EmulatedBackend
from kvoffload.config import EmulatedLink
from kvoffload.hf.first_tokens import prepare_measurement, way_to_recompute
from kvoffload.hf.layer_owner import FirstTokens
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.store.carried import CarriedPositions
from kvoffload.store.positions import PositionTable
from kvoffload.store.tail import KVShape

ROWS, TOKENS, HIDDEN = 2, 3, 4
SHAPE = KVShape(1, 4, 1, 4, torch.float32)


@pytest.fixture
def engine() -> Iterator[TransferEngine]:
    backend = EmulatedBackend(EmulatedLink())
    engine = TransferEngine(backend)
    yield engine
    engine.close()
    backend.close()


class Way:
    """A recomputation that keeps what it is given."""

    def __init__(self) -> None:
        self.activations: list[torch.Tensor] = []
        self.embeddings: list[tuple[torch.Tensor, ...]] = []
        self.outs: list[torch.Tensor] = []

    def __call__(self, activation: torch.Tensor, embeddings: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        self.activations.append(activation)
        self.embeddings.append(embeddings)
        self.outs.append(out)


def test_sizes_are_those_of_one_token_of_one_row() -> None:
    keys, values = torch.zeros(2, 3, 5, 8, dtype=torch.float16), torch.zeros(2, 3, 5, 6, dtype=torch.float16)
    assert FirstTokens.of(keys, values, torch.zeros(2, 5, 7)) == (2, 5, 3 * (8 + 6) * 2, 7 * 4)
    assert FirstTokens.of(keys, values, None) == (2, 5, 3 * (8 + 6) * 2, 3 * (8 + 6) * 2)


def test_what_is_not_known_of_a_layer_leaves_no_way_to_recompute_it() -> None:
    class Attention(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, past_key_values: Any, **kwargs: Any) -> None:
            heads = hidden_states.unsqueeze(1)
            past_key_values.update(heads, heads)

    x = torch.randn(ROWS, TOKENS, HIDDEN)
    turned, kv = (torch.zeros(1, TOKENS, 2),), x.unsqueeze(1)
    table: Any = SimpleNamespace(layout=None, cache=SimpleNamespace(positions=PositionTable(0)))
    carried: Any = SimpleNamespace(layout=None, cache=SimpleNamespace(positions=CarriedPositions()))
    for core, embeddings in ((table, turned), (table, ()), (carried, ())):
        assert way_to_recompute(Attention(), core, x, embeddings, kv, kv) is not None
    assert way_to_recompute(Attention(), carried, x, turned, kv, kv) is None  # which has no place for them
    assert way_to_recompute(Attention(), table, x, None, kv, kv) is None
    assert way_to_recompute(Attention(), table, None, turned, kv, kv) is None
    assert way_to_recompute(None, table, x, turned, kv, kv) is None


def test_a_measurement_repeats_the_tokens_and_writes_all_over_the_room(engine: TransferEngine) -> None:
    chunk_bytes = 5 * ROWS * SHAPE.row_bytes
    engine.configure(slot_bytes=0, num_slots=0, buffer_bytes=3 * chunk_bytes + 8, d2h_slot_bytes=0)
    activation, embeddings = torch.randn(ROWS, TOKENS, HIDDEN), (torch.randn(1, TOKENS, 2),)
    way = Way()
    run = prepare_measurement(engine, way, activation, embeddings, SHAPE, 5)
    for _ in range(4):
        run()
    repeated = [0, 1, 2, 0, 1]
    assert torch.equal(way.activations[0], activation.transpose(0, 1)[repeated])
    assert torch.equal(way.embeddings[0][0], embeddings[0][:, repeated])
    start = engine.measuring_room().data_ptr()
    assert [out.data_ptr() - start for out in way.outs] == [0, chunk_bytes, 2 * chunk_bytes, 0]
    assert {(out.shape, out.dtype) for out in way.outs} == {((5, ROWS, SHAPE.width), SHAPE.dtype)}


def test_a_measurement_where_a_step_has_less_room_than_a_chunk(engine: TransferEngine) -> None:
    engine.configure(slot_bytes=0, num_slots=0, buffer_bytes=8, d2h_slot_bytes=0)
    way = Way()
    prepare_measurement(engine, way, torch.zeros(ROWS, TOKENS, HIDDEN), (), SHAPE, 5)()
    assert way.outs[0].shape == (5, ROWS, SHAPE.width)
