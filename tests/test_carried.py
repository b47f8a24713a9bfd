"""Position embeddings that travel with the blocks: where they lie, which are kept, and the same logits as without.

Small models and caches carry them anyway where rows are equal, as a table soon takes more than 1 % of what little there
is on the device; here the limit is set, so that each case is on the side it is meant for.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from chats import Chat
from matrix import FAST_LINK, TOLERANCE, Cell, check_cell, checking_backend, distance, profile, row_bytes
from models import make_model
from modes import COMMON, MODES, Outcome, given, outcome, plain_cache, prompt
from transformers import PreTrainedModel

from kvoffload import OffloadConfig
from kvoffload.cache.layer import CacheLayer
from kvoffload.config import GIB
from kvoffload.hf import OffloadedHFCache, first_tokens
from kvoffload.planning.forms import FORMS
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.placement import Kind, Placement, next_runs
from kvoffload.planning.sizing import choose_sizes
from kvoffload.session import generation_planner
from kvoffload.session.session import Session
from kvoffload.store import pool
from kvoffload.store.carried import ALIGNMENT_BYTES, CarriedPositions, PositionLayout
from kvoffload.store.forms import activation
from kvoffload.store.positions import PositionTable

BLOCK_TOKENS = 4
NEVER, ALWAYS = float("inf"), 0.0  # shares of the device that a table may take


def config(split: Any = "recompute", **options: Any) -> OffloadConfig:
    values = {"link": FAST_LINK, "profile": profile(), "device_gib": "min", "block_tokens": BLOCK_TOKENS, "slots": 2}
    return OffloadConfig(split=split, **{**values, "chunk_blocks": 2, **options})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", num_key_value_heads=4)


# ---- where they lie --------------------------------------------------------------------------------------------------

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
LAYOUTS = [  # rows, hidden, dtype, embeddings
    (1, 48, F32, ((12, F32), (12, F32))),
    (3, 48, F32, ((6, F32), (6, F32))),  # half of each head
    (2, 61, BF16, ((7, F32), (7, BF16))),  # nothing is aligned by itself
    (64, 32, F16, ((64, F16), (64, F16))),  # more rows than shares
    (5, 24, F32, ((8, F32),)),
]


@pytest.mark.parametrize(("rows", "hidden", "dtype", "given"), LAYOUTS)
@pytest.mark.parametrize("more_rows", [0, 3])
def test_a_block_gives_back_its_activation_and_its_embeddings(
    rows: int, hidden: int, dtype: torch.dtype, given: tuple[tuple[int, torch.dtype], ...], more_rows: int
) -> None:
    tokens, stored_rows = 6, rows + more_rows
    x = torch.randn(stored_rows, tokens, hidden).to(dtype)
    embeddings = tuple(torch.randn(1, tokens, width).to(kind) for width, kind in given)
    layout = PositionLayout(x, embeddings, rows)
    data = torch.full((tokens * stored_rows * layout.row_bytes,), 255, dtype=torch.uint8)
    stored = data.view(dtype).view(tokens, stored_rows, layout.row_width)
    layout.activation(stored).copy_(x.transpose(0, 1))
    layout.write(stored, embeddings)
    assert torch.equal(layout.activation(stored), x.transpose(0, 1))
    assert all(map(torch.equal, layout.read(stored), embeddings))
    half = stored[2:5]  # blocks of a chunk
    assert all(torch.equal(found, part[:, 2:5]) for found, part in zip(layout.read(half), embeddings, strict=True))


@pytest.mark.parametrize(("rows", "hidden", "dtype", "given"), LAYOUTS)
def test_the_activation_of_a_chunk_is_one_matrix_and_its_embeddings_are_stored_once(
    rows: int, hidden: int, dtype: torch.dtype, given: tuple[tuple[int, torch.dtype], ...]
) -> None:
    embeddings = tuple(torch.zeros(1, 1, width, dtype=kind) for width, kind in given)
    layout = PositionLayout(torch.zeros(rows, 1, hidden, dtype=dtype), embeddings, rows)
    stored = torch.zeros(8, rows, layout.row_width, dtype=dtype)
    matrix = layout.activation(stored).view(8 * rows, hidden)  # raises where that takes a copy
    assert matrix.stride() == (layout.row_width, 1)
    assert layout.row_bytes % ALIGNMENT_BYTES == 0
    added = rows * (layout.row_bytes - hidden * dtype.itemsize)
    once = sum(width * kind.itemsize for width, kind in given)
    assert once <= added < once + (len(given) + 2 * rows) * ALIGNMENT_BYTES  # but for alignment


# ---- which are kept --------------------------------------------------------------------------------------------------


def embedding(start: int, tokens: int, rows: int = 1) -> torch.Tensor:
    """[rows, tokens, 3], all rows equal."""
    return (
        torch.arange(start, start + tokens)
        .float()
        .view(1, -1, 1)
        .mul(torch.tensor([1.0, 0.5, -2.0]))
        .repeat(rows, 1, 1)
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_newest_tokens_keep_their_embeddings(seed: int) -> None:
    """Random forwards of one row or several, blocks stored, and crops within what is kept and into blocks."""
    draw = random.Random(seed)
    positions, cached, stored = CarriedPositions(), 0, 0
    for forward in range(60):
        if draw.random() < 0.8:
            tokens = draw.choice([1, 1, 1, 2, 9])
            given = embedding(cached, tokens, draw.choice([1, 4]))
            assert positions.capture(forward, 0, (given, 2 * given), cached) == (0, 1)
            cached += tokens
        else:
            cached = draw.randrange(cached + 1)
            if cached < stored:
                stored = cached // BLOCK_TOKENS * BLOCK_TOKENS
                if draw.random() < 0.5:
                    block = embedding(stored, BLOCK_TOKENS)
                    positions.reopen((0, 1), stored, (block, 2 * block))
                else:
                    stored = cached  # a kv block: nobody will ask for what is in it
            positions.truncate(cached)
        if stored < cached:
            start = draw.randrange(stored, cached)
            stop = draw.randrange(start, cached) + 1
            found = positions.read((0, 1), start, stop)
            assert torch.equal(found[0], embedding(start, stop - start))
            assert torch.equal(found[1], 2 * embedding(start, stop - start))
        if draw.random() < 0.4 and cached - stored >= BLOCK_TOKENS:
            assert positions.have_equal_rows((0, 1))
            stored = max(stored, cached // BLOCK_TOKENS * BLOCK_TOKENS)
            positions.drop_stored(stored)
            assert positions.device_bytes <= 2 * (cached - stored) * 4 * 3 * 4


def test_what_is_kept_is_no_view_of_what_is_gone() -> None:
    positions, prompt_embedding = CarriedPositions(), embedding(0, 1000)
    positions.capture(0, 0, (prompt_embedding,), 0)
    positions.drop_stored(998)
    assert positions.device_bytes == 2 * 3 * 4
    reference = weakref.ref(prompt_embedding)
    del prompt_embedding
    assert reference() is None
    block = embedding(996, BLOCK_TOKENS)
    for start in (998, 996):
        (found,) = positions.read((0,), start, 1000)
        assert found.untyped_storage().nbytes() <= BLOCK_TOKENS * 3 * 4
        positions.reopen((0,), 996, (block,))
    block.zero_()  # its memory belongs to other tokens now
    assert torch.equal(positions.read((0,), 996, 1000)[0], embedding(996, BLOCK_TOKENS))


def test_rows_that_differ_once_are_not_equal_any_more() -> None:
    positions = CarriedPositions()
    positions.capture(0, 0, (embedding(0, 5, rows=3),), 0)
    assert positions.have_equal_rows((0,))
    other = embedding(5, 2, rows=3)
    other[1, 1] += 1
    positions.capture(1, 0, (other,), 5)
    assert not positions.have_equal_rows((0,))
    positions.truncate(5)
    positions.capture(2, 0, (embedding(5, 2, rows=3),), 5)
    assert not positions.have_equal_rows((0,))


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("last", [True, False])
def test_one_token_of_one_stream_whose_rows_differ_is_enough(rows: int, stream: int, last: bool) -> None:
    """Also where several forwards are compared at once, whichever of them it is in."""
    positions = CarriedPositions()
    for forward in range(2):
        given = (embedding(forward, 1, rows), 2 * embedding(forward, 1, rows))
        given[stream][-1] += forward == last
        positions.capture(forward, 0, given, forward)
    assert not positions.have_equal_rows((0, 1))


# ---- what they take --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_segmented", [True, False])
def test_slots_have_room_for_them_and_tails_do_not(is_segmented: bool) -> None:
    geometry = Geometry(
        num_offloaded_layers=3,
        rows=2,
        max_tokens=100,
        kv_row_bytes=100,
        activation_row_bytes=80,
        is_segmented=is_segmented,
    )
    without, carried = (
        choose_sizes(
            replace(geometry, position_row_bytes=num_bytes),
            config(chunk_blocks=3),
            forms=FORMS,
            device_bytes=None,
            rates=None,
        )
        for num_bytes in (0, 48)
    )
    chunk_rows = 3 * BLOCK_TOKENS * 2
    slot, d2h_slot = chunk_rows * (80 + 48), chunk_rows * (80 + 48)
    assert carried == replace(without, slot_bytes=slot, d2h_slot_bytes=d2h_slot)


# ---- in generations --------------------------------------------------------------------------------------------------


@contextmanager
def watched() -> Iterator[list[Any]]:
    """How positions are kept, at each recomputation."""
    seen: list[Any] = []
    original = activation.Stored.restore

    def restore(self: Any, *args: Any) -> None:
        seen.append((self.layout is not None, type(self._positions)))
        original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation.Stored, "restore", restore)
        yield seen


PADDED = ("left_padding", "padded_beams", "returned_cache")


@pytest.mark.parametrize("pipeline", ["pipelined", "whole_layer"])
@pytest.mark.parametrize(
    ("split", "device", "blocks"), [("recompute", "min", "4x2"), (0.5, "min", "3x1"), (0.5, "half", "4x2")]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi"])
def test_logits_and_tokens_equal_plain_generate(
    architecture: str, mode: str, split: Any, device: str, blocks: str, pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_planner, "POSITION_SHARE", ALWAYS)
    with watched() as seen:
        check_cell(Cell(architecture, mode, split, device, blocks, pipeline))
    assert set(seen) == {(False, PositionTable) if mode in PADDED else (True, CarriedPositions)}


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in PADDED])
def test_logits_and_tokens_equal_plain_generate_with_a_table_of_equal_rows(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_planner, "POSITION_SHARE", NEVER)
    with watched() as seen:
        check_cell(Cell("llama", mode, 0.5, "min", "4x2", "pipelined"))
    assert set(seen) == {(False, PositionTable)}


@pytest.mark.parametrize("split", ["recompute", 0.5])
@pytest.mark.parametrize("mode", ["greedy", "beams", "assisted", "multi_turn"])
def test_frequencies_that_change_while_the_context_grows(mode: str, split: Any) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    # Not one model for both: it remembers the longest context it has seen.
    plain, ours = (make_model("llama", rope_parameters=rope, max_position_embeddings=24) for _ in range(2))
    wanted = outcome(MODES[mode].run(plain, lambda: plain_cache(plain)))
    with Session(ours, config(split), checking_backend()) as session, watched() as seen:
        found = outcome(MODES[mode].run(ours, session.new_cache))
    assert distance(found, wanted) <= TOLERANCE
    assert set(seen) == {(True, CarriedPositions)}


@pytest.mark.parametrize("method", ["read", "write"])
def test_wrong_embeddings_in_blocks_are_noticed(
    method: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = outcome(MODES["greedy"].run(model, None))
    original: Any = getattr(PositionLayout, method)

    def one_later(self: PositionLayout, stored: torch.Tensor, *given: Any) -> Any:
        parts = tuple(part.roll(1, dims=1) for part in (given[0] if given else original(self, stored)))
        return original(self, stored, parts) if given else parts

    monkeypatch.setattr(PositionLayout, method, one_later)
    with Session(model, config(), checking_backend()):
        assert distance(outcome(MODES["greedy"].run(model, None)), wanted) > TOLERANCE


# ---- caches that change ----------------------------------------------------------------------------------------------


def forms(cache: OffloadedHFCache) -> str:
    """One letter per block of the first layer; the others have the same."""
    found = {"".join(block.form[0] for block in layer.blocks) for layer in cache.core.layers}
    assert len(found) == 1
    return found.pop()


def play(
    model: PreTrainedModel, rows: int, talk: Callable[[Chat], None], *, paths: tuple[Any, ...] = ("auto", "whole_layer")
) -> list[str]:
    """Plays with a plain cache and with ours; the forms of the blocks at the end, per path."""
    found = []
    with torch.no_grad():
        plain = Chat(model, plain_cache(model), rows)
        talk(plain)
        for path in paths:
            with Session(model, config(attention=path), checking_backend()) as session, watched() as seen:
                ours = Chat(model, session.new_cache(), rows)
                talk(ours)
                found.append(forms(ours.cache))
            assert set(seen) == {(True, CarriedPositions)}
            for step, (a, b) in enumerate(zip(ours.logits, plain.logits, strict=True)):
                assert (a - b).abs().max().item() <= TOLERANCE, f"{path}, forward {step}"
    return found


@pytest.fixture(autouse=True)
def always_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_planner, "POSITION_SHARE", ALWAYS)


def test_a_turn_whose_rows_differ_is_stored_as_kv(model: PreTrainedModel) -> None:
    def talk(chat: Chat) -> None:
        chat.feed(21)
        chat.go_on(5)  # 26
        chat.feed(18, is_padded=True)  # 44
        chat.go_on(9)  # 53

    assert play(model, 3, talk) == ["aaaaaa" + "k" * 7] * 2


@pytest.mark.parametrize("into", [1, 3])
def test_a_block_that_carried_embeddings_and_is_reopened_after_rows_differed_becomes_kv(
    into: int, model: PreTrainedModel
) -> None:
    def talk(chat: Chat) -> None:
        chat.feed(21)
        chat.feed(18, is_padded=True)  # 39
        chat.go_on(3)  # 42
        chat.crop(42 - 12 - into)  # the fourth block keeps `into` tokens
        chat.go_on(9)

    assert play(model, 3, talk) == ["aaa" + "k" * ((9 + into) // BLOCK_TOKENS)] * 2


def test_a_resident_block_that_becomes_kv_goes_to_the_host_and_so_do_those_behind_it() -> None:
    placement = Placement(block_tokens=4, chunk_blocks=1, resident={"kv": 1, "activation": 2})
    runs = next_runs(
        placement,
        3,
        on_device={"kv": 1},
        on_host={},
        possible={"kv"},
        resident_room={"activation": 2},
        first=Kind("activation", "device"),
    )
    assert runs == [("kv", "host", 3)]


@pytest.mark.parametrize("removed", [1, 2, 5, 14, 22])
def test_blocks_reopened_by_a_crop_carry_their_embeddings_again(removed: int, model: PreTrainedModel) -> None:
    def talk(chat: Chat) -> None:
        chat.feed(22)
        chat.go_on(3)  # 25
        chat.crop(removed)
        chat.feed(9)
        chat.go_on(4)

    assert play(model, 2, talk) == ["a" * ((25 - removed + 13) // BLOCK_TOKENS)] * 2


def test_fewer_rows_than_shares_store_kv(model: PreTrainedModel) -> None:
    """12 bytes of embeddings in each of 6 rows: two rows cannot carry them, more rows can again."""

    def talk(chat: Chat) -> None:
        chat.feed(17)
        chat.select(0, 3)
        chat.go_on(8)  # 25
        chat.repeat(4)
        chat.go_on(8)  # 33

    assert play(model, 6, talk) == ["aaaakkaa"] * 2


def test_more_rows_carry_what_fewer_did(model: PreTrainedModel) -> None:
    def talk(chat: Chat) -> None:
        chat.feed(17)
        chat.repeat(3)
        chat.go_on(8)
        chat.select(5, 1, 1, 0)
        chat.go_on(8)

    assert play(model, 2, talk) == ["a" * 8] * 2


def test_only_the_newest_tokens_have_embeddings_outside_of_blocks(model: PreTrainedModel) -> None:
    with Session(model, config(0.5), checking_backend()) as session, torch.no_grad():
        chat = Chat(model, session.new_cache(), 2)
        chat.feed(70)
        for _ in range(30):
            chat.feed(1)
            core = chat.cache.core
            in_tail = core.layers[-1].num_tokens % BLOCK_TOKENS
            assert (core.positions.device_bytes > 0) == (in_tail > 0)
            assert core.positions.device_bytes <= 2 * 12 * 4 * 2 * in_tail  # cosines and sines, of two rows


def test_where_the_host_has_no_room_for_them_they_stay_on_the_device(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a shorter call, whose blocks carried theirs, made it look as if they always did."""
    monkeypatch.setattr(pool, "SLAB_BYTES", 1)
    tokens = 80 + COMMON["max_new_tokens"] - 1
    narrow = 3 * tokens * 2 * row_bytes(model).activation  # 3 layers, 2 rows
    wanted = [outcome([model.generate(prompt(2, length), **COMMON)]) for length in (40, 80)]
    caplog.set_level("INFO")
    with Session(model, config(host_gib=1.05 * narrow / GIB), checking_backend()):
        for length, plain, table in ((40, wanted[0], CarriedPositions), (80, wanted[1], PositionTable)):
            with watched() as seen:
                found: Outcome = outcome([model.generate(prompt(2, length), **COMMON)])
            assert distance(found, plain) <= TOLERANCE
            assert {kind for _, kind in seen} == {table}
    assert "position embeddings stay on the device" in caplog.text


