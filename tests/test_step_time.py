"""Tests of the cost model: formulas against numbers worked out by hand, and the table's sums against the formulas."""

from __future__ import annotations

import dataclasses
import random

import closed_forms
import pytest
from placements import INPUTS, random_placement, with_rates

from kvoffload.planning import step_time


def test_the_link_carries_both_forms_at_their_own_rates() -> None:
    # 3 layers * 2 tokens * (4 blocks * 20 bytes / 80 + 3 blocks * 40 bytes / 200)
    assert closed_forms.link_s(INPUTS, 4, 3) == pytest.approx(6 * (1.0 + 0.6))


def test_the_device_recomputes_resident_and_transferred_activations_and_attends_everything() -> None:
    # 4 * dense + head + 3 layers * 2 tokens * (0.25 * (1 + 4) + 0.125 * 10)
    assert closed_forms.device_s(INPUTS, 1, 4) == pytest.approx(12 + 5 + 6 * (1.25 + 1.25))


def test_the_host_issues_whole_chunks_of_each_form() -> None:
    # 4 layers * 7 + 3 layers * 0.5 * (2 chunks of 3 blocks + 1 chunk of 1 block)
    assert closed_forms.host_s(INPUTS, 3, 1) == pytest.approx(28 + 1.5 * 3)


def test_the_gap_counts_as_far_as_the_ring_cannot_hide_it() -> None:
    ring_s = 2 * 2 * 2 * 20 / 200  # slots * blocks * tokens * bytes / bandwidth
    hidden, exposed = with_rates(INPUTS, gap_s=ring_s), with_rates(INPUTS, gap_s=ring_s + 3)
    assert closed_forms.link_s(hidden, 4, 3) == closed_forms.link_s(INPUTS, 4, 3)
    assert closed_forms.link_s(exposed, 4, 3) == pytest.approx(closed_forms.link_s(INPUTS, 4, 3) + 3)


@pytest.mark.parametrize(
    ("changes", "binding"),
    [
        ({"host_s_per_layer": 0.0, "dense_s": 0.0, "h2d_kv_bytes_per_s": 1.0}, "link"),
        ({"host_s_per_layer": 0.0, "dense_s": 90.0}, "device"),
        ({"host_s_per_layer": 90.0}, "host"),
    ],
)
def test_the_longest_of_the_three_is_the_step(changes: dict[str, float], binding: str) -> None:
    inputs = with_rates(INPUTS, **changes)
    terms = {
        "link": closed_forms.link_s(inputs, 4, 3),
        "device": closed_forms.device_s(inputs, 1, 4),
        "host": closed_forms.host_s(inputs, 4, 3),
    }
    assert closed_forms.predict_step_s(inputs, 2, 1, 4, 3) == (terms[binding], binding)
    assert terms[binding] == max(terms.values())


@pytest.mark.parametrize("recompute_s", [0.01, 0.25])  # kv transfer and recomputation the longer one
def test_the_papers_schedule_has_a_barrier_in_every_layer(recompute_s: float) -> None:
    inputs = with_rates(INPUTS, recompute_s_per_token=recompute_s, dense_s=0.0, head_s=0.0, host_s_per_layer=0.0)
    kvpr = dataclasses.replace(inputs, schedule="kvpr")
    x, t = 6, 4  # per layer: 2 tokens a block
    by_hand = 3 * (2 * 20 * x / 80 + max(2 * recompute_s * x, 2 * 40 * t / 200) + 2 * 10 * 0.125)
    assert closed_forms.predict_step_s(kvpr, 0, 0, x, t) == (pytest.approx(by_hand), "link")
    assert closed_forms.predict_step_s(kvpr, 0, 0, 0, 10) == closed_forms.predict_step_s(
        inputs, 0, 0, 0, 10
    )  # nothing to wait for


def test_without_overlap_copies_gap_and_compute_add_up() -> None:
    inputs = dataclasses.replace(with_rates(INPUTS, gap_s=0.75, host_s_per_layer=0.0), weight_bytes_per_step=500)
    by_hand = 6 * (1.0 + 0.6) + 500 / 200 + 0.75 + closed_forms.device_s(inputs, 1, 4)
    assert closed_forms.sequential_step_s(inputs, 1, 4, 3) == pytest.approx(by_hand)
    busy_host = with_rates(inputs, host_s_per_layer=99.0)
    assert closed_forms.sequential_step_s(busy_host, 1, 4, 3) == closed_forms.host_s(busy_host, 4, 3)


