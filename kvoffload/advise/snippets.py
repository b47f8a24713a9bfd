"""Python to paste for each way to do a workload, with a `model`, its `inputs` and the options that count."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kvoffload.advise.task import Alternative, Task
from kvoffload.config import OffloadConfig

CODE = "    "  # what code stands behind in a text


def loaded_by(model_or_config: Any) -> str:
    """What `from_pretrained` takes for this model; OWNER/NAME where that is not known."""
    if not isinstance(model_or_config, (str, Path)):
        return "OWNER/NAME"
    path = Path(model_or_config)
    if path.is_dir():
        return str(path)
    is_hub_id = not path.exists() and str(model_or_config).count("/") == 1
    return str(model_or_config) if is_hub_id else "OWNER/NAME"


def plain(task: Task) -> str:
    """`generate()` as it is."""
    return f"out = {_run(task)}"


def in_parts(task: Task, batch: int) -> str:
    """So many sequences at once, one part after another."""
    return (
        f"for i in range(0, {task.workload.batch}, {batch}):\n"
        f"    part = {{k: v[i : i + {batch}] for k, v in inputs.items()}}\n"
        f"    out = {_run(task, 'part')}"
    )


def offloaded(task: Task, *, is_greedy: bool) -> str:
    """With the cache offloaded; `is_greedy` where verified drafts are part of what was predicted."""
    written = _config(task.config)
    run = f"    out = {_run(task, is_greedy=is_greedy)}"
    if written == "kvoffload.OffloadConfig()":
        return f"with kvoffload.offload(model):\n{run}"
    return f"config = {written}\nwith kvoffload.offload(model, config):\n{run}"


def streamed(task: Task, name: str, *, is_greedy: bool) -> str:
    """With weights that stay in host memory; `name` is what `from_pretrained` takes."""
    return (
        f"config = {_config(dataclasses.replace(task.config, device='cuda'))}\n"
        f'with kvoffload.load("{name}", config) as session:\n'
        f"    out = session.{_run(task, is_greedy=is_greedy)}"
    )


def quantised(task: Task, name: str, one: Alternative, bits: int) -> str:
    """With weights in 8 or 4 bits by bitsandbytes, then what `one` says: whole, in parts, or offloaded."""
    options = "load_in_8bit=True"
    if bits == 4:
        options = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"'
    run = plain(task)
    if one.way in ("offload", "drafts"):
        run = offloaded(task, is_greedy=one.way == "drafts")
    elif one.runs > 1:
        run = in_parts(task, one.batch)
    return (
        "from transformers import AutoModelForCausalLM, BitsAndBytesConfig\n"
        "bits = BitsAndBytesConfig(  # pip install bitsandbytes\n"
        f"    {options}\n"
        ")\n"
        "model = AutoModelForCausalLM.from_pretrained(\n"
        f'    "{name}", quantization_config=bits, device_map="cuda"\n'
        f")\n{run}"
    )


def _run(task: Task, inputs: str = "inputs", *, is_greedy: bool = False) -> str:
    beams = "" if task.workload.num_beams == 1 else f", num_beams={task.workload.num_beams}"
    greedy = ", do_sample=False" if is_greedy else ""
    return f"model.generate(**{inputs}, max_new_tokens={task.workload.new_tokens}{beams}{greedy})"


def _config(config: OffloadConfig) -> str:
    changed: dict[str, Any] = {
        one.name: getattr(config, one.name)
        for one in dataclasses.fields(config)
        if getattr(config, one.name) != one.default
    }
    written = ", ".join(f"{name}={value!r}" for name, value in changed.items()).replace("'", '"')
    return f"kvoffload.OffloadConfig({written})"
