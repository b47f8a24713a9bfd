"""Where profiles are kept: one file per device, driver and PyTorch version, and the presets.

Owns the folder (`$XDG_CACHE_HOME` or `~/.cache`, then `kvoffload/`) and the choice of a profile. Does not measure.
The order in which a profile is found is `load_or_measure`'s; what is found but damaged is an error that names the
file, never a silent second measurement.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from pathlib import Path

import torch

from kvoffload.config import EmulatedLink
from kvoffload.errors import ConfigError, ProfileError
from kvoffload.machine.cache_folder import cache_folder, write_whole
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.machine import find_profile
from kvoffload.profiler.budget import Progress
from kvoffload.profiler.device import Link, machine_key, resolve_device
from kvoffload.profiler.profile import MAX_OTHER_LOAD_FRACTION, METHOD, measure_hardware, some_of, with_link
from kvoffload.units import counted

logger = logging.getLogger(__name__)

MAX_NOISY_FRACTION = 0.25  # of all measured points


def profile_path(key: str) -> Path:
    """The file of the machine with that key."""
    return cache_folder() / f"{_slug(key.split(' | ')[0])}--{_slug(key)}.json"


def require_folder() -> None:
    """Make the folder of profiles, and a file in it, before a minute is spent on measuring what goes there.

    Raises:
        ConfigError: one of them cannot be made.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"cannot keep a profile in {folder}: {error.strerror}; choose a file with --output, or another place with "
            "XDG_CACHE_HOME"
        ) from error


def store(profile: HardwareProfile) -> Path:
    """Keep `profile` for its machine; a reader never sees half a file.

    Raises:
        OSError: the folder cannot be written.
    """
    path = profile_path(profile.key)
    write_whole(path, json.dumps(profile.to_json(), indent=1) + "\n")
    return path


def reason_not_to_keep(profile: HardwareProfile) -> str | None:
    """Why a measurement is too doubtful to plan with from now on, with the numbers; None where it is not.

    Other work kept the CPUs busy that were measured (which may slow everything evenly, so no spread shows it), or more
    than `MAX_NOISY_FRACTION` of the points have trials that disagree. A few noisy points are no reason: each is a
    median all the same, and most shapes are planned for by others.
    """
    load = profile.extra.get("other_cpu_load_fraction")
    if profile.emulated_link and load is not None and load > MAX_OTHER_LOAD_FRACTION:
        return f"other work kept {load:.2f} of the CPUs busy (at most {MAX_OTHER_LOAD_FRACTION} may be)"
    noisy = profile.extra.get("noisy", [])
    curves = [profile.h2d, profile.d2h, profile.gemm, profile.attention, *profile.curves.values()]
    num_points = sum(len(curve.points) for curve in curves if curve is not None and curve.provenance == "measured")
    num_points += sum(one.spread_fraction is not None for one in profile.quantities.values())
    if len(noisy) > MAX_NOISY_FRACTION * num_points:
        return f"the trials of {len(noisy)} of {num_points} points disagree ({some_of(noisy)})"
    return None


def load(device: torch.device | str = "auto", link: Link = "auto") -> HardwareProfile:
    """The stored profile of this machine, without measuring it; a stale one is told as by `load_or_measure`.

    Raises:
        ProfileError: none is stored, or the file is damaged or of another schema version; says what to do.
    """
    found = _stored(resolve_device(device, link))
    if found is None:
        raise ProfileError(
            f"no profile of this machine is stored in {cache_folder()}: `kvoffload profile` measures and keeps one, or "
            "name a preset"
        )
    return with_link(found, link) if isinstance(link, EmulatedLink) else found


def find_stored(device: torch.device | str = "auto") -> HardwareProfile | None:
    """What `load` finds of a machine's own link; None where it raises, with a log message if a file is damaged.

    For whom a profile is welcome, and not needed.
    """
    try:
        return _stored(resolve_device(device, "auto"))
    except ProfileError as error:
        logger.warning("done without a profile: %s", error)
        return None


