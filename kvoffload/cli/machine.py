"""`kvoffload env` and `kvoffload profile`, and the machine that other commands plan for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvoffload.cli.options import AsJson, LatencyUs, LinkSpeed, a_file_to_write, emulated_link
from kvoffload.cli.terminal import print_json, print_rows, progress
from kvoffload.config import EmulatedLink
from kvoffload.errors import ConfigError, ProfileError
from kvoffload.machine.hardware_profile import HardwareProfile


def env(as_json: AsJson = False) -> None:
    """Show the facts that decide how fast offloading can be: PCIe, NUMA, memory and pinning limits."""
    from kvoffload.profiler.environment import environment
    from kvoffload.profiler.fact_rows import fact_rows

    facts = environment()
    if as_json:
        print_json(facts)
    else:
        print_rows("This machine", fact_rows(facts))


def profile(
    device: Annotated[str, typer.Option(help="'auto', 'cuda', 'cuda:1' or 'cpu'.")] = "auto",
    link_gb_per_s: LinkSpeed = None,
    latency_us: LatencyUs = 0.0,
    quick: Annotated[bool, typer.Option("--quick", help="In under 15 s: no pageable memory, large copies, energy.")] = (
        False
    ),
    force: Annotated[bool, typer.Option("--force", help="Keep the result even if it is too doubtful.")] = False,
    output: Annotated[
        Path | None, typer.Option(callback=a_file_to_write, help="Write the profile here, not to the cache.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine (in under 60 s) and keep the result for planning."""
    link = emulated_link(link_gb_per_s, latency_us)

    from kvoffload.profiler import stored
    from kvoffload.profiler.profile import measure_hardware

    if output is None:
        stored.require_folder()
    with progress("measuring") as tell:
        measured = measure_hardware(device, link or "auto", thoroughness="quick" if quick else "full", progress=tell)
    doubt = stored.reason_not_to_keep(measured)
    is_kept = output is not None or force or not doubt
    try:
        if output is not None:
            measured.save(output)
        elif is_kept:
            output = stored.store(measured)
    except OSError as error:
        raise ConfigError(f"cannot write the profile: {error}; choose another file with --output") from error
    if as_json:
        print_json(measured.to_json())
    else:
        from kvoffload.profiler.fact_rows import profile_rows

        print_rows(f"Profile of {measured.device_name}", profile_rows(measured))
    if not is_kept:
        raise ProfileError(
            f"not stored, since {doubt}: measure again while nothing else runs, or keep such a profile with --force "
            "or --output FILE"
        )
    if doubt:
        typer.echo(f"this profile is doubtful: {doubt}", err=True)
    typer.echo(f"stored in {output}", err=True)


def devices_named(hardware: str) -> list[str]:
    """The names in a list such as "l4,4090", or of all presets for "all"; a file's name is one whatever it holds."""
    if hardware == "all":
        from kvoffload.machine.datasheet import preset_names

        return preset_names()
    if Path(hardware).exists():
        return [hardware]
    names = [name.strip() for name in hardware.split(",") if name.strip()]
    if not names:
        raise ConfigError("--hardware names no device: give one such as 4090, or several as l4,4090")
    return names


def preset_or_file(hardware: str) -> str:
    """A file as it is, else the name of the preset that is meant; errors as of `datasheet.preset_named`."""
    from kvoffload.machine.datasheet import preset_named

    path = Path(hardware)
    return hardware if path.exists() or path.suffix == ".json" or len(path.parts) > 1 else preset_named(hardware)


def machine_named(hardware: str, link: EmulatedLink | None, *, needs_speed: bool = True) -> HardwareProfile:
    """What `--hardware` and `--link-gb-per-s` stand for; this machine ("auto") is measured where it has not been.

    Args:
        hardware: "auto", a preset or a file.
        link: an emulated one in front of it.
        needs_speed: of the link; False where another link is put in its place.

    Raises:
        ProfileError: no such preset or file, or a damaged one; an emulated link before a machine with one of its own.
        ConfigError: a link that has no speed, before anything is measured.
    """
    if hardware == "auto":
        from kvoffload.profiler import stored
        from kvoffload.profiler.device import resolve_device

        if needs_speed and link is None and resolve_device("auto", "auto").type == "cpu":
            raise ConfigError(
                "this machine has no GPU, and an emulated link has no speed to plan with: give it one with "
                "--link-gb-per-s, or name the machine to plan for with --hardware, a preset or a profile"
            )
        with progress("measuring") as tell:
            return stored.load_or_measure(link=link or "auto", progress=tell)
    from kvoffload.machine.machine import find_profile

    machine = find_profile(preset_or_file(hardware))
    if link is None:
        return machine
    from kvoffload.profiler.profile import with_link

    return with_link(machine, link)
