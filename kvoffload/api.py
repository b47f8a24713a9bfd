"""The public functions."""

from __future__ import annotations

import dataclasses
import difflib
import gc
import inspect
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvoffload.advise import advice
from kvoffload.config import OffloadConfig, check_options
from kvoffload.errors import ConfigError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.loading import load_model
from kvoffload.planning.plan import Plan
from kvoffload.planning.workload import Workload
from kvoffload.profiler.profile import measure_hardware
from kvoffload.profiler.stored import resolve_profile
from kvoffload.session.session import Session, release

__all__ = ["generate", "load", "measure_hardware", "offload", "plan", "release"]


def offload(model: Any, config: OffloadConfig | None = None, **options: Any) -> Session:
    """Keep the KV cache of a transformers decoder in host memory while it generates.

    Use it as a context manager, or keep the session and `close()` it; afterwards the model is as before. Where the
    session is lost, `release(model)` undoes it.

    Args:
        model: a decoder-only transformers model on one device (also inside PEFT or torch.compile wrappers).
        config: options; all "auto" by default.
        options: none; what is given here is refused with the call that works.

    Returns:
        The session: `session.stats` of the last `generate()`, `session.new_cache()`, `session.close()`.

    Raises:
        UnsupportedModelError: the model cannot be offloaded correctly.
        KVOffloadError: it is offloaded already; `release` undoes that.
        ConfigError: options outside an `OffloadConfig`, with the call that works.
    """
    if options:
        raise _not_in_a_config("offload(model, {})", options)
    return Session(model, _checked(config))


def load(name_or_dir: str | Path, config: OffloadConfig | None = None, **kwargs: Any) -> Session:
    """Load a checkpoint and offload the model: `with load(...) as session: session.model.generate(...)`.

    It is loaded into host memory, which holds the weights once and one layer more at most. With
    `OffloadConfig(device="cuda")` it may be larger than the device: layers that do not fit there are streamed.

    Args:
        name_or_dir: a folder with a checkpoint, or a name on the hub.
        config: options; all "auto" by default.
        kwargs: of transformers' `from_pretrained`; `dtype` is that of the checkpoint unless given.

    Returns:
        The session, whose `model` it is.

    Raises:
        ConfigError: there is no model, or transformers cannot load it; an option outside an `OffloadConfig`.
        HostMemoryError: it is larger than the host memory that is free.
        as `offload`; nothing of the model is left in memory then.
    """
    config = _checked(config)
    _refuse_options(kwargs, "load(name, {})", "config")
    model: Any = load_model(name_or_dir, **kwargs)
    try:
        return Session(model, config)
    except BaseException as error:
        del model
        _drop_frames(error)
        raise


def _drop_frames(error: BaseException | None) -> None:
    """Take what a failed call held out of its traceback, which may be kept for as long as anybody looks at it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()  # a session and what it attached refer to each other


def generate(model: Any, *args: Any, offload_config: OffloadConfig | None = None, **kwargs: Any) -> Any:
    """`model.generate(*args, **kwargs)` with the KV cache in host memory, for a single call.

    Args:
        model: as of `offload`.
        args: of `model.generate`.
        offload_config: options; all "auto" by default.
        kwargs: of `model.generate`.

    Returns:
        What `model.generate` does: token ids, [sequences, tokens] of int64, or its output object.

    Raises:
        ConfigError: an option outside an `OffloadConfig`, with the call that works.
        as `offload`, and whatever `generate` raises.
    """
    _refuse_options(kwargs, "generate(model, ..., offload_config={})", "offload_config", model)
    with offload(model, offload_config):
        return model.generate(*args, **kwargs)


def plan(
    model_or_config: Any,
    workload: Workload,
    profile: HardwareProfile | str | Path = "auto",
    config: OffloadConfig | None = None,
) -> Plan:
    """What offloading would do for a workload, and whether to do it: `plan.recommendation` says so, with the numbers.

    Args:
        model_or_config: a transformers model or configuration, a dict, or a path to a `config.json` or its folder.
        workload: what will be generated.
        profile: the machine: a HardwareProfile, a path to one, the name of a preset, or "auto" for this machine.
        config: options; all "auto" by default.

    Raises:
        InfeasiblePlanError: it fits nowhere; says which limit and by how much.
        ProfileError: the profile cannot be used, or its link has no bandwidth.
        ConfigError: the model's configuration lacks a field, or an argument is of another kind.
        UnsupportedModelError: the model has no cache that grows.
    """
    config = _checked(config)
    if not isinstance(workload, Workload):
        raise ConfigError(f"workload must be a kvoffload.Workload(batch=..., ...), got {type(workload).__name__}")
    return advice.advised_plan(model_or_config, workload, resolve_profile(profile, link=config.link), config)


def _checked(config: OffloadConfig | None) -> OffloadConfig:
    if config is None:
        return OffloadConfig()
    if isinstance(config, Mapping):
        check_options(OffloadConfig, config)
        raise ConfigError(f"options are given as a kvoffload.OffloadConfig, not as a dict: {_written(config)}")
    if not isinstance(config, OffloadConfig):
        raise ConfigError(f"options are given as a kvoffload.OffloadConfig(...), got {type(config).__name__}")
    return config


_OPTIONS = tuple(field.name for field in dataclasses.fields(OffloadConfig))
_SURELY_MEANT = 0.85  # likeness, from which on an argument of `generate` or `from_pretrained` is a misspelt option


def _refuse_options(given: Mapping[str, Any], call: str, argument: str, model: Any = None) -> None:
    """Options among arguments that are passed on, where nobody else takes one of that name.

    Raises:
        ConfigError: with the call that works.
    """
    taken = _taken_by(model)
    options = {
        name: value
        for name, value in given.items()
        if name not in taken and (name in _OPTIONS or _meant(name, argument))
    }
    for name, value in given.items():
        if isinstance(value, (OffloadConfig, Mapping)) and name in ("config", "offload_config", *options):
            raise ConfigError(f"the options are given as {argument}=, not as {name}=: kvoffload.{call.format('...')}")
    if options:
        raise _not_in_a_config(call, options)


def _meant(name: str, argument: str) -> bool:
    return bool(difflib.get_close_matches(name, (*_OPTIONS, argument), n=1, cutoff=_SURELY_MEANT))


def _taken_by(model: Any) -> set[str]:
    """Names that a forward of the model takes."""
    forward = getattr(model, "forward", None)
    return set() if forward is None else set(inspect.signature(forward).parameters)


def _not_in_a_config(call: str, options: Mapping[str, Any]) -> ConfigError:
    """What to write instead of a call with options of its own.

    Raises:
        ConfigError: one that does not exist, with the nearest.
    """
    check_options(OffloadConfig, options)
    return ConfigError(f"options are given in an OffloadConfig: kvoffload.{call.format(_written(options))}")


def _written(options: Mapping[str, Any]) -> str:
    """As code."""
    return f"kvoffload.OffloadConfig({', '.join(f'{name}={value!r}' for name, value in options.items())})"