def test_a_cache_whose_first_tokens_found_no_memory_decides_again(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad(), Session(model, config(), checking_backend()) as session, watched() as seen:
        chat = Chat(model, session.new_cache(), 2)
        with monkeypatch.context() as patch:
            patch.setattr(CacheLayer, "bind", lambda *args: pytest.fail("no memory"))
            with pytest.raises(pytest.fail.Exception, match="no memory"):
                chat.feed(21)
        assert isinstance(chat.cache.core.positions, CarriedPositions)
        monkeypatch.setattr(generation_planner, "POSITION_SHARE", NEVER)
        chat = Chat(model, chat.cache, 2)
        plain = Chat(model, plain_cache(model), 2)
        for one in (chat, plain):
            one.feed(21)
            one.go_on(3)
        assert set(seen) == {(False, PositionTable)}
    for ours, theirs in zip(chat.logits, plain.logits, strict=True):
        assert (ours - theirs).abs().max().item() <= TOLERANCE


def test_layers_with_more_embeddings_than_the_first_are_transferred(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[PositionLayout] = []

    class Wider(PositionLayout):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.row_bytes += ALIGNMENT_BYTES * (len(made) == 1)
            made.append(self)

    monkeypatch.setattr(first_tokens, "PositionLayout", Wider)
    wanted = outcome([model.generate(prompt(2), **COMMON)])
    with Session(model, config(), checking_backend()) as session:
        cache = session.new_cache()
        with pytest.warns(UserWarning, match=r"cannot be recomputed from its input \(layer 1\)"):
            found = outcome([model.generate(prompt(2), **given(cache), **COMMON)])
        assert [{block.form for block in layer.blocks} for layer in cache.core.layers] == [
            {"activation"},
            {"kv"},
            {"activation"},
        ]
    assert distance(found, wanted) <= TOLERANCE