def test_streamed_weights_and_micro_batches_do_nothing_at_zero_and_one() -> None:
    plain = closed_forms.terms(INPUTS)
    assert closed_forms.terms(dataclasses.replace(INPUTS, weight_bytes_per_step=0, num_micro_batches=1)) == plain
    streamed = closed_forms.terms(dataclasses.replace(INPUTS, weight_bytes_per_step=1000, num_micro_batches=2))
    assert streamed.link_fixed_s == plain.link_fixed_s + 1000 / 200  # once for both micro-batches
    assert streamed.host_s(3, 1) == 2 * plain.host_s(3, 1)


def test_memory_counts_every_offloaded_layer() -> None:
    assert closed_forms.device_bytes(INPUTS, 2, 1) == 1_000 + 3 * 2 * (2 * 40 + 1 * 20)
    assert closed_forms.host_bytes(INPUTS, 4, 3) == 3 * 2 * (4 * 20 + 3 * 40)
    assert closed_forms.resident_capacity_bytes(INPUTS) == (10_000 - 1_000) // 6
    assert closed_forms.host_capacity_bytes(INPUTS) == 10_000 // 6


def test_full_transfer_keeps_resident_what_fits() -> None:
    inputs = dataclasses.replace(INPUTS, device_bytes=1_000 + 6 * 40 * 4 + 239)
    inputs = with_rates(inputs, dense_s=0.0, head_s=0.0, attention_s_per_token=0.0, host_s_per_layer=0.1)
    assert closed_forms.predict_step_s(inputs, 4, 0, 0, 6)[1] == "link"
    assert closed_forms.full_transfer_step_s(inputs) == closed_forms.predict_step_s(inputs, 4, 0, 0, 6)[0]
    all_fits = dataclasses.replace(inputs, device_bytes=10**6)
    assert closed_forms.full_transfer_step_s(all_fits) == closed_forms.predict_step_s(inputs, 10, 0, 0, 0)[0]
    nothing_fits = dataclasses.replace(inputs, device_bytes=0)
    assert closed_forms.full_transfer_step_s(nothing_fits) == closed_forms.predict_step_s(inputs, 0, 0, 0, 10)[0]


def test_the_sums_over_the_table_are_the_formulas() -> None:
    rng = random.Random(5)
    for _ in range(300):
        inputs, (r, r_x, x, t) = random_placement(rng)
        changes = {"schedule": rng.choice(["pipelined", "kvpr"]), "chunk_blocks": rng.choice([1, 2, 3])}
        inputs = dataclasses.replace(inputs, num_micro_batches=rng.choice([1, 2]), **changes)
        blocks = {"resident_kv": r, "resident_activation": r_x, "activation": x, "kv": t}
        found = step_time.predict(inputs, blocks)
        expected_s, binding = closed_forms.predict_step_s(inputs, r, r_x, x, t)
        assert found.step_s == pytest.approx(expected_s, rel=1e-12)
        assert found.binding == binding
        parts = (
            closed_forms.link_s(inputs, x, t),
            closed_forms.device_s(inputs, r_x, x),
            closed_forms.host_s(inputs, x, t),
        )
        assert (found.link_s, found.device_s, found.issue_s) == pytest.approx(parts, rel=1e-12)
        assert inputs.fixed_device_bytes + found.bytes["device"] == closed_forms.device_bytes(inputs, r, r_x)
        assert found.bytes["host"] == closed_forms.host_bytes(inputs, x, t)
        in_turn = closed_forms.sequential_step_s(inputs, r_x, x, t)
        assert step_time.sequential_step_s(inputs, blocks) == pytest.approx(in_turn, rel=1e-12)
        full_s = closed_forms.full_transfer_step_s(inputs)
        assert step_time.full_transfer_step_s(inputs) == pytest.approx(full_s, rel=1e-12)
