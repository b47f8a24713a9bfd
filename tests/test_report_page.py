"""What a reader of the report sees first, and that its charts say where the reader's own workload stands."""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from configs import CONFIGS
from reports import made, with_everything

from kvoffload.advise.ways import LABELS
from kvoffload.cli import measured_run
from kvoffload.config import OffloadConfig
from kvoffload.model.shape import shape_of
from kvoffload.model.stored_facts import facts_of
from kvoffload.planning.workload import Workload
from kvoffload.profiler.drawing import chart as charts
from kvoffload.profiler.drawing import page as pages
from kvoffload.profiler.drawing import sections
from kvoffload.profiler.drawing.chart import Chart, plotly_javascript
from kvoffload.profiler.drawing.legend import legend
from kvoffload.profiler.drawing.operation_chart import dots_of
from kvoffload.profiler.drawing.sizes import sizes_around
from kvoffload.profiler.drawing.sizes_charts import STYLES
from kvoffload.profiler.drawing.study import Study
from kvoffload.profiler.drawing.ways_table import COLUMNS, beside_roofline, ways_table
from kvoffload.units import gb

MAX_PAGE_BYTES = 3_000_000


@functools.cache
def everything() -> Study:
    return with_everything()


@functools.cache
def too_large() -> Study:
    """Weights are streamed."""
    return made("mixtral-8x7b", batch=8)


def chart(found: Study, name: str) -> Chart:
    shown = [one for section in sections.page(found, "model", "made").sections for one in section.charts]
    return next(one for one in shown if one.name == name)


def trace(found: Study, chart_name: str, name: str) -> dict[str, Any]:
    return next(one for one in chart(found, chart_name).figure["data"] if one["name"].startswith(name))


# ---- order and size --------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_then_the_ways_then_everything_else() -> None:
    text = pages.html(sections.page(everything(), "opt-6.7b", "made"))
    parts = ["<h1>", 'class="advice"', 'id="ways"', "<table", "<dl>", 'id="roofline"', 'class="chart"']
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_the_page_is_small_and_the_library_in_it_is_whole() -> None:
    text = pages.html(sections.page(everything(), "opt-6.7b", "made"))
    assert len(text.encode()) < MAX_PAGE_BYTES
    packed = re.search(r'<script type="text/plain" id="library">([^<]+)</script>', text)
    assert packed is not None
    assert gzip.decompress(base64.b64decode(packed[1])).decode() == plotly_javascript()
    assert text == pages.html(sections.page(everything(), "opt-6.7b", "made"))


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batch", "prompt_tokens"), [("opt-6.7b", 64, 1024), ("qwen3-8b", 1, 1024), ("mixtral-8x7b", 8, 1024)]
)
def test_the_ways_are_those_of_the_plan_and_the_marked_one_is_that_of_the_verdict(
    name: str, batch: int, prompt_tokens: int
) -> None:
    found = made(name, batch, prompt_tokens)
    assert found.advice is not None
    table = ways_table(found)
    assert table.marked is not None
    marked = dict(zip(COLUMNS, table.rows[table.marked], strict=True))
    assert marked["way"] == f"{LABELS[found.advice.best.way]}, best"
    assert marked["tokens/s"] == f"{found.advice.best.tokens_per_s:.4g}"
    for cells, row in zip(table.rows, found.own.rows, strict=True):
        assert cells[0].removesuffix(", best") == LABELS[row.name]
        assert (len(cells) == 2) == bool(row.problem)


def test_what_does_not_fit_says_why_below_the_table_and_what_is_not_needed_is_no_problem() -> None:
    table = ways_table(too_large())
    assert [cells[1] for cells in table.rows if len(cells) == 2] == ["does not fit", "does not fit"]
    assert table.notes[1:] == (
        f"No offload does not fit: weights take 93.41 GB of {gb(too_large().machine.memory_bytes)}.",
        "Sub-batches do not fit: not even one sequence fits.",
    )
    small = ways_table(made("qwen3-8b", batch=1))
    assert [cells[1] for cells in small.rows if len(cells) == 2] == ["not needed"]
    assert len(small.notes) == 1
    text = pages.html(sections.page(too_large(), "model", "made"))
    assert f'<td colspan="{len(COLUMNS) - 1}" class="no-fit">does not fit</td>' in text


def test_the_times_of_plan_and_roofline_stand_side_by_side_with_a_word_why() -> None:
    found = everything()
    table = beside_roofline(found)
    assert table is not None
    ours = found.own.row("offload")
    assert ours is not None
    shown = [ours.prefill_s, ours.step_s, ours.total_s]
    others = [phase.seconds for phase in (found.roofline.prefill, found.roofline.decode, found.roofline.task)]
    assert [row[1] for row in table.rows] == [sections.seconds(value) for value in shown]
    assert [row[2] for row in table.rows] == [sections.seconds(value) for value in others]
    assert [note.partition(":")[0] for note in table.notes] == ["Prefill", "Decode step", "Everything"]
    assert "where the plan has activations" in table.notes[1]


