"""A checkpoint of a causal language model, loaded into host memory by transformers.

Owns what is refused before anything is loaded, and that nothing is drawn off a terminal. Does not own what becomes of
the model (`session`), nor the models that commands name (`cli/model_source.py`).

transformers maps a checkpoint's files, and parameters that are stored as they are used are views of these: nothing is
read before somebody reads them, and what moves elsewhere layer by layer is in memory once (`machine/mapped_files.py`).
Where weights are converted (another dtype, experts put together) the system's file cache holds what they came from
meanwhile, as long as nobody needs that memory.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from kvoffload.errors import ConfigError, HostMemoryError
from kvoffload.machine import system_memory
from kvoffload.units import gib

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
PATTERNS = ("model*.safetensors", "*.safetensors", "*.bin")  # the first of which there are files
PLACING = ("device_map", "tp_plan", "tp_size", "device_mesh", "max_memory", "offload_folder")


def load_model(name_or_dir: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A model in host memory, in the dtype of its checkpoint unless another is given, for inference.

    Args:
        name_or_dir: a folder, or a name on the hub.
        kwargs: of `from_pretrained`, but for those that place it on devices.

    Raises:
        ConfigError: there is no model, transformers cannot load it, or an argument would place it elsewhere.
        HostMemoryError: it is larger than what is free.
    """
    if not isinstance(name_or_dir, (str, Path)):
        raise ConfigError(f"load() takes a folder or a name on the hub, got {type(name_or_dir).__name__}")
    if placing := [name for name in PLACING if kwargs.get(name) is not None]:
        raise ConfigError(
            f"load() puts the model into host memory: leave out {placing[0]}, and say where it runs with "
            "OffloadConfig(device=..., device_weights_gib=...)"
        )
    name, folder = _find(str(name_or_dir), kwargs)
    if folder is not None and not kwargs.get("gguf_file"):
        _check_memory(name, checkpoint_bytes(folder))
    if "torch_dtype" not in kwargs:
        kwargs = {"dtype": "auto", **kwargs}
    with _quiet_off_a_terminal():
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"cannot load {name!r}: {' '.join(str(error).split())}") from error  # in one line
    model.eval()
    return model


def checkpoint_bytes(folder: Path) -> int:
    """Of the weights in a folder, as its index says or as its files are; 0 where there are none."""
    for index in INDICES:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((folder / index).read_text())["metadata"]["total_size"])
    found = (sorted(folder.glob(pattern)) for pattern in PATTERNS)
    return sum(path.stat().st_size for path in next((paths for paths in found if paths), []))


def _find(name: str, kwargs: dict[str, Any]) -> tuple[str, Path | None]:
    """What transformers is to load, and its folder here, which a model on the hub that was never used has not.

    Raises:
        ConfigError: there is a folder without a model, or none of that path.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path / kwargs.get("subfolder", "")
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            if kwargs.get("gguf_file"):
                return str(path), folder
            raise ConfigError(f"the folder {folder} holds no model: it has no config.json")
        return str(path), folder
    if path.exists():
        raise ConfigError(f"{path} is no model: name the folder with its config.json")
    if name.startswith((".", "/", "~")):
        raise ConfigError(f"there is no folder {name!r}")
    asked = {key: kwargs[key] for key in ("cache_dir", "revision") if kwargs.get(key)}
    config = Path(kwargs.get("subfolder", ""), "config.json").as_posix()
    with contextlib.suppress(ValueError):  # no name that the hub could have: transformers says so
        cached = try_to_load_from_cache(name, config, **asked)
        return name, Path(cached).parent if isinstance(cached, str) else None
    return name, None


def _check_memory(name: str, needed_bytes: int) -> None:
    """Refuse what host memory cannot hold.

    Raises:
        HostMemoryError: so it is, with the numbers.
    """
    available = system_memory.available_bytes()
    if needed_bytes > available:
        raise HostMemoryError(
            f"the weights of {name} are {gib(needed_bytes)}, {gib(available)} of host memory are free: "
            f"{gib(needed_bytes - available)} are missing; close what else runs, or load quantised weights"
        )


@contextlib.contextmanager
def _quiet_off_a_terminal() -> Iterator[None]:
    """The bars of transformers are for who can see them move."""
    if sys.stderr.isatty() or not hf_logging.is_progress_bar_enabled():
        yield
        return
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.enable_progress_bar()
