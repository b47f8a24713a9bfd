"""A model for a command that generates: found, loaded and, where plans need it, with the machine measured.

Owns what is said while that takes its time. Torch-free until something is loaded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from kvoffload.cli.model_source import Source, find_model
from kvoffload.cli.terminal import print_text, progress, waiting
from kvoffload.config import EmulatedLink, OffloadConfig


def without_bars_of_others(source: Source) -> None:
    """What is local is loaded under one line of ours; called before transformers is imported, which reads this then."""
    if source.is_local:
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextlib.contextmanager
def loading(source: Source, where: str) -> Iterator[None]:
    """Says what is loaded while it is; in a line that stays where there is no terminal, or a download shows bars."""
    text = f"loading {source.gguf_file or source.name} {where}"
    if source.is_local:
        with waiting(text, otherwise=True):
            yield
    else:
        print_text(text, err=True)
        yield


class Loaded(NamedTuple):
    """A model and what it is offloaded with."""

    model: Any
    tokenizer: Any
    config: OffloadConfig


def load_for(model: str | None, config: OffloadConfig) -> Loaded:
    """Find and load a model, and measure the machine where this was not done and plans need it.

    Args:
        model: as `find_model` takes it.
        config: options of the session that will follow.

    Raises:
        ConfigError: as `find_model` and `chat.load_model`, or there is no such device.
        ProfileError: the stored profile of the machine is damaged.
    """
    source = find_model(model)
    without_bars_of_others(source)
    with waiting("starting PyTorch and transformers"):
        from kvoffload.cli import chat
        from kvoffload.profiler.stored import load_or_measure
    runs_on, config = chat.device_for(config)
    is_whole = config.device is None
    where = f"on {runs_on}" if is_whole or runs_on.type == "cpu" else f"into host memory for {runs_on}"
    with loading(source, where):
        loaded, tokenizer = chat.load_model(source, runs_on, into_host=not is_whole)
    has_speed = config.link.h2d_gb_per_s is not None if isinstance(config.link, EmulatedLink) else runs_on.type != "cpu"
    if config.profile == "auto" and config.fixed_split is None and has_speed:
        with progress("measuring") as tell:
            config = replace(config, profile=load_or_measure(runs_on, config.link, progress=tell))
    return Loaded(loaded, tokenizer, config)
