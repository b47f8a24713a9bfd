"""The report: its numbers are those of the plan, its trace opens, its page needs nothing but itself."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run, run_badly
from configs import CONFIGS
from reports import (
    HARDWARE,
    PRETENDED_STEPS,
    SHIPPED_ROWS,
    best_step_s,
    made,
    pretended_run,
    with_everything,
    write_rows,
)

from campaign import rows
from kvoffload import bench
from kvoffload.cli import measured_run, report_page
from kvoffload.config import OffloadConfig
from kvoffload.errors import ConfigError
from kvoffload.model.stored_facts import facts_of
from kvoffload.planning.workload import Workload
from kvoffload.profiler.drawing import page as pages
from kvoffload.profiler.drawing import sections
from kvoffload.profiler.drawing.chart import Chart
from kvoffload.profiler.drawing.study import ROW_METRICS, Compared, Study, compared_rows, typical_steps
from kvoffload.profiler.drawing.trace import STEPS_THREAD, trace
from kvoffload.timeline import Span, Timeline

TINY = bench.Preset(
    architecture="opt", hidden=64, heads=4, kv_heads=4, ffn=64, layers=2, batch=4, cached_tokens=256, h2d_gb_per_s=0.02
)


@functools.cache
def everything() -> Study:
    return with_everything()


def charts_of(found: Study) -> list[Chart]:
    return [chart for section in sections.page(found, "model", "made").sections for chart in section.charts]


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt-6.7b", "llama-2-7b", "llama-3.1-8b", "qwen3-8b"])
def test_the_lowest_point_of_the_split_curve_is_the_plan_and_nothing_is_below_it(name: str) -> None:
    found = made(name, batch=64, prompt_tokens=2048, config=OffloadConfig(packing="off"))
    assert found.advice is not None
    plan = found.advice.plan
    chosen = plan.activation_blocks + plan.resident_activation_blocks
    by_blocks = {point.activation_blocks: point for point in found.splits}
    assert min(by_blocks.values(), key=lambda point: point.step_s).step_s == pytest.approx(plan.predicted_step_s)
    assert by_blocks[chosen].step_s == pytest.approx(plan.predicted_step_s)
    assert plan.predicted_step_s == pytest.approx(best_step_s(found))
    for point in found.splits:
        assert point.step_s == max(point.link_s, point.device_s, point.host_s)
        assert point.paper_step_s >= point.step_s * (1 - 1e-9)


def test_no_point_of_the_split_curve_is_below_a_plan_that_packs() -> None:
    found = made("llama-3.1-8b", batch=160, prompt_tokens=2048)
    assert found.advice is not None
    plan = found.advice.plan
    assert plan.count(form="packed_kv")
    lowest_s = min(point.step_s for point in found.splits)
    assert plan.predicted_step_s <= lowest_s * (1 + 1e-3)
    assert lowest_s <= plan.predicted_step_s * 1.05, "a plan may have blocks of both forms, which the curve has not"


def test_the_planned_step_moves_the_bytes_of_the_plan_at_the_speed_of_the_link() -> None:
    found = everything()
    assert found.planned is not None
    assert found.advice is not None
    copies = found.planned.lane("h2d")
    num_bytes = found.advice.plan.link_bytes_per_step
    assert sum(span.num_bytes for span in copies) == pytest.approx(num_bytes, rel=1e-3)
    rates = found.task.inputs(found.task.workload.cached_tokens).rates
    assert found.planned.busy_s("h2d") == pytest.approx(num_bytes / rates.h2d_bytes_per_s["kv"], rel=1e-3)
    assert found.planned.steps_s[-1] == pytest.approx(found.simulated_step_s, rel=0.02)
    assert found.simulated_step_s >= found.advice.plan.predicted_step_s


def test_sizes_lie_on_both_sides_of_the_workload() -> None:
    found = everything()
    for points, own in ((found.over_batch, 64), (found.over_context, 1024)):
        sizes = [point.batch if own == 64 else point.prompt_tokens for point in points]
        assert sizes == sorted(set(sizes))
        assert own in sizes
        assert sizes[0] < own < sizes[-1]
    small = made("qwen3-8b", batch=1)
    assert [point.batch for point in small.over_batch] == [1, 2, 4, 8, 16, 32, 64]


def test_memory_that_fits_is_told_by_the_limit_that_is_drawn() -> None:
    for point in everything().over_context:
        assert (point.row("on_device") is not None) == (point.whole_bytes <= point.usable_bytes)


def test_a_model_that_fits_nowhere_still_gets_its_report() -> None:
    found = made("mixtral-8x7b", batch=1, config=OffloadConfig(device_weights_gib="all"))
    assert found.advice is None
    assert found.recommendation.startswith("It does not fit: device memory: weights of 93.41 GB")
    assert {point.usable_bytes for point in found.over_context} == {0}
    text = pages.html(sections.page(found, "mixtral", "made"))
    assert "<p>It does not fit.</p>" in text
    assert "No split fits: device memory" in text
    assert [chart.name for chart in charts_of(found)] == ["roofline-chart", "memory-chart"]


def test_rows_of_the_benchmark_become_pairs_of_measured_and_predicted(tmp_path: Path) -> None:
    found = compared_rows(write_rows(tmp_path / "decode.csv"))
    assert [one.name for one in found] == ["planned, cpu-mha", "planned, cpu-gqa", "full_transfer, cpu-mha"]
    assert [(one.measured_s, one.predicted_s) for one in found] == list(PRETENDED_STEPS.values())
    assert found[0].where == "a pretended CPU (1 thread), link: emulated 0.1 GB/s"
    assert found[0].error_fraction == pytest.approx(0.2)


def test_rows_without_samples_or_without_a_partner_are_left_out(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "decode.csv")
    more: Any = {"config": {"preset": "cpu-mha"}, "link": "emulated 0.1 GB/s", "device": "a pretended CPU (1 thread)"}
    empty = [rows.row("decode", "none", metric, "s", "cpu-mha", [], **more) for metric in ROW_METRICS]
    alone = rows.row("decode", "alone", "decode_step", "s", "cpu-mha", [0.5], **more)
    rows.save(path, [*empty, alone])
    assert len(compared_rows(path)) == len(PRETENDED_STEPS)


def test_the_rows_that_ship_can_be_compared() -> None:
    found = compared_rows(SHIPPED_ROWS)
    assert found
    assert all(one.measured_s > 0 and one.predicted_s > 0 for one in found)


def test_the_step_shown_is_one_like_the_median() -> None:
    marks = (0.0, 9.0, 18.0, 20.0, 21.0, 22.0, 30.0)
    found = Timeline(tuple(Span("h2d", start, end, 1) for start, end in itertools.pairwise(marks)), marks)
    assert typical_steps(found, 1.0, 2, after=2).steps_s == (0.0, 1.0, 2.0)
    assert typical_steps(found, 9.0, 1, after=0).steps_s == (0.0, 9.0)
    assert typical_steps(found, 9.0, 1, after=3).steps_s == (0.0, 8.0)


# ---- trace -----------------------------------------------------------------------------------------------------------


def test_a_trace_has_named_threads_whose_events_nest_in_steps_and_never_overlap(tmp_path: Path) -> None:
    found = everything()
    path = tmp_path / "trace.json"
    report_page.write_page(found, "opt", tmp_path / "report.html", path, "0")
    data = json.loads(path.read_text(encoding="utf-8"))
    events = data["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert list(processes.values()) == [
        "planned: opt on NVIDIA A100 40GB PCIe",
        "planned for this machine: a pretended shape",
        "measured on this machine: a pretended device, emulated link",
    ]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    assert {(event["pid"], event["tid"]) for event in spans} == set(threads)
    for pid, tid in threads:
        own = sorted((e for e in spans if (e["pid"], e["tid"]) == (pid, tid)), key=lambda event: event["ts"])
        for before, after in itertools.pairwise(own):
            assert before["ts"] + before["dur"] <= after["ts"] + 2e-3, threads[pid, tid]  # us, rounded to ns
        steps = [e for e in spans if e["pid"] == pid and e["tid"] == STEPS_THREAD]
        assert own[0]["ts"] >= 0
        assert max(e["ts"] + e["dur"] for e in own) <= max(e["ts"] + e["dur"] for e in steps) + 2e-3
    assert data["otherData"]["measured"].startswith("a pretended shape")


def test_the_link_of_a_trace_is_busy_for_bytes_over_bandwidth() -> None:
    timeline = Timeline((Span("h2d", 0.25, 0.75, 1000), Span("attention", 0.75, 1.0)), (0.0, 1.0))
    events = trace({"one": timeline}, {})["traceEvents"]
    (copy,) = [event for event in events if event["name"] == "link to the device"]
    assert (copy["ts"], copy["dur"], copy["args"]["bytes"]) == (250_000.0, 500_000.0, 1000)
    assert [e["name"] for e in events if e["ph"] == "X"] == ["step 0", "link to the device", "attention"]


# ---- page ------------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Tags with their attributes, in order, and the text of the page without script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._skipped = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skipped = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._skipped = ""

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.words += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@functools.cache
def parsed() -> tuple[str, Elements]:
    text = pages.html(sections.page(everything(), "opt-6.7b", "made"))
    return text, Elements(text)


def test_the_page_loads_nothing_from_anywhere() -> None:
    text, elements = parsed()
    for _, attributes in elements.tags:
        assert not {"src", "srcset", "action", "data", "poster"} & set(attributes)
    assert [link["href"] for link in elements.of("link")] == ["data:,"]
    assert all((link["href"] or "").startswith("#") for link in elements.of("a"))
    policy = next(meta["content"] or "" for meta in elements.of("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"url\(|@import", style)
    ours = pages.FOLDER / "page.js"
    assert not re.search(r"fetch|XMLHttp|import\(|http", ours.read_text(encoding="utf-8"))


def test_every_chart_has_words_and_a_table_and_every_section_a_way_to_it() -> None:
    _, elements = parsed()
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    charts = [div for div in elements.of("div") if div.get("class") == "chart"]
    assert len(charts) == 8
    for chart in charts:
        assert chart["role"] == "img"
        assert chart["aria-labelledby"] in ids
        assert chart["aria-describedby"] in ids
    assert len(elements.of("details")) == len(charts)
    links = [(link["href"] or "")[1:] for link in elements.of("a")]
    assert links == ["main", *(section["id"] for section in elements.of("section"))]
    for region in elements.of("div"):
        if region.get("class") == "scroll":
            assert region["tabindex"] == "0"
            assert region["aria-label"]
    levels = [int(tag[1]) for tag, _ in elements.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert levels.count(1) == 1


def test_every_chart_says_and_tabulates_something() -> None:
    for chart in charts_of(everything()):
        assert chart.figure["data"], chart.name
        assert len(chart.alternative) > 40
        assert chart.rows
        assert all(len(row) == len(chart.columns) for row in chart.rows)


def test_what_was_not_measured_is_called_so_and_what_is_emulated_too() -> None:
    _, with_run = parsed()
    assert "emulated: copies are paced by a thread, no GPU took part" in with_run.words
    assert "predictions from datasheet figures, not measurements" in with_run.words
    assert "25.6 GB/s to the device (measured by others)" in with_run.words
    without = Elements(pages.html(sections.page(made("llama-3.1-8b"), "llama", "made")))
    assert without.words.count("Not measured. kvoffload report --measure") == 2
    assert "nothing: everything here is a prediction" in without.words


def test_measured_steps_that_disagree_are_doubted() -> None:
    steady = pretended_run(everything())
    assert steady.doubt == ""
    shaky = steady._replace(step_s=(0.10, 0.11, 0.12, 0.13, 0.20))
    assert shaky.spread_fraction == pytest.approx((0.144 - 0.108) / 0.12)
    assert shaky.doubt.startswith("The measured steps disagree by 0.30 of their median")
    text = Elements(pages.html(sections.page(everything()._replace(measured=shaky), "opt", "made"))).words
    assert shaky.doubt in text
    assert "disagree" not in parsed()[1].words


def test_one_of_anything_is_no_plural_and_long_numbers_are_grouped() -> None:
    run = pretended_run(everything())
    run = run._replace(measured=run.measured.steps(0), planned=run.planned.steps(0))
    small: dict[str, Any] = {"batch": 1, "prompt_tokens": 1, "new_tokens": 1}
    measured = made(**small, measured=run)
    compared = made(**small, compared=(Compared("one", "an emulated link", 1.0, 1.0),))
    long = made("llama-3.1-8b", batch=1, prompt_tokens=400_000)
    pages_of = [Elements(pages.html(sections.page(one, "model", "made"))).words for one in (measured, compared, long)]
    for words in pages_of:
        plural = r"(?<![\w.,/-])1 (?:(?:new|prompt|decode|measured|cached) )?[a-z]+s\b"
        assert not [found for found in re.findall(plural, words) if found not in ("1 is", "1 stays")]
    assert "1 prompt token and 1 new token each" in pages_of[0]
    assert "1 decode step, planned and measured" in pages_of[0]
    assert "1 of 1 step ran over an emulated link" in pages_of[1]
    assert "400,000 prompt tokens" in pages_of[2]


def test_names_from_files_are_only_text() -> None:
    hostile = "</script><script>alert(1)</script><b>"
    found = everything()
    profile = dataclasses.replace(found.task.profile, device_name=hostile)
    hostile_run = pretended_run(found)._replace(device_name=hostile, shape=hostile)
    compared = (Compared(hostile, hostile, 1.0, 1.0),)
    changed = found._replace(task=found.task._replace(profile=profile), measured=hostile_run, compared=compared)
    text = pages.html(sections.page(changed, hostile, hostile))
    assert "<script>alert" not in text
    assert text.count("<script") == parsed()[0].count("<script")


# ---- measured --------------------------------------------------------------------------------------------------------


@pytest.mark.timing
def test_a_measured_run_stands_beside_what_was_planned_for_it() -> None:
    dims = facts_of(CONFIGS / "opt-6.7b.json")
    told: list[str] = []
    found = measured_run.measure_run(
        dims,
        Workload(batch=1, prompt_tokens=64, new_tokens=8),
        lambda what, _share: told.append(what),
        preset=TINY,
    )
    assert told[0] == "the model"
    assert told[-1] == "done"
    assert found.is_emulated
    assert "emulated" in found.link_name
    assert len(found.step_s) == measured_run.NEW_TOKENS - 1 - measured_run.NUM_UNEVEN_STEPS
    num_bytes = found.plan.link_bytes_per_step
    for timeline in (found.planned, found.measured):
        assert timeline.num_steps == 2
        moved = sum(span.num_bytes for span in timeline.lane("h2d"))
        assert moved == pytest.approx(2 * num_bytes, rel=0.1)
        assert timeline.lane("attention")
        assert timeline.lane("dense")
    assert found.predicted_step_s == pytest.approx(found.median_step_s, rel=0.5)
    assert min(found.predicted_range_s) <= found.predicted_step_s <= max(found.predicted_range_s)


def test_on_a_gpu_few_layers_of_the_models_shape_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    workload = Workload(batch=8, prompt_tokens=1024, new_tokens=8)
    dims = facts_of(CONFIGS / "llama-3.1-8b.json")
    preset = measured_run.scaled_preset(dims, workload)
    assert (preset.hidden, preset.heads, preset.kv_heads, preset.ffn) == (4096, 32, 8, 14336)
    assert (preset.layers, preset.batch, preset.cached_tokens, preset.dtype) == (4, 8, 1024, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"has heads of 256 at a hidden size of 4096: leave it out"):
        measured_run.scaled_preset(dataclasses.replace(dims, head_dim=256), workload)


# ---- command ---------------------------------------------------------------------------------------------------------


def options(tmp_path: Path, **changes: Any) -> list[object]:
    values = {
        "config": CONFIGS / "opt-6.7b.json",
        "hardware": HARDWARE,
        "batch": 64,
        "output": tmp_path / "report.html",
    } | changes
    return ["report", *(part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value))]


@pytest.mark.parametrize("name", ["opt-6.7b", "llama-2-7b", "llama-3.1-8b", "mixtral-8x7b", "qwen3-8b"])
def test_the_command_writes_a_report_of_every_recorded_configuration(name: str, tmp_path: Path) -> None:
    trace_path = tmp_path / "trace.json"
    changes = {"config": CONFIGS / f"{name}.json", "trace": trace_path, "rows": write_rows(tmp_path / "decode.csv")}
    result = run(*options(tmp_path, **changes), "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["output_bytes"] == (tmp_path / "report.html").stat().st_size
    assert found["fits"]
    assert found["measured"] is None
    assert len(found["compared"]) == len(PRETENDED_STEPS)
    assert json.loads(trace_path.read_text(encoding="utf-8"))["displayTimeUnit"] == "ms"
    assert f"<h1>{name} on NVIDIA A100 40GB PCIe</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert result.stderr.splitlines() == [f"wrote {tmp_path / 'report.html'}", f"wrote {trace_path}"]


def test_without_plotly_the_command_says_how_to_get_it_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.setitem(sys.modules, "plotly", None)
    message = run_badly(*options(tmp_path, config=tmp_path / "missing"))
    assert "pip install 'kvoffload[report]'" in message
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardware": "a100-41gb"}, r"unknown hardware preset 'a100-41gb'; near: a100-40gb"),
        ({"config": "nowhere"}, r"cannot read the model configuration nowhere"),
        ({"batch": 0}, r"--batch must be a whole number from 1 to 1,000,000,000, got 0"),
        ({"rows": "nowhere.csv"}, r"cannot read the rows in nowhere\.csv"),
        ({"rows": CONFIGS / "opt-6.7b.json"}, r"is no results file|holds no row"),
        (
            {"output": "/nowhere/report.html"},
            r"--output: cannot write /nowhere/report\.html: there is no folder /nowhere",
        ),
        ({"trace": "/nowhere/trace.json"}, r"--trace: cannot write /nowhere/trace\.json"),
    ],
)
def test_bad_input_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert re.search(message, run_badly(*options(tmp_path, **changes)))
