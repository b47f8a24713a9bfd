"""The documents keep what they promise: options, modules and figures exist, and one page stays one page."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from test_layering import ALLOWED
from typer.testing import CliRunner

from campaign.rows import is_gpu, load
from gpu.steps import STEPS
from kvoffload.cli import app
from kvoffload.config import OffloadConfig
from kvoffload.planning.forms import KINDS
from kvoffload.session.stats import GenerationStats

ROOT = Path(__file__).parents[1]


def test_the_page_of_options_lists_each_with_its_default() -> None:
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", text, re.MULTILINE)
    options = [(field.name, repr(field.default).replace("'", '"')) for field in dataclasses.fields(OffloadConfig)]
    assert rows == options


def test_the_architecture_page_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [name for name in ALLOWED if name != "__init__" and not re.search(rf"`{name}/?`", text)]


def names_in(section: str) -> list[str]:
    """Names in the first column of the table below a heading of the page of figures."""
    text = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    below = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", below, re.MULTILINE)
    return sorted(name for row in rows for name in re.findall(r"`(\w+)`", row))


def test_the_page_of_figures_names_every_field_of_the_statistics_and_every_key_of_plan() -> None:
    fields = {field.name for field in dataclasses.fields(GenerationStats)}
    assert names_in("GenerationStats") == sorted(fields | {"decode_step_s_p50"})
    config = ROOT / "tests" / "data" / "configs" / "opt-6.7b.json"
    arguments = ["plan", "--config", str(config), "--hardware", "a100-40gb-pcie4", "--sweep", "1:128", "--json"]
    data = json.loads(CliRunner().invoke(app, arguments).stdout)
    listed = [key for key, value in data.items() if isinstance(value, (list, dict))]
    assert listed == [*("blocks", "alternatives", "answer", "forecast", "limits", "sweep", "precisions", "quantised")]
    assert names_in("Plan") == sorted(set(data) - set(listed))
    for key in listed:
        one = data[key][0] if isinstance(data[key], list) else data[key]
        assert names_in(key) == sorted(KINDS if key == "blocks" else one), key
        assert key != "blocks" or one.keys() <= KINDS.keys()


def test_it_is_said_at_the_top_that_no_gpu_was_measured_as_long_as_that_is_so() -> None:
    results = ROOT / "scripts" / "results"
    measured = [
        path for path in results.glob("*.csv") if path.name != "sweep.csv"
    ]  # which is of models, and times nothing
    on_a_gpu = any(is_gpu(row) for path in measured for row in load(path))
    for page in ("README.md", "docs/gpu.md", "docs/performance.md", "docs/will-it-help.md"):
        top = (ROOT / page).read_text(encoding="utf-8")[:600]
        assert ("No GPU has run this code yet" in top) == (not on_a_gpu), page


def test_the_page_on_gpus_names_every_step_of_tier_1_and_its_file() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    for step in STEPS:
        line = next((line for line in table if re.match(rf"\| ([\w .-]+, )?{step.name}[, ]", line)), "")
        assert line, step.name
        assert step.writes == "-" or f"`{step.writes}`" in line


def test_pages_stay_short() -> None:
    limits = dict.fromkeys((ROOT / "docs" / "adr").glob("*.md"), 40) | {ROOT / "docs" / "architecture.md": 80}
    assert not {
        page.name: count
        for page, limit in limits.items()
        if (count := len(page.read_text(encoding="utf-8").splitlines())) >= limit
    }
