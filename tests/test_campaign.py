"""The campaign: equal figures for all providers, a reason for whatever cannot run, nothing lost by an interruption."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from campaigns import TINY, tiny_cell

from campaign import campaign, rows
from campaign.cells import Cell
from campaign.providers import Bed, DynamicCache, Ours, WholeLayerBothWays, providers
from campaign.serving import LatencyObjective, Outcome
from campaign.tables import campaign_tables
from kvoffload.advise.utilization import peak_flops_per_s
from kvoffload.bench.lab import Lab
from kvoffload.bench.presets import PRESETS, Preset
from kvoffload.errors import ConfigError
from kvoffload.machine.hardware_profile import HardwareProfile


@pytest.fixture(scope="module", autouse=True)
def _recorded_profile() -> Iterator[None]:
    """A machine that need not be measured."""
    recorded = HardwareProfile.load(Path(__file__).parent / "data" / "profile_emulated_2_threads.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "load_or_measure", lambda: recorded)
        yield


def _run(cells: list[Cell], names: list[str], path: Path, **settings: Any) -> list[str]:
    told: list[str] = []
    chosen = [providers()[name] for name in names]
    campaign.run(cells, chosen, path, campaign.Settings(**settings), told.append)
    return told


def _figures(path: Path) -> dict[str, dict[str, Any]]:
    return campaign.summary(rows.load(path))["tiny"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All providers in one cell with room for two of three sequences."""
    path = tmp_path_factory.mktemp("campaign") / "rows.csv"
    _run([tiny_cell()], list(providers()), path)
    return path


def test_every_provider_has_figures_or_a_reason(measured: Path) -> None:
    figures = _figures(measured)
    assert set(figures) == set(providers())
    for name, found in figures.items():
        assert ("note" in found) != ("tpot" in found), name
        if "tpot" in found:
            assert {"ttft", "inter_token_latency_p99", "decode_tokens_per_s", "goodput_tokens_per_s", "mfu"} <= set(
                found
            )
    assert "needs CUDA" in figures["hf_offloaded"]["note"]


def test_exact_providers_have_the_logits_of_the_plain_cache(measured: Path) -> None:
    figures = _figures(measured)
    for name in ("sub_batches", "whole_layer_both_ways", "full_transfer", "sequential", "planned"):
        assert figures[name]["max_abs_logit_difference"] <= campaign.FLOAT32_TOLERANCE, name
        assert "first_differing_token" not in figures[name]


def test_only_our_modes_stand_beside_a_bound(measured: Path) -> None:
    figures = _figures(measured)
    assert {name for name in figures if "fraction_of_bound" in figures[name]} == {
        *("full_transfer", "sequential", "kvpr", "planned")
    }


def test_the_whole_batch_does_not_fit_and_parts_of_it_do(measured: Path) -> None:
    figures = _figures(measured)
    assert "the device has room for" in figures["on_device"]["note"]
    assert figures["sub_batches"]["h2d_bytes"] == 0


def test_whole_layers_move_both_ways_at_every_step(measured: Path) -> None:
    found = _figures(measured)["whole_layer_both_ways"]
    token_bytes = 4 * 3 * 2 * TINY.hidden * 4  # layers, rows, keys and values, float32
    prompt, new = TINY.cached_tokens, 6
    # every step but the first, and the layer that is asked for at the end of the last one
    assert found["h2d_bytes"] >= token_bytes * sum(range(prompt, prompt + new - 1))
    assert found["d2h_bytes"] == pytest.approx(token_bytes * sum(range(prompt, prompt + new)), rel=1e-5)  # six digits


