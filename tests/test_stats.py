"""Statistics of a generation: what is counted where, and how it reads."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from matrix import profile
from models import make_model
from modes import given, prompt
from printed import paragraphs, said

import kvoffload
from kvoffload.backend import EmulatedBackend
from kvoffload.backend.base import HostBuffer
from kvoffload.planning.drafts import RoundTimes, why_none
from kvoffload.planning.plan import paragraphs as printed_paragraphs
from kvoffload.planning.verdicts import times
from kvoffload.session.session import Session
from kvoffload.units import duration, gb

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
    assert _verdict(faster) == "verdict: 2.00x as fast as the predicted full transfer (50.00 ms a step)"
    slower = replace(stats, plan=replace(stats.plan, full_transfer_step_s=0.05), decode_step_s=[0.5])
    assert _verdict(slower) == "verdict: 10.0x slower than the predicted full transfer (50.00 ms a step)"
    fitting = replace(stats, plan=unknown, fits_on_device=True)
    assert _verdict(fitting).endswith("weights and cache fit on the device: try it without offloading")


def _verdict(stats: kvoffload.GenerationStats) -> str:
    return paragraphs(stats)[-1]


# ---- beside generation without offloading ----------------------------------------------------------------------------


def test_where_everything_fits_the_verdict_is_against_plain_generation_as_the_plan_predicts_it() -> None:
    stats = _planned(EASY)
    assert stats.fits_on_device
    assert stats.predicted_step_s
    slower = stats.predicted_step_s / stats.plan.plain_step_s
    assert slower > 2, "the link is slow"
    assert stats.slowdown == pytest.approx(slower)
    assert stats.to_json()["slowdown"] == stats.slowdown
    words = (
        f"verdict: do not offload: predicted {times(slower)} slower than without, weights and cache fit on the device;"
    )
    assert _verdict(stats).startswith(words)
    assert "full transfer" in _verdict(stats)


def test_where_it_does_not_fit_the_verdict_is_against_full_transfer_alone() -> None:
    stats = _planned(replace(EASY, device_memory_bytes=100_000))
    assert stats.fits_on_device is False
    assert (stats.plan.plain_step_s, stats.slowdown) == (0.0, None)
    assert "without" not in _verdict(stats)
    assert "full transfer" in _verdict(stats)


def test_where_nothing_is_known_of_the_device_it_is_not_known_whether_it_fits() -> None:
    assert _run().fits_on_device is None


def test_a_measured_step_goes_before_the_predicted_one() -> None:
    stats = replace(_planned(EASY), decode_step_s=[0.03])
    assert _verdict(stats.compared_with(0.01)).startswith(
        "verdict: do not offload: measured 3.0x slower than without, weights and cache fit on the device (30.00 ms a "
        "token with, 10.00 ms without)"
    )
    assert "measured no faster than without" in _verdict(stats.compared_with(0.03))
    assert "offload: measured 2.0x as fast as without, though weights" in _verdict(stats.compared_with(0.06))
    unknown = replace(stats, fits_on_device=None).compared_with(0.01)
    assert "measured 3.0x slower than without (30.00 ms" in _verdict(unknown)
    assert stats.measured_plain_step_s is None, "the statistics themselves stay"
    for wrong in (0, -1.0, float("nan"), True):
        with pytest.raises(kvoffload.ConfigError, match="seconds above zero"):
            stats.compared_with(wrong)


def test_drafts_count_by_the_token_in_a_comparison() -> None:
    drafted = replace(
        _planned(EASY), draft_acceptance=0.9, tokens_per_pass=4.0, predicted_step_s=0.8, tpot_s=0.3, drafted_tokens=9
    )
    fast = replace(drafted, plan=replace(drafted.plan, plain_step_s=0.4))
    assert fast.slowdown == pytest.approx(0.5)
    assert "offload: predicted 2.0x as fast as without" in _verdict(fast)
    assert drafted.compared_with(0.1).slowdown == pytest.approx(3.0)


EASY = profile(0.05)


def _planned(machine: kvoffload.HardwareProfile, **options: Any) -> kvoffload.GenerationStats:
    """Of a run on a machine whose rates no measurement changes."""
    model = make_model("llama", num_key_value_heads=4)
    link = kvoffload.EmulatedLink(h2d_gb_per_s=0.05)
    options = {"deterministic": True, "split": "transfer"} | options
    with Session(model, kvoffload.OffloadConfig(profile=machine, link=link, **options)) as session:
        model.generate(prompt(2, 200), max_new_tokens=6, do_sample=False)
    assert session.stats is not None
    return session.stats


# ---- drafts ----------------------------------------------------------------------------------------------------------


def _not_drafted(stats: kvoffload.GenerationStats) -> str:
    found = [text for text in paragraphs(stats) if text.startswith("no drafts: ")]
    assert found == [f"no drafts: {stats.drafts_off_reason}"]
    return found[0]


def test_the_statistics_say_why_no_drafts_were_made() -> None:
    assert "speculate='off'" in _not_drafted(_planned(EASY, speculate="off"))
    assert "speculate=0" in _not_drafted(_planned(EASY, speculate=0))
    assert "not expected to gain, with only 0 tokens" in _not_drafted(_planned(EASY))
    assert "the cache is on the device" in _not_drafted(_planned(EASY, device_gib=0.5))


def test_a_gain_that_is_too_small_is_told_as_a_number() -> None:
    slow_drafts = RoundTimes(draft_s=0.9, pass_s=(1.0,) * 16, window_tokens=200, ahead_s=0.0)
    reason = why_none(slow_drafts, 1, num_on_host=3)
    gain = 1.7 / 1.9  # a draft of 0.9 s, a pass of 1 s: 1 + 0.7 tokens
    assert reason == f"not expected to gain: {gain:.2f}x as fast with them (at least 1.05x)"


def test_drafts_that_were_made_need_no_reason() -> None:
    stats = _planned(EASY, speculate=2, device_gib=1e-3)
    assert stats.drafted_tokens > 0
    assert stats.drafts_off_reason is None
    assert not [text for text in paragraphs(stats) if text.startswith("no drafts")]


def test_a_near_cache_for_drafts_that_are_off_is_told_once() -> None:
    model = make_model("llama")
    config = kvoffload.OffloadConfig(speculate="off", draft_cache="int4")
    with pytest.warns(UserWarning, match="draft_cache='int4' has no effect with speculate='off'") as told:
        session = kvoffload.offload(model, config)
    assert len(told) == 1
    with session:
        model.generate(prompt(1, 8), max_new_tokens=3, do_sample=False)


# ---- a chat ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_second_turn_of_a_chat_tells_its_own_tokens_and_its_own_memory(chunk: int | None) -> None:
    model = make_model("llama")
    config = kvoffload.OffloadConfig(split="transfer", block_tokens=8, link=LINK)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "prefill_chunk_size": chunk}
    with Session(model, config) as session:
        other, cache = session.new_cache(), session.new_cache()
        model.generate(prompt(2, 80), **how, **given(other))
        first = model.generate(prompt(2, 40), **how, **given(cache))
        stats = session.stats
        assert stats is not None
        assert (stats.prompt_tokens, stats.cached_before_tokens) == (40, 0)
        text = torch.cat([first, prompt(2, 10, seed=3)], 1)
        model.generate(text, **how, **given(cache))
        stats = session.stats
        assert (stats.prompt_tokens, stats.cached_before_tokens) == (56, 45)  # the last token is not fed back
        assert "after reading 11 prompt tokens, 45 were cached before" in said(stats)
        assert stats.tokens_per_s == pytest.approx(2 * 5 / sum(stats.decode_step_s), rel=0.05)
        assert 0 < stats.cache_host_bytes < stats.host_bytes == session.pool.used_bytes
        assert f"host {gb(stats.cache_host_bytes)}, of {gb(stats.host_bytes)} of all caches" in said(stats)
        del other
        gc.collect()
        model.generate(torch.cat([text, prompt(2, 6)], 1), **how, **given(cache))
        stats = session.stats
        assert stats.cache_host_bytes == stats.host_bytes
        assert "of all caches" not in said(stats)


def test_a_turn_that_is_given_its_new_tokens_alone_counts_them_alone() -> None:
    """As a loop does that keeps no text: the mask says how long it is."""
    model = make_model("llama")
    with Session(model, kvoffload.OffloadConfig(split="transfer", block_tokens=8, link=LINK)) as session:
        cache = session.new_cache()
        with torch.no_grad():
            model(prompt(2, 40), **given(cache))
        mask = torch.ones(2, 50, dtype=torch.long)
        model.generate(prompt(2, 10), attention_mask=mask, max_new_tokens=6, do_sample=False, **given(cache))
    stats = session.stats
    assert stats is not None
    assert (stats.prompt_tokens, stats.cached_before_tokens) == (50, 40)
    assert stats.tokens_per_s == pytest.approx(2 * 5 / sum(stats.decode_step_s), rel=0.05)


# ---- in words --------------------------------------------------------------------------------------------------------


def test_a_plan_prints_where_blocks_are_what_a_step_takes_and_the_same_verdict() -> None:
    stats = _planned(EASY)
    found = paragraphs(stats.plan)
    assert [text.partition(":")[0] for text in found] == ["plan", "step", "memory", "verdict"]
    assert found[0].startswith(f"plan: {stats.plan.in_words} (blocks of ")
    assert f"{duration(stats.plan.predicted_step_s)} predicted, limited by the link" in found[1]
    assert found[-1] == _verdict(stats).partition(";")[0] + "; this is full transfer itself"
    half = replace(stats.plan, blocks={"kv": 3, "activation": 3}, full_transfer_step_s=3 * stats.plan.predicted_step_s)
    assert "; 3.00x as fast as the predicted full transfer" in paragraphs(half)[-1]
    advised = replace(stats.plan, recommendation="Offload: it is so.")
    assert paragraphs(advised)[-1] == "verdict: Offload: it is so."
    unknown = replace(stats.plan, predicted_step_s=0.0)
    assert "verdict: none, the link has no known speed" in said(unknown)
    streamed = replace(stats.plan, weight_bytes_per_step=3_000_000, weight_device_bytes=5_000_000)
    assert "weights of layers take 5.00 MB on the device, and 3.00 MB cross the link" in said(streamed)


def test_a_number_is_not_parted_from_its_unit_at_the_end_of_a_line() -> None:
    for filler in range(60, 80):
        lines = printed_paragraphs("x" * filler + " takes 12.50 ms and 3.25 GB").splitlines()
        assert not [line for line in lines if line[-1].isdigit()]
        assert "\N{NO-BREAK SPACE}" not in "".join(lines)


def test_streamed_weights_are_shown_where_there_are_any() -> None:
    stats = _planned(EASY)
    assert "weights" not in " ".join(paragraphs(stats)[:-1])
    text = said(replace(stats, weight_bytes=4_000_000, device_weight_bytes=7_000_000))
    assert "(4.00 MB of weights)" in text
    assert "weights of layers 7.00 MB on the device" in text


@pytest.mark.parametrize(
    ("ratio", "text"), [(1.5, "1.50x"), (1.97, "2.0x"), (8.61, "8.6x"), (99.6, "100x"), (12_345.0, "12,345x")]
)
def test_ratios_have_as_many_digits_as_they_are_worth(ratio: float, text: str) -> None:
    assert times(ratio) == text


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
    assert f"plan: {text}" in said(replace(stats, plan=plan))
    assert "1 of 1 block stays" in said(replace(stats, plan=replace(plan, blocks={"resident_kv": 1})))


def test_few_bytes_are_shown_as_what_they_are() -> None:
    text = said(replace(_run(), h2d_bytes=352_256, d2h_bytes=4_096, host_bytes=12_300_000, cache_host_bytes=12_300_000))
    assert "352.26 kB to the device" in text
    assert "4.10 kB back" in text
    assert "host 12.30 MB" in text


def test_it_prints_paragraphs_that_end_in_the_verdict_and_survives_json() -> None:
    stats = _run()
    found = [text.partition(" ")[0] for text in paragraphs(stats)]
    assert found == ["first", "link", "plan:", "no", "verdict:"]
    data = json.loads(json.dumps(stats.to_json()))
    assert data["plan"]["split_fraction"] == pytest.approx(0.5, abs=0.1)
    assert data["h2d_bytes"] == stats.h2d_bytes
