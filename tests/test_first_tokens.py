"""What follows from the first tokens of a layer: their sizes, and a measurement over all of the memory of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvoffload.backend import EmulatedBackend
from kvoffload.config import EmulatedLink
from kvoffload.hf.first_tokens import FirstTokens, prepare_measurement, way_to_recompute
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


def first_tokens(keys: torch.Tensor, values: torch.Tensor, x: torch.Tensor | None, **given: Any) -> FirstTokens:
    cache = SimpleNamespace(prompt_copies=1, positions=given.get("positions", PositionTable(0)), work=Counter())
    cache.engine = SimpleNamespace(backend=None)
    layer: Any = SimpleNamespace(cache=cache)
    return FirstTokens(layer, given.get("module"), keys, values, x, given.get("embeddings", ()))


def test_sizes_are_those_of_one_token_of_one_row() -> None:
    keys, values = torch.zeros(2, 3, 5, 8, dtype=torch.float16), torch.zeros(2, 3, 5, 6, dtype=torch.float16)
    for x, x_bytes in ((torch.zeros(2, 5, 7), 7 * 4), (None, 3 * (8 + 6) * 2)):
        found = first_tokens(keys, values, x)
        sizes = (found.rows, found.tokens, found.kv_row_bytes, found.activation_row_bytes)
        assert sizes == (2, 5, 3 * (8 + 6) * 2, x_bytes)


class Attention(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, past_key_values: Any, **kwargs: Any) -> None:
        heads = hidden_states.unsqueeze(1)
        past_key_values.update(heads, heads)


def test_what_is_not_known_of_a_layer_leaves_no_way_to_recompute_it() -> None:
    x = torch.randn(ROWS, TOKENS, HIDDEN)
    turned, kv = (torch.zeros(1, TOKENS, 2),), x.unsqueeze(1)
    assert way_to_recompute(Attention(), x, turned, kv, kv) is not None
    assert way_to_recompute(Attention(), x, (), kv, kv) is not None
    assert way_to_recompute(Attention(), x, None, kv, kv) is None
    assert way_to_recompute(Attention(), None, turned, kv, kv) is None
    assert way_to_recompute(None, x, turned, kv, kv) is None


def test_a_form_has_the_position_embeddings_where_the_cache_carries_them() -> None:
    x = torch.randn(ROWS, TOKENS, HIDDEN)
    turned, kv = (torch.randn(1, TOKENS, 2),), x.unsqueeze(1)
    differing = (torch.randn(ROWS, TOKENS, 2),)

    def form(embeddings: Any, positions: Any, most_row_bytes: int | None = None) -> Any:
        found = first_tokens(kv, kv, x, module=Attention(), embeddings=embeddings, positions=positions)
        return found.recomputing_form(most_row_bytes)

    assert form(turned, PositionTable(0)).layout is None
    carried = form(turned, CarriedPositions())
    assert carried.row.num_bytes == carried.layout.row_bytes > HIDDEN * 4
    assert form(turned, CarriedPositions(), carried.layout.row_bytes) is not None
    assert form(turned, CarriedPositions(), carried.layout.row_bytes - 1) is None  # slots have no room for it
    assert form((), CarriedPositions()).layout is None  # nothing is to be carried
    assert form(differing, CarriedPositions()) is None  # which has no place for them
    assert form(differing, PositionTable(0)) is not None


def test_a_measurement_repeats_the_tokens_and_writes_all_over_the_room(engine: TransferEngine) -> None:
    chunk_bytes = 5 * ROWS * SHAPE.row_bytes
    engine.configure(slot_bytes=0, num_slots=0, buffer_bytes=3 * chunk_bytes + 8, d2h_slot_bytes=0)
    activation, embeddings = torch.randn(ROWS, TOKENS, HIDDEN), (torch.randn(1, TOKENS, 2),)
    way = Way()
    run = prepare_measurement(engine.buffers, way, activation, embeddings, SHAPE, 5)
    for _ in range(4):
        run()
    repeated = [0, 1, 2, 0, 1]
    assert torch.equal(way.activations[0], activation.transpose(0, 1)[repeated])
    assert torch.equal(way.embeddings[0][0], embeddings[0][:, repeated])
    start = engine.buffers.measuring_room().data_ptr()
    assert [out.data_ptr() - start for out in way.outs] == [0, chunk_bytes, 2 * chunk_bytes, 0]
    assert {(out.shape, out.dtype) for out in way.outs} == {((5, ROWS, SHAPE.width), SHAPE.dtype)}


def test_a_measurement_where_a_step_has_less_room_than_a_chunk(engine: TransferEngine) -> None:
    engine.configure(slot_bytes=0, num_slots=0, buffer_bytes=8, d2h_slot_bytes=0)
    way = Way()
    prepare_measurement(engine.buffers, way, torch.zeros(ROWS, TOKENS, HIDDEN), (), SHAPE, 5)()
    assert way.outs[0].shape == (5, ROWS, SHAPE.width)
