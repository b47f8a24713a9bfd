"""Fields of a Hugging Face configuration as it was written: files, nested text configurations, names of one number.

Owns the lookup and its errors. Does not own what the numbers mean (`guess`), nor what transformers makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from kvoffload.errors import ConfigError, UnsupportedModelError
from kvoffload.machine.dtypes import ITEMSIZE_BYTES
from kvoffload.model.config_files import read_configuration

_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads"),
    "head_dim": ("head_dim", "attention_head_dim", "d_kv"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim"),
    "vocab_size": ("vocab_size",),
}
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_SHARED = ("dtype", "torch_dtype", "quantization_config")

MAX_NUMBER = 10**8  # no dimension of a decoder is larger

Get = Callable[[str], Any]  # the value of a field, None where it is missing


def contents(config: Any) -> dict[str, Any]:
    """A whole configuration as plain data.

    Args:
        config: a transformers configuration object, the dict of a `config.json`, or a text that names one: a path to
            such a file or to the folder it is in, a well-known name or a hub id (`config_files`).

    Raises:
        ConfigError: there is no such file, or it holds no configuration.
    """
    if isinstance(config, (str, Path)):
        return dict(read_configuration(config))
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    raise ConfigError(
        f"a {type(config).__name__} is no model configuration: pass a transformers model or configuration, a dict, or "
        "the path of a config.json or its folder"
    )


def reader(said: Mapping[str, Any]) -> Get:
    """A lookup in what a configuration says of its decoder; None for what is missing."""
    # What is said once for all parts of a multimodal model counts for its decoder as well.
    for name in _TEXT_CONFIGS:
        if isinstance(said.get(name), Mapping):
            said = {shared: said.get(shared) for shared in _SHARED} | _without_none(said[name], _SHARED)
    return said.get


def _without_none(said: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if value is not None or name not in names}


def whole(get: Get, field: str, default: int | None = None) -> int:
    """A number that must be there, or have a default; of several per layer the largest.

    Raises:
        ConfigError: it is missing or no whole number from 1 to `MAX_NUMBER`; names it.
        UnsupportedModelError: there are no attention heads.
    """
    names = _NAMES[field]
    for name in names:
        value = get(name)
        if value is None:
            continue
        if isinstance(value, (list, tuple)) and value:
            value = max(value)  # one per layer (gemma3n)
        if not _is_whole(value) or value < 1:
            raise ConfigError(f"{name} of {model_type(get)} must be a whole number of at least 1, got {value!r}")
        return _checked(get, name, value)
    if default is None:
        if field == "num_heads":
            raise UnsupportedModelError(
                f"{model_type(get)} has no attention heads ({' or '.join(names)} is missing): there is no KV cache"
            )
        raise ConfigError(f"the configuration of {model_type(get)} lacks {names[0]} (also looked for: {_rest(names)})")
    return default


def first_whole(get: Get, *names: str) -> int | None:
    """The first of several fields that is a whole number other than 0; what is no number counts as missing.

    Raises:
        ConfigError: it is negative or absurdly large; names it.
    """
    for name in names:
        value = get(name)
        if _is_whole(value) and value:
            return _checked(get, name, value)
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked(get: Get, name: str, value: int) -> int:
    if not 0 < value <= MAX_NUMBER:
        raise ConfigError(f"{name} of {model_type(get)} is {value!r}, which no decoder has: correct the configuration")
    return value


def _rest(names: tuple[str, ...]) -> str:
    return ", ".join(names[1:]) or "no other name"


def dtype_name(dtype: Any) -> str:
    """Of a torch dtype, or of its name."""
    return str(dtype).removeprefix("torch.")


def itemsize_bytes(dtype: Any) -> int:
    """Bytes of one value of a torch dtype, or of its name."""
    name = dtype_name(dtype)
    if name not in ITEMSIZE_BYTES:
        raise ConfigError(f"unknown dtype {name!r}; known: {', '.join(sorted(ITEMSIZE_BYTES))}")
    return ITEMSIZE_BYTES[name]


def stated_positions(get: Get) -> int | None:
    """Tokens the model has positions for, if its file says so (a RoPE scaling is not multiplied in)."""
    values = (get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((value for value in values if _is_whole(value) and value > 0), None)


def dtype_of(get: Get) -> Any:
    """That of weights that are not quantised, as a configuration says it.

    Where it does not: loaders of quantised checkpoints take 16 bits for the rest, transformers float32 for all.
    """
    return get("dtype") or get("torch_dtype") or ("bfloat16" if get("quantization_config") else "float32")


def model_type(get: Get) -> str:
    """For a message."""
    return str(get("model_type") or "this model")