def load_or_measure(
    device: torch.device | str = "auto",
    link: Link = "auto",
    *,
    progress: Progress | None = None,
    has_fewer_threads: bool = False,
) -> HardwareProfile:
    """The stored profile of this machine; else measure it once and store it, with a log message.

    A profile of the same device with another driver or PyTorch version, or one that an earlier release measured in
    another way, is stale: told, left where it is until a newer one takes its place, not used. A measurement that
    `reason_not_to_keep` is used but not stored. An emulated link is not part of what is stored, it is put in front of
    the stored machine.

    Args:
        device: as for `measure_hardware`.
        link: as for `measure_hardware`.
        progress: as for `measure_hardware`.
        has_fewer_threads: than `kvoffload profile` would measure, which therefore is no advice.

    Raises:
        ProfileError: the stored file is damaged or of another schema version; names it.
        ConfigError: as `measure_hardware`.
    """
    device = resolve_device(device, link)
    path = profile_path(machine_key(device))
    profile = _stored(device)
    if profile is None:
        if has_fewer_threads:
            threads = counted(torch.get_num_threads(), "thread")
            logger.warning("measuring this machine with %s for this run, about 10 s", threads)
        else:
            logger.warning("measuring this machine once, up to 20 s")
        began = time.perf_counter()
        profile = measure_hardware(device, EmulatedLink() if device.type == "cpu" else "auto", progress=progress)
        try:
            if doubt := reason_not_to_keep(profile):
                advice = (
                    ": it will be repeated, or run `kvoffload profile` while nothing else runs (--force keeps what it "
                    "measures in any case)"
                )
                logger.warning("not stored, since %s%s", doubt, "" if has_fewer_threads else advice)
            else:
                path = store(profile)
                logger.info("measured in %.1f s, stored in %s", time.perf_counter() - began, path)
        except OSError as error:
            logger.warning("could not store the profile in %s (%s): it will be measured again", path, error)
    return with_link(profile, link) if isinstance(link, EmulatedLink) else profile


def resolve_profile(
    choice: HardwareProfile | str | Path, device: torch.device | str = "auto", link: Link = "auto"
) -> HardwareProfile:
    """The profile that `OffloadConfig.profile` stands for.

    Args:
        choice: a profile (taken as it is), "auto" (`load_or_measure`), or a path or preset (`find_profile`).
        device: the device of the model.
        link: the link of the session.

    Raises:
        ProfileError: as `load_or_measure` and `find_profile`.
    """
    if isinstance(choice, HardwareProfile):
        return choice
    if choice == "auto":
        return load_or_measure(device, link)
    profile = find_profile(choice)
    key = machine_key(resolve_device(device, link))
    if profile.key != key:
        logger.warning(
            "profile %s is of another machine (%s; this is %s): the plan may be off", choice, profile.key, key
        )
    return profile


def _stored(device: torch.device) -> HardwareProfile | None:
    """The profile stored for a device, None where there is none or only a stale one."""
    key = machine_key(device)
    path = profile_path(key)
    if not path.exists():
        for other in sorted(path.parent.glob(f"{path.name.split('--')[0]}--*.json")):
            _tell_stale(other, _key_in(other), key)
        return None
    profile = HardwareProfile.load(path)
    if profile.key != key:
        _tell_stale(path, profile.key, key)
    elif profile.method != METHOD:
        logger.warning("stored profile %s is stale: an earlier release measured it in another way", path)
    else:
        return profile
    return None


def _tell_stale(path: Path, stored_key: str, key: str) -> None:
    logger.warning("stored profile %s is stale: measured with %s, this machine is %s", path, stored_key, key)


def _key_in(path: Path) -> str:
    """The key of a file that is only mentioned, so a damaged one is no error."""
    try:
        return HardwareProfile.load(path).key
    except ProfileError:
        return "unknown versions"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-")
