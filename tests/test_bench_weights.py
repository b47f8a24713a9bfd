"""The benchmark of streamed weights: complete rows, ratios of one round, the same tokens, and bytes that moved."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from run_script import run_script

from campaign import weights
from campaign.rows import Row, load
from campaign.weight_cells import CELLS, choose, shrunk
from campaign.weights import AS_PLANNED, NO_RECOMPUTATION, ON_DEVICE, SEQUENTIAL, Bed, Found, OnDevice, Run
from kvoffload.api import offload
from kvoffload.bench.lab import Lab
from kvoffload.machine.hardware_profile import HardwareProfile

RECORDED = HardwareProfile.load(Path(__file__).parent / "data" / "profile_emulated_2_threads.json")
OURS = {AS_PLANNED, NO_RECOMPUTATION, SEQUENTIAL}
OF_ALL = {"prefill_s", "same_tokens", "speedup_over_copy_wait_compute", "speedup_over_no_recomputation"}
OF_STEPS = {"step_s", "tokens_per_s"}
OF_OURS = {"prefill_weight_passes", "device_weight_bytes", "split_fraction"}
OF_OUR_STEPS = {
    *("weight_bytes", "h2d_bytes", "predicted_step_s", "bound_s", "fraction_of_bound", "floor_s", "fraction_of_floor"),
    *("link_utilization", "device_busy_fraction"),
}
EMULATED = [cell for cell in CELLS.values() if cell.preset.is_emulated]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Of a quick run, on a recorded machine."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(weights, "load_or_measure", lambda: RECORDED)
        done = run_script("bench_weights", "--quick", "--results", folder)
    assert done.exit_code == 0, done.output
    for cell in EMULATED:
        assert f"{cell.name}: " in done.stdout
    return load(folder / "weights.csv")


def of(rows: list[Row], cell: str, provider: str) -> dict[str, Row]:
    return {row["metric"]: row for row in rows if (row["x"], row["provider"]) == (cell, provider)}


@pytest.mark.parametrize("cell", EMULATED, ids=lambda cell: cell.name)
def test_every_provider_of_every_cell_has_all_rows(rows: list[Row], cell: Any) -> None:
    names = {row["provider"] for row in rows if row["x"] == cell.name}
    chunked = {f"{AS_PLANNED}, prompt in 4 chunks"} if cell.is_prefill else set()
    assert names == {ON_DEVICE, *OURS, *chunked, "accelerate cpu_offload"}
    for name in {*OURS, *chunked}:
        expected = OF_ALL | OF_OURS | ({"prefill_h2d_bytes"} if cell.is_prefill else OF_STEPS | OF_OUR_STEPS)
        assert set(of(rows, cell.name, name)) == expected
    assert set(of(rows, cell.name, ON_DEVICE)) == OF_ALL | (set() if cell.is_prefill else OF_STEPS)
    skipped = of(rows, cell.name, "accelerate cpu_offload")
    assert "CUDA" in skipped["skipped"]["note"]
    for row in rows:
        assert row["bench"] == "weights"
        assert row["link"].startswith("emulated ")
        assert all(row[name] for name in ("device", "versions", "commit", "date", "config_json"))


def test_tokens_are_those_of_the_device_alone(rows: list[Row]) -> None:
    same = [row for row in rows if row["metric"] == "same_tokens"]
    assert {(row["p20"], row["p80"], row["repeats"]) for row in same} == {("1", "1", "2")}


@pytest.mark.parametrize("cell", [cell for cell in EMULATED if not cell.is_prefill], ids=lambda cell: cell.name)
def test_the_bound_is_of_the_bytes_that_moved(rows: list[Row], cell: Any) -> None:
    small = shrunk(cell).preset
    for name in OURS:
        found = of(rows, cell.name, name)
        p50 = {metric: float(row["p50"]) for metric, row in found.items()}
        link_bytes_per_s = float(found["bound_s"]["link"].split()[1]) * 1e9
        assert p50["bound_s"] == pytest.approx(p50["h2d_bytes"] / link_bytes_per_s, rel=1e-4)
        # a step moves each streamed layer once, and beside it the blocks of the cache in either form
        blocks = small.layers * small.batch * small.cached_tokens * 4
        kv_bytes, x_bytes = 2 * small.kv_heads * (small.hidden // small.heads) * blocks, small.hidden * blocks
        cached = p50["h2d_bytes"] - p50["weight_bytes"]
        assert 0.99 * min(kv_bytes, x_bytes) <= cached <= 1.01 * max(kv_bytes, x_bytes)
        if name != AS_PLANNED:
            assert cached == pytest.approx(kv_bytes, rel=1e-4)  # rows have six digits
        assert p50["prefill_weight_passes"] == 1
        resident = json.loads(found["step_s"]["config_json"])["resident_layers"]
        assert resident == (3 if "half" in cell.name else 0)
        layer_bytes = p50["weight_bytes"] / (small.layers - resident)
        assert p50["device_weight_bytes"] == pytest.approx((resident + 2) * layer_bytes, rel=1e-4)


def test_weights_of_a_prefill_are_counted_in_passes(rows: list[Row]) -> None:
    passes = {row["provider"]: row["p50"] for row in rows if row["metric"] == "prefill_weight_passes"}
    assert passes[f"{AS_PLANNED}, prompt in 4 chunks"] == "4"
    for name in OURS:
        assert of(rows, "prefill 32x512", name)["prefill_weight_passes"]["p50"] == "1"


@pytest.fixture(scope="module")
def bed() -> Bed:
    cell = shrunk(CELLS["opt all link-bound"])
    return Bed(cell, Lab(cell.preset), RECORDED, new_tokens=8)


def test_every_copy_that_is_counted_has_crossed_the_link_and_steps_move_what_was_planned(bed: Bed) -> None:
    config = bed.lab.config("full_transfer", RECORDED, device_weights_gib=bed.device_weights_gib)
    with offload(bed.lab.model, config) as session:
        traffic = weights.Traffic(session)
        with traffic.counting():
            bed.generate(logits_processor=[traffic])
        session.backend.synchronize()
        assert traffic.queued_bytes == session.backend.link_use("h2d").copied_bytes
        stats = session.stats
    assert stats is not None
    assert traffic.per_step is not None
    assert tuple(traffic.per_step) == (stats.plan.link_bytes_per_step, stats.plan.weight_bytes_per_step)
    assert traffic.per_step.weight_bytes == bed.streamed_bytes
    assert sum(bed.sizes.layers) == bed.streamed_bytes


def run_of(step_s: float) -> Run:
    return Run(tokens=torch.zeros(1, 1), prefill_s=9.0, step_s=[step_s] * 3)


def test_ratios_are_of_runs_of_the_same_round(bed: Bed) -> None:
    # the machine is ten times slower in the second round, and one provider is missing in the third
    steps = [(1.0, 2.0), (10.0, 30.0), (1.0, None)]
    rounds = [
        {AS_PLANNED: run_of(mine)} | ({} if other is None else {SEQUENTIAL: run_of(other)}) for mine, other in steps
    ]
    found = Found(bed=bed, link_name="emulated 1 GB/s", rounds=rounds)
    assert found.speedups(AS_PLANNED, SEQUENTIAL) == [2.0, 3.0]
    row = of(found.rows(), bed.cell.name, AS_PLANNED)["speedup_over_copy_wait_compute"]
    assert (row["p50"], row["repeats"]) == (f"{statistics.median([2.0, 3.0]):g}", "2")


def test_accelerate_gives_the_same_tokens_and_the_model_back(bed: Bed) -> None:
    pytest.importorskip("accelerate")
    before = {name: one.clone() for name, one in bed.model.named_parameters()}
    wanted, found = OnDevice().run(bed), weights.Accelerated().run(bed)
    assert torch.equal(found.tokens, wanted.tokens)
    after = dict(bed.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(one, after[name]) for name, one in before.items())
    assert torch.equal(OnDevice().run(bed).tokens, wanted.tokens)


def test_what_fails_is_noted_and_has_no_other_row(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, bed: Bed) -> Run:
        raise torch.OutOfMemoryError("no room\nfor it")

    monkeypatch.setattr(weights.OnDevice, "run", fails)
    found = weights.measure(bed, rounds=2)
    assert found.problems[ON_DEVICE] == "no room"
    assert set(of(found.rows(), bed.cell.name, ON_DEVICE)) == {"skipped"}
    assert "no room" in str(weights.table(found).caption)


def test_cells_are_those_of_the_machine() -> None:
    assert choose(["*"], is_emulated=True) == EMULATED
    on_gpu = choose(["opt-30b", "mixtral", "llama-2"], is_emulated=False)
    assert len(on_gpu) == len(CELLS) - len(EMULATED)
    assert {str(cell.preset.dtype) for cell in on_gpu} == {"torch.float16", "torch.bfloat16"}


def test_a_cell_that_is_not_there_is_an_error_of_usage() -> None:
    done = run_script("bench_weights", "--cells", "llama-3")
    assert done.exit_code == 2
    assert "matches 'llama-3'" in done.stderr
