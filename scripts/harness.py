#!/usr/bin/env python3
"""Somebody else's harness: lm-eval on a small local task, without and with the KV cache in host memory.

Three runs with one model object: plain; inside `kvoffload.offload(model)`; and through a `custom_generate/` folder that
is named in lm-eval's `gen_kwargs`. Every answer and every log-likelihood must be the same, else it exits with 1.
docs/harness.md says how to install lm-eval, which is no dependency of ours.

scripts/harness.py                       # the small model of the demo
scripts/harness.py --model DIR_OR_HUB_ID --split 0.5
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

# Both are read when the packages are imported. The tasks are files beside this one.
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table

import kvoffload
from kvoffload import custom_generate
from kvoffload.cli import chat
from kvoffload.cli.model_source import find_model
from kvoffload.cli.options import AsJson, LinkSpeed, Split, emulated_link
from kvoffload.cli.terminal import script
from kvoffload.errors import ConfigError

TASKS = Path(__file__).parent / "harness"


class Carried(logging.Handler):
    """Adds up what the link carried in the calls of a `custom_generate/` folder, from what they log."""

    h2d_bytes = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.h2d_bytes += sum(getattr(value, "h2d_bytes", 0) for value in record.args or ())


class Evaluation(NamedTuple):
    """What lm-eval said.

    Attributes:
        scores: of each task.
        answers: of each task and document, everything the model replied, as lm-eval keeps it.
    """

    scores: dict[str, float]
    answers: dict[str, list[Any]]


def evaluate(
    model: Any, tokenizer: Any, *, batch_size: int = 4, gen_kwargs: dict[str, Any] | None = None
) -> Evaluation:
    """Run the local tasks with a model object.

    Args:
        model: a transformers model, offloaded or not.
        tokenizer: its own.
        batch_size: prompts at once, padded on the left.
        gen_kwargs: what lm-eval passes on to `model.generate`.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(TASKS.glob("*.yaml"))]
    for task in tasks:
        files = task["dataset_kwargs"]["data_files"]
        task["dataset_kwargs"]["data_files"] = {split: str(TASKS / name) for split, name in files.items()}
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        gen_kwargs=gen_kwargs,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}
    return Evaluation(
        scores={
            f"{task} {key.partition(',')[0]}": value
            for task, results in found["results"].items()
            for key, value in results.items()
            if isinstance(value, float) and "stderr" not in key
        },
        answers={name: [row["resps"] for row in rows] for name, rows in samples.items()},
    )


class Run(NamedTuple):
    """One of the three."""

    name: str
    found: Evaluation
    h2d_bytes: int


def compare(model: Any, tokenizer: Any, config: kvoffload.OffloadConfig) -> list[Run]:
    """The three runs; the first is the one to compare with."""
    runs = [Run("plain", evaluate(model, tokenizer), 0)]
    with kvoffload.offload(model, config) as session:
        found = evaluate(model, tokenizer)
        runs.append(Run("offload(model)", found, session.backend.link_use("h2d").copied_bytes))
    carried, logger = Carried(), logging.getLogger("kvoffload.custom_generate")
    logger.addHandler(carried)
    logger.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        custom_generate.write(folder, config)
        found = evaluate(model, tokenizer, gen_kwargs={"custom_generate": folder, "trust_remote_code": True})
    logger.removeHandler(carried)
    return [*runs, Run("custom_generate", found, carried.h2d_bytes)]


def main(
    model: Annotated[str | None, typer.Option(help="Folder or hub id; default: the demo's model.")] = None,
    split: Split = "transfer",
    link_gb_per_s: LinkSpeed = None,
    as_json: AsJson = False,
) -> None:
    """Compare lm-eval's results without and with kvoffload."""
    config = kvoffload.OffloadConfig(split=split, link=emulated_link(link_gb_per_s) or "auto")
    source = find_model(model)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed; docs/harness.md says how")
    loaded, tokenizer = chat.load_model(source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    runs = compare(loaded, tokenizer, config)
    same = [run.found.answers == runs[0].found.answers for run in runs]
    if as_json:
        rows = [
            {"name": run.name, "same_as_plain": is_same, "h2d_bytes": run.h2d_bytes, **run.found._asdict()}
            for run, is_same in zip(runs, same, strict=True)
        ]
        print(json.dumps({"options": config.to_json(), "runs": rows}, indent=1))
    else:
        table = Table("run", *runs[0].found.scores, "from host", "answers")
        for run, is_same in zip(runs, same, strict=True):
            scores = [f"{score:.3f}" for score in run.found.scores.values()]
            verdict = "the same" if is_same else "DIFFERENT"
            table.add_row(run.name, *scores, f"{run.h2d_bytes / 1e6:.1f} MB", verdict)
        Console().print(table)
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    script(main)()