def test_without_write_back_whole_layers_only_come(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    campaign.run([tiny_cell()], [WholeLayerBothWays(writes_back=False)], path, campaign.Settings(), print)
    found = _figures(path)["whole_layer_fetched"]
    assert found["d2h_bytes"] == pytest.approx(4 * 3 * 2 * TINY.hidden * 4 * TINY.cached_tokens, rel=1e-5)
    assert found["max_abs_logit_difference"] == 0


def test_a_cell_that_fits_nowhere_is_a_row_with_the_plans_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    _run([tiny_cell(room_sequences=0.01)], ["sub_batches", "planned"], path)
    figures = _figures(path)
    assert "one sequence alone needs" in figures["sub_batches"]["note"]
    assert "device_gib allows" in figures["planned"]["note"]


@pytest.mark.parametrize(
    "changes", [{"num_beams": 2}, {"is_ragged": True}, {"prompt_lookup_tokens": 3, "room_sequences": 0.9}]
)
def test_beams_padding_and_prompt_lookup_give_the_same_tokens(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    _run([tiny_cell(**changes)], ["full_transfer", "planned", "whole_layer_both_ways"], path)
    figures = _figures(path)
    assert "first_differing_token" not in figures["planned"]
    assert figures["planned"]["h2d_bytes"] > 0
    assert "equal prompts" in figures["whole_layer_both_ways"]["note"]


def test_wrong_tokens_in_float32_end_the_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Ours.run

    def wrong(self: Ours, *args: Any, **kwargs: Any) -> Outcome:
        found = real(self, *args, **kwargs)
        return dataclasses.replace(found, logits=None if found.logits is None else found.logits + 1e-3)

    monkeypatch.setattr(Ours, "run", wrong)
    with pytest.raises(AssertionError, match="planned in tiny.*its times mean nothing"):
        _run([tiny_cell()], ["planned"], tmp_path / "rows.csv")


def test_an_interrupted_campaign_resumes_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    runs: list[str] = []
    real = Ours.run

    def counted(self: Ours, *args: Any, **kwargs: Any) -> Outcome:
        runs.append(self.name)
        if self.name == "planned" and runs.count("planned") == 1:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Ours, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        _run([tiny_cell()], ["full_transfer", "planned"], path)
    assert set(_figures(path)) == {"full_transfer"}
    runs.append("second")
    _run([tiny_cell()], ["full_transfer", "planned"], path)
    assert set(_figures(path)) == {"full_transfer", "planned"}
    assert "full_transfer" not in runs[runs.index("second") :]
    told = _run([tiny_cell()], ["full_transfer", "planned"], path)
    assert told == ["tiny: measured before"]
    _run([tiny_cell()], ["full_transfer"], path, resumes=False)
    assert runs[-1] == "full_transfer"


def test_the_budget_ends_the_campaign_before_a_cell_that_would_take_too_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    told = _run([tiny_cell(), tiny_cell("later")], ["full_transfer"], path, budget_s=0.5)
    assert told[-1].startswith("later: no time left")
    assert {row["x"] for row in rows.load(path)} == {"tiny"}


def test_rows_of_another_schema_are_refused_with_their_version(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("bench,provider,metric\ndecode,planned,step\n")
    with pytest.raises(ConfigError, match=r"schema 1, this release reads and writes schema 2"):
        _run([tiny_cell()], ["planned"], path)
    assert path.read_text().startswith("bench,provider,metric\n")


def test_a_failing_reference_is_a_row_for_every_provider_and_later_cells_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DynamicCache.run

    def fails(self: DynamicCache, bed: Any, *args: Any, **kwargs: Any) -> Outcome:
        if bed.cell.name == "tiny":
            raise torch.OutOfMemoryError("of 7 GB")
        return real(self, bed, *args, **kwargs)

    monkeypatch.setattr(DynamicCache, "run", fails)
    path = tmp_path / "rows.csv"
    _run([tiny_cell(), tiny_cell("later")], ["full_transfer", "planned"], path)
    table = campaign.summary(rows.load(path))
    for name in ("full_transfer", "planned"):
        assert table["tiny"][name]["note"].endswith("did not run: OutOfMemoryError: of 7 GB")
    assert "tpot" in table["later"]["planned"]


def test_a_lab_that_cannot_be_built_is_a_row_for_every_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(preset: Preset) -> None:
        raise torch.OutOfMemoryError("weights")

    monkeypatch.setattr(campaign, "Lab", fails)
    path = tmp_path / "rows.csv"
    _run([tiny_cell()], ["full_transfer", "planned"], path)
    assert set(_figures(path)) == {"full_transfer", "planned"}
    assert {row["link"] for row in rows.load(path)} == {"emulated, not measured"}


def test_an_error_of_one_provider_is_its_row_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Ours.run

    def fails(self: Ours, *args: Any, **kwargs: Any) -> Outcome:
        if self.name == "full_transfer":
            raise IndexError("7 of 3")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Ours, "run", fails)
    path = tmp_path / "rows.csv"
    _run([tiny_cell()], ["full_transfer", "planned"], path)
    assert _figures(path)["full_transfer"] == {"note": "IndexError: 7 of 3"}
    assert "tpot" in _figures(path)["planned"]


def test_repeats_and_objective_are_part_of_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    _run([tiny_cell()], ["full_transfer"], path)
    config = json.loads(rows.load(path)[0]["config_json"])
    assert config["repeats"] == 1
    assert config["objective"] == {"ttft_s": 10.0, "tpot_s": 0.5}
    assert _run([tiny_cell()], ["full_transfer"], path) == ["tiny: measured before"]
    for changes in ({"repeats": 2}, {"objective": LatencyObjective(1.0, 0.5)}):
        assert _run([tiny_cell()], ["full_transfer"], path, **changes) != ["tiny: measured before"]


def test_the_budget_counts_the_slowest_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, took = [0.0], iter([10.0, 1.0])

    def cell_takes(*args: Any) -> None:
        now[0] += next(took)

    monkeypatch.setattr(campaign, "_run_cell", cell_takes)
    monkeypatch.setattr(campaign.time, "perf_counter", lambda: now[0])
    told = _run([tiny_cell("a"), tiny_cell("b"), tiny_cell("c")], ["planned"], tmp_path / "rows.csv", budget_s=20.5)
    assert told == ["c: no time left in the budget of 0.341667 minutes"]


def test_flops_are_of_the_tokens_that_came_per_second(measured: Path) -> None:
    found = _figures(measured)["sub_batches"]
    cell = tiny_cell()
    lab = Lab(cell.preset)
    bed = Bed(cell, lab, HardwareProfile.load(Path(__file__).parent / "data" / "profile_emulated_2_threads.json"))
    expected = bed.task.step_flops(1) * found["decode_tokens_per_s"] / peak_flops_per_s(bed.task.profile)
    assert found["mfu"] == pytest.approx(expected, rel=1e-4)


def test_tables_show_the_fastest_first_and_every_reason(measured: Path) -> None:
    table, reasons = campaign_tables(rows.load(measured))
    speeds = [float(str(text)) for text in table.columns[3].cells]
    assert speeds == sorted(speeds, reverse=True)
    assert "hf_offloaded" in list(reasons.columns[0].cells)
    assert {"cpu-mha", "opt-66b", "qwen3-8b"} <= set(PRESETS)


def test_energy_is_per_new_token_where_there_is_a_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        readings = iter([100.0, 136.0])

        def joules(self) -> float:
            return next(self.readings)

    monkeypatch.setattr(campaign, "open_meter", lambda device: Meter())
    path = tmp_path / "rows.csv"
    _run([tiny_cell()], ["full_transfer"], path)
    assert _figures(path)["full_transfer"]["energy_per_new_token"] == 36.0 / (3 * 6)
