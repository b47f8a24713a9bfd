"""Too little memory on host or device: said before the first token, with the numbers and the way out, or lived within.

After every fault the model generates plainly, and the same as before; no hook, thread or memory of ours is left.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faults import config, generate, no_forward
from faults import model_fixture as model_fixture
from faults import nothing_is_left as nothing_is_left
from faults import wanted_fixture as wanted_fixture
from matrix import TOLERANCE, distance
from models import make_model
from modes import MODES, Outcome, given, outcome, prompt
from transformers import PreTrainedModel

import kvoffload
from kvoffload import EmulatedLink, HostMemoryError, InfeasiblePlanError, OffloadConfig
from kvoffload.backend import EmulatedBackend
from kvoffload.model.model_shape import model_shape
from kvoffload.session import memory_limits
from kvoffload.session.memory_limits import MemoryLimits
from kvoffload.units import gib


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5, "auto"])
def test_too_little_host_memory(split: Any, model: PreTrainedModel) -> None:
    row = {"transfer": 384, "recompute": 192, 0.5: 288, "auto": 192}[split]  # bytes of a token, in one layer
    needed = 3 * 48 * 3 * row  # rows, tokens, layers
    for cap_bytes in (needed - 100, needed // 2, 1000):
        with kvoffload.offload(model, config(split=split, host_gib=cap_bytes / 2**30)) as session:
            message = f"offloading 3 sequences of 48 tokens needs {gib(needed)} of host memory, {gib(cap_bytes)}"
            with no_forward(model), pytest.raises(HostMemoryError, match=message) as caught:
                generate(model)
            assert session.pool.slab_bytes == 0
        assert "raise host_gib, or lower the batch or max_new_tokens" in str(caught.value)


def test_one_sequence_is_not_counted_as_several(model: PreTrainedModel) -> None:
    for caps in ({"host_gib": 1e-6}, {"device_gib": 1e-6}):
        with (
            kvoffload.offload(model, config(**caps)),
            pytest.raises(kvoffload.KVOffloadError, match="offloading 1 sequence of 15 tokens needs "),
        ):
            model.generate(prompt(1, 8), max_new_tokens=8)


def test_host_memory_for_beams_counts_their_prompt_once(model: PreTrainedModel, wanted: Outcome) -> None:
    """37 tokens of 2 prompts and 11 tokens of 6 beams, in whole blocks of 4."""
    least = 3 * 384 * (2 * 36 + 6 * 12)
    with kvoffload.offload(model, config(split="transfer", host_gib=(least + 3 * 384 * 6 * 4) / 2**30)):
        MODES["beams"].run(model, None)
    with (
        kvoffload.offload(model, config(split="transfer", host_gib=0.8 * least / 2**30)),
        no_forward(model),
        pytest.raises(HostMemoryError, match="6 sequences of 48 tokens"),
    ):
        MODES["beams"].run(model, None)


def test_too_little_device_memory(model: PreTrainedModel) -> None:
    with (
        kvoffload.offload(model, config(device_gib=1e-5)) as session,
        no_forward(model),
        pytest.raises(
            InfeasiblePlanError, match=r"3 sequences of 48 tokens needs at least \d+\.\d\d KiB .*raise device_gib"
        ),
    ):
        generate(model)
    assert session.engine.account.held_bytes == {}


def test_host_memory_that_runs_out_while_decoding(model: PreTrainedModel, wanted: Outcome) -> None:
    """A custom loop does not say how long it gets: the cap is met later, and nothing is lost but that cache."""

    def loop(cache: Any) -> None:
        for step in range(1000):
            model(prompt(3, 5, seed=step), **given(cache))

    with kvoffload.offload(model, config(host_gib=800_000 / 2**30)) as session:
        message = (
            r"the cache needs \S+ KiB more host memory, \S+ K?i?B of the cap of 781\.25 KiB are left: raise host_gib"
        )
        with torch.no_grad(), pytest.raises(HostMemoryError, match=message):
            loop(session.new_cache())
        session.new_cache()
        assert session.pool.used_bytes == 0
        assert distance(outcome([generate(model)]), wanted) <= TOLERANCE


def test_chunks_larger_than_the_cache_take_no_more_memory_than_it(model: PreTrainedModel) -> None:
    wanted = outcome([generate(model)])
    with kvoffload.offload(model, config(chunk_blocks=10**6)) as session:
        assert distance(outcome([generate(model)]), wanted) <= TOLERANCE
        assert session.stats is not None
        assert session.stats.device_kv_peak_decode_bytes < 2**20


@pytest.mark.parametrize("split", ["auto", "transfer", 0.3, 0.5, "recompute"])
def test_a_host_cap_is_refused_before_any_token_or_holds_to_the_end(split: Any) -> None:
    """In steps of a twentieth around what the cache takes, whatever the corrections of the plan would like."""
    model = make_model("opt")
    ids = prompt(3, 24)
    everything = 3 * 48 * 3 * 384  # layers, tokens, rows, bytes of K and V
    finished = []
    for twentieths in range(8, 30):
        options = {"block_tokens": 4, "chunk_blocks": 1, "host_gib": everything * twentieths / 20 / 2**30}
        with kvoffload.offload(model, config(split=split, **options)) as session:
            before = session.num_forwards
            try:
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False)
                finished.append(twentieths)
            except kvoffload.KVOffloadError:
                assert session.num_forwards == before, (split, twentieths)
    assert finished
    assert finished == list(range(finished[0], 30))
    assert finished[0] <= {"transfer": 20, "recompute": 10}.get(split, 24)


def test_a_further_turn_that_the_host_cap_does_not_hold_is_refused_before_its_first_token() -> None:
    model = make_model("opt")
    ids = prompt(3, 24)
    options = {"block_tokens": 4, "chunk_blocks": 1, "host_gib": 3 * 300 * 3 * 384 / 2**30}
    with kvoffload.offload(model, config(split="transfer", **options)) as session:
        cache = session.new_cache()
        call = {**given(cache), "do_sample": False}
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **call)
        before = session.num_forwards
        with pytest.raises(HostMemoryError, match="raise host_gib"):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=300, **call)
        assert session.num_forwards == before


@pytest.mark.parametrize(("fraction", "allowed"), [(1.0, 60 + 10), (0.5, 50 - 20)])
def test_a_cap_on_the_process_is_no_free_memory(
    fraction: float, allowed: int, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 bytes in all, 60 free, 30 reserved by PyTorch, 20 of those in use."""
    facts = {"mem_get_info": (60, 100), "memory_reserved": 30, "memory_allocated": 20}
    for name, value in {**facts, "get_per_process_memory_fraction": fraction}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(memory_limits, "DEVICE_SHARE", 1.0)
    backend = EmulatedBackend(EmulatedLink())
    try:
        limits = MemoryLimits(OffloadConfig(), model_shape(model.config), backend)
        assert limits._free_device_bytes(held_bytes=7) == allowed + 7
    finally:
        backend.close()
