"""The model of a command and its first answer: what `generate`, `chat` and `demo` have in common.

Owns loading onto a device, and the text of an answer on its way to the terminal. Does not own where the model is
(`model_source`) nor batches and what is compared (`answering`).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer
from transformers.utils import logging as hf_logging

from kvoffload.cli.answering import answer_all
from kvoffload.cli.model_source import Source, find_model
from kvoffload.config import OffloadConfig
from kvoffload.errors import ConfigError
from kvoffload.session.model_weights import named_device
from kvoffload.session.stats import GenerationStats

# One of these is in every folder that a tokenizer was saved to, whatever its kind.
TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "merges.txt", "tekken.json")


class Reply(NamedTuple):
    """What a model said, with and without offloading."""

    text: str
    tokens_equal: bool | None  # None: not compared
    prompt_tokens: int
    new_tokens: int
    stats: GenerationStats


def device_for(config: OffloadConfig) -> tuple[torch.device, OffloadConfig]:
    """Where a model shall run, and the options with that device where not all of it may be there.

    Raises:
        ConfigError: there is no such device.
    """
    device = named_device(config.device)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and not isinstance(config.device_weights_gib, str):
            config = replace(config, device=str(device))
    return device, config


def load_model(
    model: Source | str | None, device: torch.device, *, into_host: bool = False
) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer, in float32 for the CPU and bfloat16 for a GPU.

    Args:
        model: as `find_model` takes it, or what it found.
        device: where it runs.
        into_host: leave it in host memory, from where it is offloaded to the device.

    Raises:
        ConfigError: as `find_model`, or what is there has no tokenizer or cannot be loaded.
    """
    source = model if isinstance(model, Source) else find_model(model)
    _require_tokenizer(source)
    kwargs: dict[str, Any] = {"local_files_only": source.is_local}
    if source.gguf_file is not None:
        kwargs["gguf_file"] = source.gguf_file
    if source.is_local or not sys.stderr.isatty():  # of what is local the command itself says that it loads
        hf_logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, **kwargs)
        loaded = AutoModelForCausalLM.from_pretrained(source.name, dtype=dtype, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"cannot load {source.name!r}: {' '.join(str(error).split())}") from error  # in one line
    placed: PreTrainedModel = loaded if into_host else loaded.to(device)  # type: ignore[arg-type]
    return placed.eval(), tokenizer


def _require_tokenizer(source: Source) -> None:
    """For a folder without one transformers makes an empty tokenizer, or names packages that would not help."""
    folder = Path(source.name)
    if source.gguf_file is None and folder.is_dir() and not any(any(folder.glob(one)) for one in TOKENIZER_FILES):
        raise ConfigError(
            f"the folder {source.name} has no tokenizer files: put the model's own (tokenizer.json and the like) "
            "beside its config.json"
        )


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    config: OffloadConfig,
    max_new_tokens: int,
    compare: bool,
    streamer: Any = None,
) -> Reply:
    """Answer `prompt` with greedy decoding and the cache offloaded.

    Args:
        compare: also generate without offloading and compare the tokens.
        streamer: gets the tokens as they come.
    """
    (found,) = answer_all(
        model,
        tokenizer,
        [prompt],
        config=config,
        max_new_tokens=max_new_tokens,
        compare=compare,
        streamer=streamer,
    )
    (one,) = found.answers
    return Reply(one.text, found.tokens_equal, one.prompt_tokens, one.new_tokens, found.stats)


def streamer(tokenizer: Any) -> TextStreamer:
    """Prints an answer while it is generated."""
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
