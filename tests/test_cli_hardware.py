"""`kvoffload hardware`: the list, one of it, and this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import RECORDED, run_badly, run_in_terminal, run_well
from commands import cache_fixture as cache_fixture

from kvoffload.cli.hardware import rows_of
from kvoffload.machine import datasheet
from kvoffload.machine.hardware_profile import HardwareProfile


def row_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_list_has_every_preset_and_marks_what_is_assumed(cache: Path) -> None:
    text = run_well("hardware")
    for name in datasheet.preset_names():
        sheet = datasheet.preset(name)
        reached = f"{sheet.link_achievable_bytes_per_s / 1e9:g}"
        star = " *" if sheet.provenance_of("link_achievable_bytes_per_s") == "assumed" else ""
        cells = row_of(text, name)
        assert cells[0] == name
        assert cells[1] == f"{sheet.memory_bytes / 1e9:g} GB"
        assert cells[4:] == [sheet.link_name, reached + star]
    assert row_of(text, "a100-40gb-pcie4") == ["a100-40gb-pcie4", "40 GB", "1555", "312", "PCIe 4.0 x16", "25.6"]
    assert "kvoffload hardware NAME shows all figures" in text
    assert "auto, this machine: not measured yet, kvoffload profile does that" in text


def test_the_list_fits_80_columns_of_a_terminal(cache: Path) -> None:
    code, lines = run_in_terminal("hardware")
    assert code == 0
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert row_of("\n".join(lines), "l4-24gb-pcie4")[5] == "25.6 *"


def test_one_shows_every_figure_and_where_it_comes_from() -> None:
    text = " ".join(run_well("hardware", "l4-24gb-pcie4").replace("│", " ").split())
    for said in (
        "memory bandwidth 300 GB/s (datasheet)",
        "float8, dense 242.5 TFLOP/s (datasheet)",
        "int4, dense 485 TOP/s (assumed)",
        "link, nominal 32 GB/s (datasheet), each way",
        "link, reached 25.6 GB/s (assumed), each way, by pinned copies",
        "power 72 W (datasheet)",
        "price not known",
        "source NVIDIA L4 datasheet, half of the sparse figures; link as on the A100",
    ):
        assert said in text
    assert "25.6 GB/s (measured by others)" in run_well("hardware", "a100-40gb-pcie4")


@pytest.mark.parametrize("name", datasheet.preset_names())
def test_no_figure_of_a_preset_is_left_out(name: str) -> None:
    sheet = datasheet.preset(name)
    titles = [title for title, _ in rows_of(sheet)]
    assert titles.count("source") == 1
    assert {f"{dtype}, dense" for dtype in sheet.peak_flops_per_s} < set(titles)
    assert all(value for _, value in rows_of(sheet))


def test_a_file_with_figures_of_ones_own_is_shown_as_well(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"schema_version": 1, "like": "l4-24gb-pcie4", "price_per_hour": 0.8}))
    assert "0.8 an hour (assumed)" in run_well("hardware", path)
    assert json.loads(run_well("hardware", path, "--json"))["price_per_hour"] == 0.8


def test_json_has_what_the_presets_have(cache: Path) -> None:
    found = json.loads(run_well("hardware", "--json"))
    assert list(found["presets"]) == datasheet.preset_names()
    assert found["presets"]["h200-pcie5"] == datasheet.preset("h200-pcie5").to_json()
    assert found["auto"] is None
    assert json.loads(run_well("hardware", "t4-16gb-pcie3", "--json")) == datasheet.preset("t4-16gb-pcie3").to_json()


def test_this_machine_is_auto_once_it_is_measured(cache: Path) -> None:
    assert "no profile of this machine is stored" in run_badly("hardware", "auto")
    run_well("profile", "--link-gb-per-s", 2)
    recorded = HardwareProfile.load(RECORDED)
    listed = " ".join(run_well("hardware").split())
    assert f"auto, this machine as it was measured: {recorded.device_name}, " in listed
    found = json.loads(run_well("hardware", "--json"))["auto"]
    assert HardwareProfile.from_json(found, source="it").gemm == recorded.gemm
    assert f"auto: {recorded.device_name}, measured" in run_well("hardware", "auto")
    assert (
        HardwareProfile.from_json(json.loads(run_well("hardware", "auto", "--json")), source="it").gemm == recorded.gemm
    )


def test_an_unknown_name_lists_the_near_ones() -> None:
    assert "near: h100-80gb-pcie5, h100-80gb-sxm5: name one of these" in run_badly("hardware", "h100")
    assert "near: rtx4090-24gb-pcie4" in run_badly("hardware", "rtx4090-25gb")
    assert "4090: NVIDIA GeForce RTX 4090" in run_well("hardware", "4090")
