"""Memory as allocated, not as accounted: what the backend really gave out, against the formulas of the plan.

On the device: two layer buffers (three with beams), the slots, two D2H slots, the tails, the resident blocks; where
attention takes chunks one by one no layer buffers, but a scratch, and nothing that grows with the context. On the host:
each cached token once, in the form of its block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from matrix import FAST_LINK, profile, row_bytes
from models import WIDE, make_model
from modes import COMMON, given, prompt
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from kvoffload import EmulatedLink, OffloadConfig
from kvoffload.backend import EmulatedBackend
from kvoffload.backend.base import HostBuffer
from kvoffload.config import GIB, MOST_DRAFTS
from kvoffload.errors import InfeasiblePlanError
from kvoffload.session.session import Session
from kvoffload.store import pool

LAYERS, BLOCK_TOKENS, CHUNK_BLOCKS, SLOTS = 3, 4, 2, 3


class CountingBackend(EmulatedBackend):
    """Knows which of the memory it gave out is still alive."""

    def __init__(self, link: EmulatedLink = FAST_LINK) -> None:
        super().__init__(link)
        self.decode_device_bytes = 0  # the most seen between two tokens
        self._device: list[tuple[StorageWeakRef, int]] = []
        self._host: dict[int, int] = {}
        self.peak_device_bytes = self.peak_host_bytes = self.num_allocations = 0

    @property
    def device_bytes(self) -> int:
        self._device = [(reference, size) for reference, size in self._device if not reference.expired()]
        return sum(size for _, size in self._device)

    @property
    def host_bytes(self) -> int:
        return sum(self._host.values())

    def allocate_device(self, num_bytes: int) -> torch.Tensor:
        self.num_allocations += 1
        tensor = super().allocate_device(num_bytes)
        self._device.append((StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()))
        self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)
        return tensor

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        buffer = super().allocate_host(num_bytes)
        self._host[buffer.tensor.data_ptr()] = buffer.tensor.untyped_storage().nbytes()
        self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)
        return buffer

    def release_host(self, buffer: HostBuffer) -> None:
        super().release_host(buffer)
        del self._host[buffer.tensor.data_ptr()]


class Call(NamedTuple):
    """A generation whose memory is looked at."""

    sequences: int
    prompt_tokens: int
    new_tokens: int
    beams: int = 1

    @property
    def rows(self) -> int:
        return self.sequences * self.beams

    @property
    def max_tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens - 1


CALLS = [Call(4, 96, 33), Call(1, 203, 18), Call(2, 97, 24, beams=3), Call(1, 160, 48, beams=4)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", num_key_value_heads=4)


def measure(
    model: PreTrainedModel, call: Call, split: Any, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[CountingBackend, Any]:
    """Generate with exact slabs (else a slab is 64 MiB at least); the backend and the statistics."""
    monkeypatch.setattr(pool, "SLAB_BYTES", 1)
    values: dict[str, Any] = {"device_gib": "min", "link": FAST_LINK, "profile": profile(), "slots": SLOTS}
    values |= {"block_tokens": BLOCK_TOKENS, "chunk_blocks": CHUNK_BLOCKS, "attention": "whole_layer", **options}
    backend = CountingBackend()

    def look(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] > call.prompt_tokens + 1:  # after the first decode step
            backend.decode_device_bytes = max(backend.decode_device_bytes, backend.device_bytes)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    with Session(model, OffloadConfig(split=split, **values), backend) as session:
        model.generate(
            prompt(call.sequences, call.prompt_tokens),
            stopping_criteria=[look],
            **{**COMMON, "max_new_tokens": call.new_tokens, "num_beams": call.beams},
        )
        assert session.stats is not None
        return backend, session.stats


def stored_activation_bytes(model: PreTrainedModel, call: Call) -> int:
    """A row of an activation block: behind the activation its share of the token's position embeddings.

    Sequences share them, beams do not: their prompt is stored once.
    """
    _, activation = row_bytes(model)
    cos_and_sin = 2 * model.config.head_dim * 4
    return activation + -(-cos_and_sin // call.sequences // 16) * 16


def newest_position_bytes(model: PreTrainedModel, call: Call) -> int:
    """Position embeddings of the tokens that are in no block yet, as transformers made them."""
    return 2 * model.config.head_dim * 4 * (BLOCK_TOKENS + 1) * call.rows


def fixed_device_bytes(model: PreTrainedModel, call: Call, split: Any, path: str = "whole_layer") -> int:
    """Everything but resident blocks."""
    kv, activation = row_bytes(model)
    stores_activations = split != "transfer"
    stored = stored_activation_bytes(model, call) if stores_activations else 0
    chunk_rows = CHUNK_BLOCKS * BLOCK_TOKENS * call.rows
    if path == "whole_layer":
        buffers = (3 if call.beams > 1 else 2) * call.max_tokens * call.rows * kv
        slots = SLOTS * chunk_rows * stored
    else:
        buffers = chunk_rows * kv if stores_activations else 0  # the scratch
        slots = SLOTS * chunk_rows * max(kv, stored)
    d2h_slots = 2 * CHUNK_BLOCKS * BLOCK_TOKENS * call.rows * max(kv, stored)
    tails = LAYERS * BLOCK_TOKENS * call.rows * (kv + (activation if stores_activations else 0))
    return buffers + slots + d2h_slots + tails


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_device_memory_is_buffers_slots_and_tails(
    call: Call, split: Any, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, stats = measure(model, call, split, monkeypatch)
    expected = fixed_device_bytes(model, call, split)
    assert backend.peak_device_bytes == pytest.approx(expected, rel=0.02)
    # The statistics add the position embeddings, which the backend did not allocate.
    positions = newest_position_bytes(model, call) if split != "transfer" else 0
    assert expected * 0.98 <= stats.device_kv_peak_decode_bytes <= expected * 1.02 + positions


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_over_segments_device_memory_is_slots_scratch_and_tails(
    call: Call, split: Any, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, stats = measure(model, call, split, monkeypatch, attention="auto")
    expected = fixed_device_bytes(model, call, split, "auto")
    assert backend.decode_device_bytes == pytest.approx(expected, rel=0.02)
    positions = newest_position_bytes(model, call) if split != "transfer" else 0
    assert expected * 0.98 <= stats.device_kv_peak_decode_bytes <= expected * 1.02 + positions
    kv, _ = row_bytes(model)
    stages = 2 * call.prompt_tokens * call.rows * kv  # of one layer each, while the prompt is written back
    assert backend.peak_device_bytes <= expected + stages


@pytest.mark.parametrize("attention", ["auto", "whole_layer"])
def test_nothing_is_set_aside_for_recomputing_where_activations_are_no_smaller(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped = make_model("llama")
    kv, activation = row_bytes(grouped)
    assert activation >= kv
    (free, free_stats), (transfer, _) = (
        measure(grouped, CALLS[0], split, monkeypatch, attention=attention) for split in ("auto", "transfer")
    )
    assert free_stats.recomputed_tokens == 0
    assert free.peak_device_bytes == pytest.approx(transfer.peak_device_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("architecture", "split", "rows", "longest"),
    [
        ("llama", "transfer", 2, 8192),
        ("opt", "recompute", 2, 8192),
        ("opt", 0.5, 2, 8192),
        ("llama", "recompute", 1, 16384),
        ("llama", "recompute", 3, 8192),
        ("llama", 0.5, 2, 8192),
    ],
)
def test_over_segments_device_memory_does_not_grow_with_the_context(
    architecture: str, split: Any, rows: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 1,000 to 8,000 or 16,000 tokens, in sizes of our own choice; the prefill's too where it comes in chunks."""
    long = make_model(architecture, max_position_embeddings=2**15, num_hidden_layers=2)
    peaks = []
    for tokens in (1024, longest):
        options = {"block_tokens": "auto", "chunk_blocks": "auto", "slots": "auto", "attention": "auto"}
        monkeypatch.setitem(COMMON, "prefill_chunk_size", 256)
        backend, stats = measure(long, Call(rows, tokens, 6), split, monkeypatch, **options)
        peaks.append((stats.device_kv_peak_decode_bytes, stats.device_kv_peak_prefill_bytes, backend.peak_device_bytes))
    for short, grown in zip(*peaks, strict=True):
        assert grown == pytest.approx(short, rel=0.01)


