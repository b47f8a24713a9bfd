"""`kvoffload report`: one HTML file about one workload on one machine, and a trace beside it.

Owns the files that are written. Does not own the numbers (`profiler/drawing/study.py`), the words (`sections`), the
page (`page`) or the run that is measured for it (`measured_run`).
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from kvoffload.errors import ConfigError
from kvoffload.profiler.drawing import page as pages
from kvoffload.profiler.drawing import sections
from kvoffload.profiler.drawing.study import MeasuredRun, Study
from kvoffload.profiler.drawing.trace import write_trace
from kvoffload.timeline import Timeline


def write_page(found: Study, model: str, output: Path, trace: Path | None, version: str) -> dict[str, Any]:
    """Write the page, and the trace if one is wanted.

    Returns:
        What was written and found, as plain data.

    Raises:
        ConfigError: a file cannot be written, or plotly is missing.
    """
    made = f"kvoffload {version}, {datetime.date.today().isoformat()}."
    text = pages.html(sections.page(found, model, made))
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report {output}: {error}; choose another file with --output") from error
    if trace is not None:
        write_trace(trace, timelines(found, model), _facts(found))
    run = found.measured
    return {
        "output": str(output),
        "output_bytes": len(text.encode()),
        "trace": None if trace is None else str(trace),
        "model": model,
        "hardware": found.task.profile.device_name,
        "link": found.task.profile.link_name,
        "recommendation": found.recommendation,
        "is_exact": found.dims.is_exact,
        "doubt": found.dims.doubt,
        "fits": found.advice is not None,
        "advice": None if found.advice is None else found.advice.to_json(),
        "simulated_step_s": found.simulated_step_s if found.advice else None,
        "measured": None if run is None else _run_json(run),
        "compared": [one._asdict() | {"error_fraction": one.error_fraction} for one in found.compared],
    }


def timelines(found: Study, model: str) -> dict[str, Timeline]:
    """What a trace holds, by what it is called."""
    shown: dict[str, Timeline] = {}
    if found.planned is not None:
        shown[f"planned: {model} on {found.task.profile.device_name}"] = found.planned
    if found.measured is not None:
        run = found.measured
        link = "emulated link" if run.is_emulated else "link"
        shown[f"planned for this machine: {run.shape}"] = run.planned
        shown[f"measured on this machine: {run.device_name}, {link}"] = run.measured
    return shown


def _facts(found: Study) -> dict[str, str]:
    facts = {"planned": f"predicted for {found.task.profile.device_name}, {found.task.profile.link_name}"}
    run = found.measured
    facts["measured"] = "not measured" if run is None else f"{run.shape}, {run.where}"
    return facts


def _run_json(run: MeasuredRun) -> dict[str, Any]:
    return {
        "shape": run.shape,
        "device": run.device_name,
        "link": run.link_name,
        "emulated_link": run.is_emulated,
        "predicted_step_s": run.predicted_step_s,
        "predicted_range_s": list(run.predicted_range_s),
        "simulated_step_s": run.simulated_step_s,
        "decode_step_s": list(run.step_s),
        "decode_step_s_p50": run.median_step_s,
        "spread_fraction": run.spread_fraction,
        "doubt": run.doubt,
        "plan": run.plan.to_json(),
    }