def test_streamed_weights_cross_the_link_in_the_roofline_too() -> None:
    found = too_large()
    table, ours = beside_roofline(found), found.own.row("offload")
    assert found.task.streamed_bytes
    assert table is not None
    assert ours is not None
    assert min(ours.prefill_s, ours.step_s) > 1
    assert table.rows[0][3] == "none"
    assert found.roofline.decode.seconds == pytest.approx(ours.step_s, rel=0.15)
    assert "waits until the weights have come over the link" in table.notes[0]
    read = found.roofline.decode.total("weight_bytes")
    assert read < 0.95 * found.task.shape.weight_bytes, "not every expert"


# ---- charts ----------------------------------------------------------------------------------------------------------


def test_the_workload_is_marked_in_every_chart_where_it_has_a_place() -> None:
    found = everything()
    assert found.advice is not None
    workload, plan, best = found.task.workload, found.advice.plan, found.advice.best
    for name, own in (
        ("batch-chart", workload.batch),
        ("context-chart", workload.prompt_tokens),
        ("memory-chart", workload.prompt_tokens),
    ):
        line, layout = trace(found, name, "your workload"), chart(found, name).figure["layout"]
        assert line["x"] == [own, own], name
        assert own in layout["xaxis"]["tickvals"], name
        assert np.log10(line["y"]).tolist() == pytest.approx(layout["yaxis"]["range"]), name
    for name in ("batch-chart", "context-chart"):
        assert trace(found, name, "best: ")["y"] == [best.tokens_per_s], name
    star = trace(found, "split-chart", "your workload")
    assert star["x"] == [plan.activation_blocks + plan.resident_activation_blocks]
    for phase in (found.roofline.prefill, found.roofline.decode):
        star = trace(found, "roofline-chart", f"your workload: {phase.name}")
        assert star["y"] == [pytest.approx(phase.total("flops") / phase.seconds)]
    assert trace(found, "compared-chart", "your workload")["x"] == [plan.predicted_step_s * 1e3] * 2


@pytest.mark.parametrize(("name", "limit", "prompt"), [("opt-6.7b", 2048, 1024), ("llama-3.1-8b", 131072, 100_000)])
def test_axes_of_the_context_end_at_the_positions_of_the_model(name: str, limit: int, prompt: int) -> None:
    found = made(name, batch=1, prompt_tokens=prompt)
    assert [point.prompt_tokens for point in found.over_context][-1] == limit - found.task.workload.new_tokens
    for chart_name in ("context-chart", "memory-chart"):
        layout = chart(found, chart_name).figure["layout"]
        assert 10 ** layout["xaxis"]["range"][1] == pytest.approx(limit)
        texts = layout["xaxis"]["ticktext"]
        assert all(len(text) <= 5 for text in texts)
        assert all(
            high / low >= charts.NARROWEST_TICKS for low, high in itertools.pairwise(layout["xaxis"]["tickvals"])
        )


def test_a_prompt_beyond_the_positions_is_the_last_size() -> None:
    assert sizes_around(3000, 1920) == [188, 375, 750, 1500, 3000]
    assert sizes_around(1800, 1920) == [113, 225, 450, 900, 1800], "1920 is as good as 1800"
    assert sizes_around(1024, 1920) == [64, 128, 256, 512, 1024, 1920]
    assert sizes_around(64, None)[-1] == 512


def test_crosses_of_a_colour_of_their_own_stand_where_the_batch_does_not_fit() -> None:
    found = everything()
    for name, points in (("batch-chart", found.over_batch), ("memory-chart", found.over_context)):
        crosses = next(one for one in chart(found, name).figure["data"] if "does not fit" in one["name"])
        wanted = [point for point in points if point.row("on_device") is None]
        assert wanted
        assert crosses["x"] == [one.batch if name == "batch-chart" else one.prompt_tokens for one in wanted]
        assert all("free" in text for text in crosses["text"])
        assert crosses["marker"]["color"] == charts.NO_FIT
    limit = trace(too_large(), "split-chart", "does not fit")
    assert limit["line"]["color"] == charts.NO_FIT
    blocks = {point.activation_blocks for point in too_large().splits}
    assert min(limit["x"]) == max(blocks) + 0.5


def _seen(colour: str, matrix: Any) -> Any:
    """L*a*b* of a colour as someone sees it whose eyes mix linear RGB by `matrix`."""
    srgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.clip(matrix @ np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4), 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