class LiveTensors(TorchDispatchMode):
    """The most bytes alive at once of what was made while this was active, whoever made it."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return result


@pytest.mark.parametrize("path", ["auto", "whole_layer"])
def test_no_tensor_of_a_decode_step_over_segments_is_as_long_as_the_cache(path: Any) -> None:
    """Counted over every operation of a step, transformers' own included: what grows is masks, a few bytes a token."""
    long = make_model("llama", max_position_embeddings=2**15, num_hidden_layers=2)
    kv, _ = row_bytes(long)
    peaks = {}
    for tokens in (1024, 8192):
        config = OffloadConfig(split="transfer", link=FAST_LINK, profile=profile(), device_gib="min", attention=path)
        with Session(long, config, EmulatedBackend(FAST_LINK)) as session, torch.no_grad():
            cache = session.new_cache()
            for _ in range(tokens // 512):
                long(prompt(1, 512), **given(cache))
            long(prompt(1, 1), **given(cache))
            with LiveTensors() as live:
                for _ in range(3):
                    long(prompt(1, 1), **given(cache))
            peaks[tokens] = live.peak_bytes + session.engine.account.take_peak()
    growth = (peaks[8192] - peaks[1024]) / (8192 - 1024)  # bytes per cached token
    if path == "auto":
        assert growth <= 0.05 * kv
    else:
        assert growth >= kv


@pytest.mark.parametrize("split", ["transfer", 0.5])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_resident_blocks_take_what_the_budget_leaves(
    call: Call, split: Any, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv, _ = row_bytes(model)
    fixed = fixed_device_bytes(model, call, split)
    cached = LAYERS * call.max_tokens * call.rows * kv
    budget = fixed + cached // 3
    backend, stats = measure(model, call, split, monkeypatch, device_gib=budget / GIB)
    resident = LAYERS * stats.plan.resident_kv_blocks * BLOCK_TOKENS * call.rows * kv
    assert resident > 0
    assert backend.peak_device_bytes == pytest.approx(fixed + resident, rel=0.02)
    assert backend.peak_device_bytes <= budget
    assert fixed + resident > budget - LAYERS * BLOCK_TOKENS * call.rows * kv  # not one block more would fit


@pytest.mark.parametrize("number", [1, 4, 15])
@pytest.mark.parametrize("call", [CALLS[0], CALLS[1]], ids=str)
def test_with_drafts_device_memory_is_that_of_the_plan(
    call: Call, number: int, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window in the place of resident blocks, and room in the tails for 16 tokens ahead, 32 of rows that differ."""
    kv, _ = row_bytes(model)
    ahead = (MOST_DRAFTS + 1) * (1 if call.rows == 1 else 2)
    fixed = fixed_device_bytes(model, call, "transfer", "auto") + LAYERS * ahead * call.rows * kv
    budget = fixed + LAYERS * call.max_tokens * call.rows * kv // 3
    options: dict[str, Any] = {"attention": "auto", "speculate": number, "device_gib": budget / GIB}
    backend, stats = measure(model, call, "transfer", monkeypatch, **options)
    resident = LAYERS * stats.plan.resident_kv_blocks * BLOCK_TOKENS * call.rows * kv
    assert resident > 0
    assert backend.decode_device_bytes == pytest.approx(fixed + resident, rel=0.02)
    assert stats.device_kv_peak_decode_bytes == pytest.approx(stats.plan.device_bytes, rel=0.02)
    assert backend.decode_device_bytes <= budget


@pytest.mark.parametrize("share", [0.35, 0.6])
@pytest.mark.parametrize("call", [CALLS[0], CALLS[1]], ids=str)
def test_copies_of_all_blocks_are_in_the_plan(call: Call, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside exact ones, for which they leave room."""
    wide = make_model("llama", **WIDE)
    kv, _ = row_bytes(wide)
    budget = fixed_device_bytes(wide, call, "transfer", "auto") + LAYERS * 2 * (MOST_DRAFTS + 1) * call.rows * kv
    budget += int(LAYERS * call.max_tokens * call.rows * kv * share)
    options: dict[str, Any] = {"attention": "auto", "speculate": 4, "draft_cache": "int4", "device_gib": budget / GIB}
    backend, stats = measure(wide, call, "transfer", monkeypatch, **options)
    assert stats.draft_cache == "int4"
    assert stats.plan.resident_kv_blocks > 0
    assert stats.device_kv_peak_decode_bytes == pytest.approx(stats.plan.device_bytes, rel=0.02)
    assert backend.decode_device_bytes <= budget


@pytest.mark.parametrize("split", ["transfer", 0.5])
def test_layers_that_stay_on_the_device_count_in_the_budget(split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three layers has a window; its K and V are held by transformers, beside what the session holds."""
    sliding = make_model("gemma3_text", sliding_window=64, num_key_value_heads=4)
    call, (kv, _) = Call(4, 96, 33), row_bytes(sliding)
    others = call.rows * 64 * kv
    cached = 2 * call.max_tokens * call.rows * kv
    backend, stats = measure(sliding, call, split, monkeypatch, device_gib=cached / GIB, attention="auto")
    block = 2 * BLOCK_TOKENS * call.rows * kv
    assert stats.plan.resident_kv_blocks > 0
    assert cached - 2 * block < stats.device_kv_peak_decode_bytes <= cached
    assert stats.plan.device_bytes - others == pytest.approx(backend.peak_device_bytes, rel=0.02)
    with pytest.raises(InfeasiblePlanError, match=r"layers that are not offloaded .* device_gib allows"):
        measure(sliding, call, split, monkeypatch, device_gib=others / GIB, attention="auto")


def test_a_session_returns_all_device_memory(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in CALLS:
        backend, _ = measure(model, call, 0.5, monkeypatch)
        assert backend.device_bytes == 0


def test_buffers_are_made_anew_only_when_they_change(model: PreTrainedModel) -> None:
    """A second call of the same shape allocates its tails, and nothing else."""
    config = OffloadConfig(
        split=0.5,
        link=FAST_LINK,
        profile=profile(),
        device_gib="min",
        block_tokens=4,
        slots=2,
        attention="whole_layer",
    )
    backend = CountingBackend()
    with Session(model, config, backend):
        for _ in range(3):
            model.generate(prompt(2), **COMMON)
            held = backend.device_bytes
        host, allocations = backend.host_bytes, backend.num_allocations
        model.generate(prompt(2), **COMMON)
        assert backend.num_allocations == allocations + 2 * LAYERS  # K/V and activations of each tail
        assert backend.device_bytes == held
        assert backend.host_bytes == host
        model.generate(prompt(2, 90), **COMMON)
        assert backend.device_bytes > held
        assert backend.host_bytes == host  # still within the slab


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_host_memory_holds_every_token_once_in_its_form(
    call: Call, split: Any, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv, _ = row_bytes(model)
    activation = stored_activation_bytes(model, call)
    row = {"transfer": kv, "recompute": activation, 0.5: (kv + activation) / 2}[split]
    num_blocks, prompt_blocks = call.max_tokens // BLOCK_TOKENS, call.prompt_tokens // BLOCK_TOKENS
    if call.beams == 1:
        prompt_blocks = 0
    stored_rows = prompt_blocks * call.sequences + (num_blocks - prompt_blocks) * call.rows  # beams share their prompt
    expected = LAYERS * stored_rows * BLOCK_TOKENS * row
    # Block rounding: one block more of either form where both occur, and the alignment of each extent.
    rounding = LAYERS * ((BLOCK_TOKENS * call.rows * (kv + activation) if split == 0.5 else 0) + 2 * 256)
    backend, stats = measure(model, call, split, monkeypatch)
    assert expected * 0.98 <= backend.peak_host_bytes <= expected * 1.02 + rounding
    assert expected * 0.98 <= stats.host_bytes <= expected * 1.02 + rounding
