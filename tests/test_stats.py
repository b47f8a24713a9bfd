"""Statistics of a generation: what is counted where, and how it reads."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import make_model

import kvoffload
from kvoffload.backend import EmulatedBackend
from kvoffload.backend.base import HostBuffer
from kvoffload.session.session import Session

SLOW_PINNING_S = 0.05
LINK = kvoffload.EmulatedLink(h2d_gb_per_s=0.2)


class SlowPinning(EmulatedBackend):
    """Host memory takes its time, as pinning does."""

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        time.sleep(SLOW_PINNING_S)
        return super().allocate_host(num_bytes)


def _run(split: Any = 0.5, new_tokens: int = 12, backend: Any = None) -> kvoffload.GenerationStats:
    model = make_model("llama")
    ids = torch.randint(3, 90, (2, 64))
    config = kvoffload.OffloadConfig(split=split, block_tokens=8, chunk_blocks=2, link=LINK)
    with Session(model, config, backend=backend) as session:
        model.generate(ids, max_new_tokens=new_tokens, do_sample=False)
    assert session.stats is not None
    return session.stats


@pytest.mark.timing
def test_pinning_is_set_up_and_neither_prefill_nor_time_to_first_token() -> None:
    _run()  # first use of everything
    usual, slow = min((_run() for _ in range(3)), key=lambda stats: stats.setup_s), _run(backend=SlowPinning(LINK))
    assert slow.setup_s >= usual.setup_s + 0.9 * SLOW_PINNING_S
    assert slow.prefill_s < slow.setup_s + usual.prefill_s
    assert slow.ttft_s < usual.ttft_s + SLOW_PINNING_S


def test_steps_bytes_and_rates_belong_together() -> None:
    stats = _run("transfer")
    assert len(stats.decode_step_s) == 11  # twelve tokens: one from the prefill, eleven steps
    assert stats.tpot_s == pytest.approx(sum(stats.decode_step_s) / 11, rel=0.05)
    assert stats.tokens_per_s == pytest.approx(2 / stats.tpot_s, rel=0.05)
    row_bytes = 2 * 2 * 12 * 4  # K and V, heads, head_dim, float32
    step_bytes = [3 * 2 * row_bytes * (cached // 8 * 8) for cached in range(64, 75)]  # layers, rows, whole blocks
    assert stats.h2d_bytes == pytest.approx(sum(step_bytes), rel=0.02)
    assert stats.d2h_bytes == 3 * 2 * row_bytes * 72  # each whole block once
    assert stats.h2d_gb_per_s == pytest.approx(0.2, rel=0.02)
    assert stats.exact
    assert stats.recomputed_tokens == 0
    assert stats.host_bytes >= stats.d2h_bytes
    assert stats.pinned_bytes == 0  # nothing is pinned without a GPU


def test_the_verdict_says_why_there_is_none_and_what_would_change_that() -> None:
    stats = _run()
    unknown = replace(stats.plan, full_transfer_step_s=0.0)
    unpaced = replace(stats, plan=unknown, link_name="emulated unpaced", link_has_speed=False)
    assert "no speed to predict with" in _verdict(unpaced)
    assert "link=kvoffload.EmulatedLink(h2d_gb_per_s=...)" in _verdict(unpaced)
    assert "profile=..." in _verdict(replace(stats, plan=unknown))
    assert "no decode step" in _verdict(replace(unpaced, decode_step_s=[]))
    everything = replace(stats.plan, full_transfer_step_s=2.0, blocks={"kv": stats.plan.num_blocks})
    slow = replace(stats, plan=everything, decode_step_s=[3.0])
    assert _verdict(slow) == "verdict: this is full transfer itself, a step took 1.50 times the predicted 2.00 s"
    faster = replace(stats, plan=replace(stats.plan, full_transfer_step_s=0.05), decode_step_s=[0.025])
    assert _verdict(faster).startswith("verdict: 2.00x as fast as the predicted full transfer (50.00 ms a step)")


def _verdict(stats: kvoffload.GenerationStats) -> str:
    return str(stats).splitlines()[-1]


@pytest.mark.parametrize(
    ("kv_blocks", "activation_blocks", "text"),
    [
        (8, 0, "offloaded tokens cross as K/V, none is recomputed"),
        (0, 8, "offloaded tokens cross as activations, all are recomputed"),
        (995, 5, "0.005 of the offloaded tokens cross as activations and are recomputed, the rest as K/V"),
        (0, 0, "nothing crosses the link; 2 of 2 blocks stay on the device"),
        (8, 0, "offloaded tokens cross as K/V, none is recomputed; 2 of 10 blocks stay on the device"),
    ],
)
def test_the_split_is_said_in_words_and_never_rounded_away(kv_blocks: int, activation_blocks: int, text: str) -> None:
    stats = _run()
    plan = replace(stats.plan, blocks={"kv": kv_blocks, "activation": activation_blocks, "resident_kv": 2})
    assert f"plan: {text}" in str(replace(stats, plan=plan))
    assert "1 of 1 block stays" in str(replace(stats, plan=replace(plan, blocks={"resident_kv": 1})))


def test_few_bytes_are_shown_as_what_they_are() -> None:
    text = str(replace(_run(), h2d_bytes=352_256, d2h_bytes=4_096, host_bytes=12_300_000))
    assert "352.26 kB to the device" in text
    assert "4.10 kB back" in text
    assert "host 12.30 MB" in text


def test_it_prints_four_lines_that_end_in_the_verdict_and_survives_json() -> None:
    stats = _run()
    lines = str(stats).splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("verdict: ")
    data = json.loads(json.dumps(stats.to_json()))
    assert data["plan"]["split_fraction"] == pytest.approx(0.5, abs=0.1)
    assert data["h2d_bytes"] == stats.h2d_bytes
