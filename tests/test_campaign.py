"""The campaign: equal figures for all providers, a reason for whatever cannot run, nothing lost by an interruption."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvoffload.bench import campaign, rows
from kvoffload.bench import providers as kvproviders
from kvoffload.bench.cells import CELLS, Cell, choose
from kvoffload.bench.external import FlexLLMGen, LlamaCpp, external_providers
from kvoffload.bench.lab import Lab
from kvoffload.bench.presets import PRESETS, Preset
from kvoffload.bench.providers import (
    Bed,
    DynamicCache,
    HFQuantized,
    Ours,
    Provider,
    WholeLayerBothWays,
    providers,
)
from kvoffload.bench.serving import Group, Objective, Outcome, Sameness, samples
from kvoffload.bench.tables import campaign_tables
from kvoffload.errors import ConfigError, KVOffloadError
from kvoffload.forecast import memory_bytes_per_s, peak_flops_per_s
from kvoffload.types import HardwareProfile

TINY = Preset(
    architecture="opt",
    hidden=64,
    heads=4,
    kv_heads=4,
    ffn=64,
    layers=4,
    batch=3,
    cached_tokens=256,
    vocab=128,
    h2d_gb_per_s=0.05,
)


def _cell(name: str = "tiny", room_sequences: float | None = 2.6, **changes: Any) -> Cell:
    return Cell(
        name=name,
        group="cpu",
        rank=0,
        question="",
        preset=dataclasses.replace(TINY, batch=1) if "prompt_lookup_tokens" in changes else TINY,
        new_tokens=6,
        room_sequences=room_sequences,
        **changes,
    )


@pytest.fixture(scope="module", autouse=True)
def _recorded_profile() -> Iterator[None]:
    """A machine that need not be measured."""
    recorded = HardwareProfile.load(Path(__file__).parent / "data" / "profile_emulated_2_threads.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "load_or_measure", lambda: recorded)
        yield


def _run(cells: list[Cell], names: list[str], path: Path, **settings: Any) -> list[str]:
    told: list[str] = []
    chosen = [(providers() | external_providers())[name] for name in names]
    campaign.run(cells, chosen, path, campaign.Settings(**settings), told.append)
    return told


def _figures(path: Path) -> dict[str, dict[str, Any]]:
    return campaign.summary(rows.load(path))["tiny"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All providers in one cell with room for two of three sequences."""
    path = tmp_path_factory.mktemp("campaign") / "rows.csv"
    _run([_cell()], [*providers(), *external_providers()], path)
    return path


def test_every_provider_has_figures_or_a_reason(measured: Path) -> None:
    figures = _figures(measured)
    assert set(figures) == {*providers(), *external_providers()}
    for name, found in figures.items():
        assert ("note" in found) != ("tpot" in found), name
        if "tpot" in found:
            assert {"ttft", "inter_token_latency_p99", "decode_tokens_per_s", "goodput_tokens_per_s", "mfu"} <= set(
                found
            )
    assert "needs CUDA" in figures["hf_offloaded"]["note"]
    assert "not installed" in figures["flexllmgen"]["note"]


def test_exact_providers_have_the_logits_of_the_plain_cache(measured: Path) -> None:
    figures = _figures(measured)
    for name in ("on_device_sub_batches", "whole_layer_both_ways", "full_transfer", "sequential", "planned"):
        assert figures[name]["max_abs_logit_difference"] <= campaign.FLOAT32_TOLERANCE, name
        assert "first_differing_token" not in figures[name]


def test_only_our_modes_stand_beside_a_bound(measured: Path) -> None:
    figures = _figures(measured)
    assert {name for name in figures if "fraction_of_bound" in figures[name]} == {
        *("full_transfer", "sequential", "kvpr", "planned")
    }


def test_the_whole_batch_does_not_fit_and_parts_of_it_do(measured: Path) -> None:
    figures = _figures(measured)
    assert "the device has room for" in figures["dynamic_cache"]["note"]
    assert figures["on_device_sub_batches"]["h2d_bytes"] == 0


