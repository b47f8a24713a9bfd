"""Memory as allocated, not as accounted: what the backend really gave out, against the formulas of the design.

On the device: two layer buffers (three with beams), the slots, two D2H slots, the tails, the resident blocks. On the
host: each cached token once, in the form of its block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from matrix import COMMON, FAST_LINK, profile, prompt, row_bytes
from models import make_model
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from kvoffload import EmulatedLink, OffloadConfig, store
from kvoffload.backend import EmulatedBackend
from kvoffload.backend.base import HostBuffer
from kvoffload.config import GIB
from kvoffload.session import Session

LAYERS, BLOCK_TOKENS, CHUNK_BLOCKS, SLOTS = 3, 4, 2, 3


class CountingBackend(EmulatedBackend):
    """Knows which of the memory it gave out is still alive."""

    def __init__(self, link: EmulatedLink = FAST_LINK) -> None:
        super().__init__(link)
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
    monkeypatch.setattr(store, "SLAB_BYTES", 1)
    values: dict[str, Any] = {"device_gib": "min", "link": FAST_LINK, "profile": profile(), "slots": SLOTS, **options}
    config = OffloadConfig(split=split, block_tokens=BLOCK_TOKENS, chunk_blocks=CHUNK_BLOCKS, **values)
    backend = CountingBackend()
    with Session(model, config, backend) as session:
        model.generate(
            prompt(call.sequences, call.prompt_tokens),
            **{**COMMON, "max_new_tokens": call.new_tokens, "num_beams": call.beams},
        )
        assert session.stats is not None
        return backend, session.stats


def fixed_device_bytes(model: PreTrainedModel, call: Call, split: Any) -> int:
    """Everything but resident blocks."""
    kv, activation = row_bytes(model)
    stores_activations = split != "transfer"
    buffers = (3 if call.beams > 1 else 2) * call.max_tokens * call.rows * kv
    slots = SLOTS * CHUNK_BLOCKS * BLOCK_TOKENS * call.rows * activation if stores_activations else 0
    d2h_slots = 2 * CHUNK_BLOCKS * BLOCK_TOKENS * call.rows * max(kv, activation if stores_activations else 0)
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
    head_dim = model.config.head_dim
    positions = 2 * 2 * (call.max_tokens + 1) * (head_dim * 4 + call.rows * 4) if split != "transfer" else 0
    assert expected * 0.98 <= stats.device_kv_peak_decode_bytes <= expected * 1.02 + positions


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


def test_a_session_returns_all_device_memory(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in CALLS:
        backend, _ = measure(model, call, 0.5, monkeypatch)
        assert backend.device_bytes == 0


def test_buffers_are_made_anew_only_when_they_change(model: PreTrainedModel) -> None:
    """A second call of the same shape allocates its tails, and nothing else."""
    config = OffloadConfig(split=0.5, link=FAST_LINK, profile=profile(), device_gib="min", block_tokens=4, slots=2)
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
    kv, activation = row_bytes(model)
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