MATRICES = {  # Machado, Oliveira and Fernandes 2009, severity 1
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("eyes", MATRICES)
def test_the_colour_of_what_does_not_fit_is_like_no_other(eyes: str) -> None:
    matrix = np.array(MATRICES[eyes])
    others = [*(colour for colour, _, _ in STYLES.values()), charts.GREY]
    assert min(float(np.linalg.norm(_seen(charts.NO_FIT, matrix) - _seen(one, matrix))) for one in others) > 18
    lightness = [_seen(colour, np.eye(3))[0] for colour in (charts.NO_FIT, "#ffffff", "#14181f")]
    luminance = [((value + 16) / 116) ** 3 for value in lightness]
    assert (luminance[1] + 0.05) / (luminance[0] + 0.05) > 3, "on a light page"
    assert (luminance[0] + 0.05) / (luminance[2] + 0.05) > 3, "on a dark one"


def test_dots_at_one_place_are_one_dot_and_no_two_are_close() -> None:
    shown = everything().roofline.decode.rows
    rows = [row for row in shown if row.intensity and row.seconds]
    dots = dots_of(rows, lambda row: row.intensity, lambda row: row.flops / row.seconds, lambda row: row.name)
    assert sorted(name for dot in dots for name in dot.names) == sorted(row.name for row in rows)
    assert len(dots) < len(rows)
    for one, other in itertools.combinations(dots, 2):
        apart = max(
            abs(math.log10(one.intensity / other.intensity)), abs(math.log10(one.flops_per_s / other.flops_per_s))
        )
        assert apart >= 0.06


def test_the_legend_names_every_trace_with_its_colour_and_symbol() -> None:
    shown = chart(everything(), "batch-chart").figure
    text = "".join(legend(shown))
    assert re.findall(r"</svg>([^<]+)</li>", text) == [one["name"].replace("'", "&#x27;") for one in shown["data"]]
    assert text.count("<polygon") + text.count("<circle") + text.count("<path") == len(shown["data"]) - 1
    assert charts.NO_FIT in text
    assert shown["layout"]["showlegend"] is False
    assert not list(legend(chart(everything(), "planned-timeline").figure))


# ---- the measured run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt-6.7b", "llama-3.1-8b", "mixtral-8x7b"])
def test_on_a_cpu_the_given_model_and_workload_are_scaled_and_it_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dims, workload = facts_of(CONFIGS / f"{name}.json"), Workload(batch=3, prompt_tokens=700, new_tokens=8)
    preset = measured_run.scaled_preset(dims, workload)
    kv_heads = shape_of(dims).num_kv_heads
    assert preset.is_emulated
    assert preset.heads / preset.kv_heads == dims.num_heads / kv_heads
    assert preset.ffn / preset.hidden == pytest.approx(dims.active_width / dims.hidden_size, rel=1e-3)
    assert (preset.hidden, preset.batch, preset.cached_tokens, preset.layers) == (512, 3, 512, 4)
    said = measured_run._in_words(preset, dims, workload)
    assert "(scaled to this machine: layers 4 for 32, hidden size 512 for 4096, " in said
    assert "prompt tokens 512 for 700" in said
    assert "sequences" not in said.partition("scaled")[2]


def test_odd_shapes_are_scaled_to_heads_that_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    workload = Workload(batch=100, prompt_tokens=8, new_tokens=8)
    dims = facts_of(CONFIGS / "llama-3.1-8b.json")
    for heads, hidden in ((7, 4096), (9, 576), (64, 8192), (3, 30)):
        preset = measured_run.scaled_preset(dataclasses.replace(dims, num_heads=heads, hidden_size=hidden), workload)
        assert preset.hidden % (8 * preset.heads) == 0
        assert preset.heads % preset.kv_heads == 0
        assert (preset.batch, preset.cached_tokens) == (8, 64)


def test_on_a_gpu_a_large_cache_is_measured_with_fewer_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dims = facts_of(CONFIGS / "opt-6.7b.json")
    preset = measured_run.scaled_preset(dims, Workload(batch=512, prompt_tokens=2000, new_tokens=8))
    row_bytes = preset.layers * preset.cached_tokens * 2 * 2 * 4096
    assert preset.cached_tokens == 2000
    assert preset.batch == measured_run.MAX_CACHED_BYTES // row_bytes < 512


def test_a_report_where_nothing_fits_has_its_table_too() -> None:
    found = made("mixtral-8x7b", batch=1, config=OffloadConfig(device_weights_gib="all"))
    table = ways_table(found)
    assert table.marked is None
    assert all(cells[1:] == ("does not fit",) for cells in table.rows)
    assert beside_roofline(found) is None