def test_whole_layers_move_both_ways_at_every_step(measured: Path) -> None:
    found = _figures(measured)["whole_layer_both_ways"]
    token_bytes = 4 * 3 * 2 * TINY.hidden * 4  # layers, rows, keys and values, float32
    prompt, new = TINY.cached_tokens, 6
    # every step but the first, and the layer that is asked for at the end of the last one
    assert found["h2d_bytes"] >= token_bytes * sum(range(prompt, prompt + new - 1))
    assert found["d2h_bytes"] == pytest.approx(token_bytes * sum(range(prompt, prompt + new)), rel=1e-5)  # six digits


def test_without_write_back_whole_layers_only_come(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    campaign.run([_cell()], [WholeLayerBothWays(writes_back=False)], path, campaign.Settings(), print)
    found = _figures(path)["whole_layer_fetched"]
    assert found["d2h_bytes"] == pytest.approx(4 * 3 * 2 * TINY.hidden * 4 * TINY.cached_tokens, rel=1e-5)
    assert found["max_abs_logit_difference"] == 0


def test_a_cell_that_fits_nowhere_is_a_row_with_the_plans_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    _run([_cell(room_sequences=0.01)], ["on_device_sub_batches", "planned"], path)
    figures = _figures(path)
    assert "one sequence alone needs" in figures["on_device_sub_batches"]["note"]
    assert "device_gib allows" in figures["planned"]["note"]


@pytest.mark.parametrize(
    "changes", [{"num_beams": 2}, {"is_ragged": True}, {"prompt_lookup_tokens": 3, "room_sequences": 0.9}]
)
def test_beams_padding_and_prompt_lookup_give_the_same_tokens(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    _run([_cell(**changes)], ["full_transfer", "planned", "whole_layer_both_ways"], path)
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
        _run([_cell()], ["planned"], tmp_path / "rows.csv")


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
        _run([_cell()], ["full_transfer", "planned"], path)
    assert set(_figures(path)) == {"full_transfer"}
    runs.append("second")
    _run([_cell()], ["full_transfer", "planned"], path)
    assert set(_figures(path)) == {"full_transfer", "planned"}
    assert "full_transfer" not in runs[runs.index("second") :]
    told = _run([_cell()], ["full_transfer", "planned"], path)
    assert told == ["tiny: measured before"]
    _run([_cell()], ["full_transfer"], path, resumes=False)
    assert runs[-1] == "full_transfer"


def test_the_budget_ends_the_campaign_before_a_cell_that_would_take_too_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    told = _run([_cell(), _cell("later")], ["full_transfer"], path, budget_s=0.5)
    assert told[-1].startswith("later: no time left")
    assert {row["x"] for row in rows.load(path)} == {"tiny"}


def test_rows_of_another_schema_are_refused_with_their_version(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("bench,provider,metric\ndecode,planned,step\n")
    with pytest.raises(ConfigError, match=r"schema 1, this release reads and writes schema 2"):
        _run([_cell()], ["planned"], path)
    assert path.read_text().startswith("bench,provider,metric\n")


def test_a_rerun_replaces_all_rows_of_its_subject_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"

    def row(provider: str, metric: str, value: float) -> rows.Row:
        return rows.row("b", provider, metric, "s", "x", [value], {"n": 1}, "emulated 1 GB/s")

    rows.save(path, [row("one", "tpot", 1.0), row("one", "ttft", 2.0), row("two", "tpot", 3.0)])
    again = rows.row("b", "one", "tpot", "s", "x", [4.0], {"n": 1}, "emulated 2 GB/s")
    rows.save(path, [again])
    found = {(one["provider"], one["metric"]): one["p50"] for one in rows.load(path)}
    assert found == {("one", "tpot"): "4", ("two", "tpot"): "3"}
    on_gpu = rows.row("b", "one", "tpot", "s", "x", [5.0], {"n": 1}, "PCIe 4.0 x16")
    rows.save(path, [on_gpu])
    assert len(rows.load(path)) == 3
    with path.open(newline="") as file:
        assert json.loads(next(csv.DictReader(file))["config_json"]) == {"n": 1}


def _row(provider: str, metric: str, value: float, config: dict[str, Any] | None = None, date: str = "") -> rows.Row:
    made = rows.row("campaign", provider, metric, "", "tiny", [value], config or {}, "emulated 1 GB/s")
    return made | ({"date": date} if date else {})


def test_parts_rank_by_the_tokens_of_all_sequences_and_speed_is_over_full_transfer() -> None:
    found = [_row("on_device_sub_batches", "tpot", 0.01), _row("on_device_sub_batches", "decode_tokens_per_s", 5.0)]
    found += [_row("full_transfer", "tpot", 0.04), _row("full_transfer", "decode_tokens_per_s", 10.0)]
    found += [_row("planned", "tpot", 0.02), _row("planned", "decode_tokens_per_s", 25.0)]
    (table,) = campaign_tables(found)
    assert list(table.columns[0].cells) == ["planned", "full_transfer", "on_device_sub_batches"]
    assert table.columns[-1].header == "speed"
    assert list(table.columns[-1].cells) == ["2.50x", "1.00x", "0.50x"]


def test_rows_of_two_devices_stand_in_tables_of_their_own() -> None:
    def on(device: str, provider: str, speed: float) -> rows.Row:
        return _row(provider, "decode_tokens_per_s", speed) | {"device": device}

    skipped = rows.skipped("campaign", "hf_offloaded", "tiny", {}, "emulated 1 GB/s", "needs CUDA") | {"device": "one"}
    found = [on("one", "full_transfer", 10.0), on("other", "full_transfer", 20.0), on("one", "planned", 15.0), skipped]
    one, reasons, other = campaign_tables([*found, on("other", "planned", 60.0)])
    assert [str(table.title).partition(", ")[0] for table in (one, other)] == ["tiny: one", "tiny: other"]
    assert [list(table.columns[-1].cells) for table in (one, other)] == [["1.50x", "1.00x"], ["3.00x", "1.00x"]]
    assert "not measured on one" in str(reasons.title)


def test_a_summary_holds_the_latest_configuration_of_a_cell_alone() -> None:
    old = [_row("planned", "tpot", 1.0, {"repeats": 1}, "2026-01-01"), _row("kvpr", "tpot", 2.0, {"repeats": 1})]
    new = _row("planned", "tpot", 3.0, {"repeats": 5}, "2026-01-02")
    old[1]["date"] = "2026-01-01"
    assert campaign.summary([*old, new]) == {"tiny": {"planned": {"tpot": 3.0}}}
    assert campaign.summary([new, *old]) == {"tiny": {"planned": {"tpot": 3.0}}}


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
    _run([_cell(), _cell("later")], ["full_transfer", "planned"], path)
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
    _run([_cell()], ["full_transfer", "planned"], path)
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
    _run([_cell()], ["full_transfer", "planned"], path)
    assert _figures(path)["full_transfer"] == {"note": "IndexError: 7 of 3"}
    assert "tpot" in _figures(path)["planned"]


@pytest.mark.parametrize(("installed", "backend"), [("hqq", "hqq"), ("optimum", "quanto")])
def test_the_quantised_cache_is_asked_for_with_the_backend_that_is_there(
    installed: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {installed, f"{installed}.quanto"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in there else None)
    provider = HFQuantized()
    assert provider.problem(_gpu_bed()) is None
    assert provider.own_options() == {"cache_implementation": "quantized", "cache_config": {"backend": backend}}


@pytest.mark.parametrize(
    "same", [Sameness(float("nan"), float("nan"), None), Sameness(0.0, 0.0, 2), Sameness(6e-6, 0.0, None)]
)
def test_what_cannot_be_compared_is_not_equal(same: Sameness) -> None:
    campaign._must_be_equal(Ours("planned"), _cell(), Sameness(5e-6, 0.0, None))
    with pytest.raises(AssertionError, match="its times mean nothing"):
        campaign._must_be_equal(Ours("planned"), _cell(), same)


def test_repeats_and_objective_are_part_of_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    _run([_cell()], ["full_transfer"], path)
    config = json.loads(rows.load(path)[0]["config_json"])
    assert config["repeats"] == 1
    assert config["objective"] == {"ttft_s": 10.0, "tpot_s": 0.5}
    assert _run([_cell()], ["full_transfer"], path) == ["tiny: measured before"]
    for changes in ({"repeats": 2}, {"objective": Objective(1.0, 0.5)}):
        assert _run([_cell()], ["full_transfer"], path, **changes) != ["tiny: measured before"]


def test_the_budget_counts_the_slowest_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, took = [0.0], iter([10.0, 1.0])

    def cell_takes(*args: Any) -> None:
        now[0] += next(took)

    monkeypatch.setattr(campaign, "_run_cell", cell_takes)
    monkeypatch.setattr(campaign.time, "perf_counter", lambda: now[0])
    told = _run([_cell("a"), _cell("b"), _cell("c")], ["planned"], tmp_path / "rows.csv", budget_s=20.5)
    assert told == ["c: no time left in the budget of 0.341667 minutes"]


def test_utilization_is_of_all_tokens_and_of_the_steps_that_ran(tmp_path: Path) -> None:
    class Task:
        profile = HardwareProfile.load(Path(__file__).parent / "data" / "profile_emulated_2_threads.json")

        def step_bytes(self, batch: int) -> float:
            return 1000.0 + 100.0 * batch

    task: Any = Task()
    peak = memory_bytes_per_s(task.profile)
    # two sequences in 2 steps, one sequence in 1 step that gave two tokens
    groups = [Group(2, 0.0, [1.0, 1.5, 2.0]), Group(1, 2.0, [3.0, 4.0, 4.0])]
    assert campaign._mbu(task, groups) == pytest.approx((2 * 1200 + 1 * 1100) / (peak * 2.0))


def test_flops_are_of_the_tokens_that_came_per_second(measured: Path) -> None:
    found = _figures(measured)["on_device_sub_batches"]
    cell = _cell()
    lab = Lab(cell.preset)
    bed = Bed(cell, lab, HardwareProfile.load(Path(__file__).parent / "data" / "profile_emulated_2_threads.json"))
    expected = bed.task.step_flops(1) * found["decode_tokens_per_s"] / peak_flops_per_s(bed.task.profile)
    assert found["mfu"] == pytest.approx(expected, rel=1e-4)


def test_the_bound_is_the_lower_of_both_and_stands_beside_even_steps() -> None:
    stats = SimpleNamespace(
        decode_step_s=[100.0, 100.0, 2.0, 4.0, 3.0],
        plan=SimpleNamespace(num_blocks=4, split_fraction=0.25),
        setup_s=7.0,
        prediction_error_fraction=-0.1,
    )
    lab = SimpleNamespace(bound_s=lambda mode, rates, like: rates)
    bed, runs, rates = SimpleNamespace(cell=_cell(), lab=lab), [SimpleNamespace(stats=stats)], (2.0, 1.5)
    for measured_around in (rates, rates[::-1]):
        found: dict[str, Any] = {}
        campaign._add_bound(found, Ours("planned"), bed, runs, measured_around)  # type: ignore[arg-type]
        assert found["decode_step"] == ("s", [2.0, 4.0, 3.0])
        assert found["bound_step"] == ("s", [1.5])
        assert found["fraction_of_bound"] == ("fraction", [0.5])
        assert found["setup"] == ("s", [7.0])
        assert found["prediction_error"] == ("fraction", [0.1])


def test_pinning_is_taken_out_of_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    used = dict.fromkeys(("host_bytes", "h2d_bytes", "d2h_bytes", "device_kv_peak_decode_bytes"), 1)
    stats = SimpleNamespace(setup_s=2.0, device_kv_peak_prefill_bytes=3, **used)
    monkeypatch.setattr(kvproviders, "offload", lambda *args: nullcontext(SimpleNamespace(stats=stats)))
    given = (torch.tensor([[1, 2]]), None, Group(1, 0.0, [5.0, 6.5]))
    clock = iter([10.0, 17.0])
    monkeypatch.setattr(kvproviders.time, "perf_counter", lambda: next(clock))
    lab = SimpleNamespace(config=lambda *args, **kwargs: None, model=None, device=torch.device("cpu"))
    bed: Any = SimpleNamespace(
        lab=lab, room_bytes=None, profile=None, options=dict, generate=lambda *args, **kwargs: given
    )
    found = Ours("planned").run(bed, 2, keeps_logits=False)
    assert found.groups[0].token_s == [3.0, 4.5]
    assert found.total_s == 5.0


# ---- rows


def test_rows_hold_exact_percentiles() -> None:
    found = rows.row("b", "one", "m", "s", "x", [float(n) for n in range(101)], {}, "emulated")
    assert (found["p20"], found["p50"], found["p80"], found["repeats"]) == ("20", "50", "80", "101")


def test_done_needs_the_commit_and_a_figure() -> None:
    one = _row("planned", "tpot", 1.0)
    assert rows.done([one]) == {("campaign", "planned", "tiny", "{}")}
    assert rows.done([one | {"commit": "another"}]) == set()
    assert rows.done([rows.skipped("campaign", "planned", "tiny", {}, "emulated", "why")]) == set()


def test_rows_of_another_configuration_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows.save(path, [_row("planned", "tpot", 1.0, {"n": 1})])
    rows.save(path, [_row("planned", "tpot", 2.0, {"n": 2})])
    assert [row["p50"] for row in rows.load(path)] == ["1", "2"]


def test_what_benchmarks_write_does_not_make_the_commit_dirty_and_other_changes_have_a_hash(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "core.hooksPath=/dev/null")
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    written = ("scripts/results/a.csv", "README.md", "docs/figures/f.svg")
    for name in (*written, "code/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = rows._commit_of(tmp_path / "code")
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    for name in written:
        (tmp_path / name).write_text("after\n")
    assert rows._commit_of(tmp_path / "code") == clean
    dirty = []
    for text in ("one\n", "two\n"):
        (tmp_path / "code" / "a.py").write_text(text)
        dirty.append(rows._commit_of(tmp_path / "code"))
        assert re.fullmatch(f"{clean}-dirty-[0-9a-f]{{6}}", dirty[-1])
    assert dirty[0] != dirty[1]
    assert rows._commit_of(tmp_path.parent) == "unknown"


# ---- figures of one run


def _outcome(groups: list[Group], total_s: float, tokens: list[list[int]] | None = None) -> Outcome:
    return Outcome(tokens=torch.tensor(tokens or [[1]]), logits=None, groups=groups, total_s=total_s)


def test_the_second_group_waits_for_the_first() -> None:
    groups = [Group(2, 0.0, [1.0, 1.5, 2.0]), Group(1, 2.0, [3.0, 3.25, 3.5])]
    found = samples([_outcome(groups, 3.5)], 30, Objective(ttft_s=2.0, tpot_s=1.0))
    assert found["ttft"] == ("s", [3.0])
    assert found["tpot"][1] == [pytest.approx((2 * 0.5 + 0.25) / 3)]
    assert found["prefill_tokens_per_s"][1] == [30 / 2.0]
    assert found["decode_tokens_per_s"][1] == [pytest.approx((2 * 2 + 2) / 1.5)]
    assert found["goodput_tokens_per_s"][1] == [pytest.approx(2 * 3 / 3.5)]  # the second group's first token is late
    assert sorted(found["inter_token_latency"][1]) == [0.25, 0.25, 0.5, 0.5]
    assert "link_utilization" not in found


def test_sameness_names_the_first_differing_token_and_ignores_logits_behind_it() -> None:
    logits = torch.zeros(3, 1, 4)
    expected = Outcome(tokens=torch.tensor([[1, 2, 3]]), logits=logits, groups=[], total_s=1.0)
    shifted = logits.clone()
    shifted[0, 0, 0] = 1e-3
    shifted[2] = 7.0 * torch.arange(4)
    found = Outcome(tokens=torch.tensor([[1, 9, 3]]), logits=shifted, groups=[], total_s=1.0)
    same = Sameness.of(found, expected)
    assert same.first_differing_token == 1
    assert same.max_abs_logit_difference == pytest.approx(1e-3)
    assert 0 < same.kl_divergence < 1e-6
    assert Sameness.of(expected, expected) == Sameness(0.0, 0.0, None)


def test_fewer_tokens_and_other_shapes_are_no_sameness() -> None:
    logits = torch.zeros(3, 1, 4)
    expected = Outcome(tokens=torch.tensor([[1, 2, 3]]), logits=logits, groups=[], total_s=1.0)
    short = dataclasses.replace(expected, tokens=torch.tensor([[1, 2]]))
    assert Sameness.of(short, expected).first_differing_token == 2
    rows_short = dataclasses.replace(expected, tokens=torch.tensor([[1, 2, 3], [1, 2, 3]]))
    assert Sameness.of(rows_short, expected).first_differing_token == 0
    for other in (logits[:2], torch.zeros(3, 1, 5), torch.zeros(3, 2, 4)):
        assert math.isnan(Sameness.of(dataclasses.replace(expected, logits=other), expected).max_abs_logit_difference)


def test_goodput_drops_sequences_that_are_slow_after_a_prompt_start() -> None:
    groups = [Group(2, 0.0, [1.0, 1.5, 2.0]), Group(1, 0.0, [1.0, 3.0, 5.0])]
    found = samples([_outcome(groups, 5.0)], 30, Objective(ttft_s=2.0, tpot_s=1.0))
    assert found["goodput_tokens_per_s"][1] == [pytest.approx(2 * 3 / 5.0)]


def test_percentiles_of_latencies_are_exact() -> None:
    times = [0.0]
    for latency in range(101):
        times.append(times[-1] + latency)
    found = samples([_outcome([Group(1, -1.0, times)], times[-1])], 30, Objective(1.0, 1.0))
    assert [found[f"inter_token_latency_p{q}"][1] for q in (90, 95, 99)] == [[90.0], [95.0], [99.0]]


# ---- cells and the tools of others


def test_cells_ask_something_fit_their_machine_and_come_most_informative_first() -> None:
    assert [cell.rank for cell in CELLS.values()] == sorted(cell.rank for cell in CELLS.values())
    assert all(cell.question and cell.preset.cached_tokens >= 128 for cell in CELLS.values())
    groups = {cell.group for cell in choose([], is_emulated=False)}
    assert groups == {"latency", "throughput", "large", "long", "gqa", "shapes"}
    assert all(cell.device_memory_gb for cell in choose([], is_emulated=False))
    latency = choose(["latency"], is_emulated=False)
    assert {(cell.prompt_tokens, cell.new_tokens) for cell in latency} == {
        (prompt, new) for prompt in (128, 256, 512) for new in (32, 128)
    }
    assert all(cell.batch == 64 for cell in latency)
    assert {cell.name.split(" ")[0] for cell in latency} == {"opt-6.7b", "opt-13b", "llama-2-7b", "llama-2-13b"}
    assert [cell.name for cell in choose(["cpu-gqa*"], is_emulated=True)] == [
        "cpu-gqa 2x2048",
        "cpu-gqa 8x512 in parts",
    ]


def test_prompts_are_the_same_at_every_call_padded_on_the_left_and_repeat_where_asked() -> None:
    cell = _cell(is_ragged=True)
    ids, mask = cell.prompts(torch.device("cpu"))
    assert torch.equal(ids, cell.prompts(torch.device("cpu"))[0])
    assert mask.sum(1).tolist() == [256, 160, 64]
    assert bool((mask[:, 1:] >= mask[:, :-1]).all())
    copied = Cell(
        **{**{f.name: getattr(cell, f.name) for f in dataclasses.fields(cell)}, "is_ragged": False}
        | {"prompt_lookup_tokens": 2, "preset": dataclasses.replace(TINY, cached_tokens=200)}
    )
    ids, _ = copied.prompts(torch.device("cpu"))
    assert torch.equal(ids[:, :64], ids[:, 64:128])


class _Bed:
    """As much of a bed as a command needs."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell


def _gpu_bed() -> Any:
    return _Bed(CELLS["opt-6.7b 64x512+32"])


def test_flexllmgen_puts_the_cache_in_host_memory_and_its_log_becomes_figures() -> None:
    bed = _gpu_bed()
    command = FlexLLMGen().command(bed)
    percent = command[command.index("--percent") + 1 :][:6]
    assert percent == ["100", "0", "0", "100", "100", "0"]
    assert command[command.index("--gpu-batch-size") + 1] == "64"
    log = (
        "prefill latency: 2.000 s\tprefill throughput: 16384.0 token/s\ndecode latency: 6.200 s\tdecode throughput: 320"
    )
    found = FlexLLMGen().parse(log, bed)
    assert found["ttft"] == ("s", [2.0])
    assert found["tpot"][1] == [pytest.approx(0.2)]
    assert found["decode_tokens_per_s"][1] == [pytest.approx(320)]
    with pytest.raises(KVOffloadError, match="printed no prefill and decode latency"):
        FlexLLMGen().parse("Traceback", bed)


def test_llama_bench_is_asked_for_a_cache_in_host_memory_and_its_json_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVOFFLOAD_GGUF", "model.gguf")
    bed: Any = _Bed(CELLS["llama-2-7b 1x32768+32 24 GB"])
    assert "-nkvo 1" in " ".join(LlamaCpp().command(bed))
    text = json.dumps([{"n_prompt": 32768, "n_gen": 32, "samples_ns": [2_000_000_000, 3_000_000_000]}])
    assert LlamaCpp().parse(text, bed) == {"total": ("s", [2.0, 3.0])}
    with pytest.raises(KVOffloadError, match="printed no test"):
        LlamaCpp().parse("[]", bed)


def test_a_tool_that_fails_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlexLLMGen, "command", lambda self, bed: ["false"])
    with pytest.raises(KVOffloadError, match="flexllmgen ended with code 1"):
        FlexLLMGen().figures(_gpu_bed())


def test_tables_show_the_fastest_first_and_every_reason(measured: Path) -> None:
    table, reasons = campaign_tables(rows.load(measured))
    speeds = [float(str(text)) for text in table.columns[3].cells]
    assert speeds == sorted(speeds, reverse=True)
    assert "flexllmgen" in list(reasons.columns[0].cells)
    assert isinstance(next(iter(providers().values())), Provider)
    assert {"cpu-mha", "opt-66b", "qwen3-8b"} <= set(PRESETS)


def test_energy_is_per_new_token_where_there_is_a_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        readings = iter([100.0, 136.0])

        def joules(self) -> float:
            return next(self.readings)

    monkeypatch.setattr(campaign, "open_meter", lambda device: Meter())
    path = tmp_path / "rows.csv"
    _run([_cell()], ["full_transfer"], path)
    assert _figures(path)["full_transfer"]["energy_per_new_token"] == 36.0 / (3 * 6)
