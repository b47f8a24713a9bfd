"""`kvoffload hardware`: the machines that can be planned for by name, with where each of their figures comes from.

Owns the list and what is shown of one. Does not own the figures (`kvoffload/machine/datasheet.py`) nor the rows of a
measured profile (`kvoffload/profiler/fact_rows.py`). PyTorch is imported only where a profile is stored.
"""

from __future__ import annotations

import math
from typing import Annotated

import typer

from kvoffload.cli.machine import preset_or_file
from kvoffload.cli.options import AsJson, completed
from kvoffload.cli.terminal import print_json, print_rows, print_text
from kvoffload.cli.waits import waiting
from kvoffload.machine import datasheet
from kvoffload.machine.cache_folder import cache_folder
from kvoffload.machine.datasheet import Datasheet
from kvoffload.machine.hardware_profile import HardwareProfile

ASSUMED = " *"
SAID = {
    "datasheet": "datasheet",
    "measured": "measured by others",
    "assumed": "assumed",
}
NOTES = "\n".join(
    [
        "GB/s: of the device's memory; TFLOP/s: dense, in half precision: figures of datasheets, which no program "
        "quite reaches. Link GB/s: what pinned copies reach in one direction, as others measured it, or assumed (*).",
        "kvoffload hardware NAME shows all figures of one and their sources. A file with figures of your own is one "
        'more: {"schema_version": 1, "like": "l4-24gb-pcie4", "price_per_hour": 0.8}',
    ]
)


def hardware(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            autocompletion=lambda incomplete: completed("auto", *datasheet.preset_names())(incomplete),
            help="A preset, 'auto' for this machine as it was measured, or a file; default: a list of all.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the hardware that --hardware knows by name, or show one with the source of each figure."""
    if name is None:
        _list(as_json=as_json)
        return
    found = _profile(name)
    if "datasheet" not in found.extra:
        if as_json:
            print_json(found.to_json())
            return
        from kvoffload.profiler.fact_rows import profile_rows

        print_rows(f"{name}: {found.device_name}, measured", profile_rows(found))
        return
    sheet = datasheet.read(found.extra["datasheet"], source=name)
    if as_json:
        print_json(sheet.to_json())
    else:
        print_rows(f"{name}: {sheet.device_name}", rows_of(sheet))


def rows_of(sheet: Datasheet) -> list[tuple[str, str]]:
    """Every figure of a device, and where it comes from."""

    def said(text: str, field: str, key: str = "") -> str:
        return f"{text} ({SAID[sheet.provenance_of(field, key)]})"

    def tera(dtype: str) -> str:
        return f"{sheet.peak_flops_per_s[dtype] / 1e12:,.4g} T{'OP' if dtype.startswith('int') else 'FLOP'}/s"

    peaks = [(dtype, said(tera(dtype), "peak_flops_per_s", dtype)) for dtype in sheet.peak_flops_per_s]
    gb_per_s = {
        field: said(f"{getattr(sheet, field) / 1e9:,.5g} GB/s", field)
        for field in ("memory_bytes_per_s", "link_nominal_bytes_per_s", "link_achievable_bytes_per_s")
    }
    price = "not known: give --price-per-hour, or a file with price_per_hour"
    if sheet.price_per_hour is not None:
        price = said(f"{sheet.price_per_hour:g} an hour", "price_per_hour")
    return [
        ("memory", said(f"{sheet.memory_bytes / 1e9:,.5g} GB", "memory_bytes")),
        ("memory bandwidth", gb_per_s["memory_bytes_per_s"]),
        *((f"{dtype}, dense", text) for dtype, text in peaks),
        ("planned in", sheet.dtype),
        ("link", sheet.link_name),
        ("link, nominal", f"{gb_per_s['link_nominal_bytes_per_s']}, each way"),
        ("link, reached", f"{gb_per_s['link_achievable_bytes_per_s']}, each way, by pinned copies"),
        ("power", said(f"{sheet.power_w:g} W", "power_w")),
        ("price", price),
        ("source", sheet.source or "not said"),
    ]


def _profile(name: str) -> HardwareProfile:
    if name == "auto":
        with waiting("starting PyTorch"):
            from kvoffload.profiler.stored import load
        return load()
    from kvoffload.machine.machine import find_profile

    return find_profile(preset_or_file(name))


def _stored() -> HardwareProfile | None:
    """This machine's own profile, if there is one; without PyTorch where there cannot be."""
    if not any(cache_folder().glob("*.json")):
        return None
    with waiting("starting PyTorch"):
        from kvoffload.profiler.stored import find_stored
    return find_stored()


def _list(*, as_json: bool) -> None:
    sheets = {name: datasheet.preset(name) for name in datasheet.preset_names()}
    if as_json:
        own = _stored()
        print_json(
            {
                "presets": {name: sheet.to_json() for name, sheet in sheets.items()},
                "auto": None if own is None else own.to_json(),
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("hardware", "memory", "GB/s", "TFLOP/s", "link", "link GB/s"):
        is_text = column in ("hardware", "link")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for name, sheet in sheets.items():
        table.add_row(name, *_cells(sheet))
    Console().print(table)
    print_text(NOTES, is_below_table=True)
    print_text(_own_line(_stored()), is_below_table=True)


def _cells(sheet: Datasheet) -> list[str]:
    """One row, with a mark at each figure that is assumed."""

    def marked(text: str, field: str, key: str = "") -> str:
        return text + (ASSUMED if sheet.provenance_of(field, key) == "assumed" else "  ")

    return [
        marked(f"{sheet.memory_bytes / 1e9:.4g} GB", "memory_bytes").rstrip(),
        marked(f"{sheet.memory_bytes_per_s / 1e9:.5g}", "memory_bytes_per_s").rstrip(),
        marked(f"{sheet.peak_flops_per_s[sheet.dtype] / 1e12:.4g}", "peak_flops_per_s", sheet.dtype).rstrip(),
        sheet.link_name,
        marked(f"{sheet.link_achievable_bytes_per_s / 1e9:.4g}", "link_achievable_bytes_per_s"),
    ]


def _own_line(own: HardwareProfile | None) -> str:
    if own is None:
        return "auto, this machine: not measured yet, kvoffload profile does that"
    from kvoffload.machine.machine import machine_of

    machine = machine_of(own)
    has_speed = not math.isinf(machine.link_bytes_per_s)
    link = f", {machine.link_bytes_per_s / 1e9:.3g} GB/s" if has_speed else ""
    peak = f"{max(machine.peak_flops_per_s.values()) / 1e12:.3g} TFLOP/s in {own.dtype}"
    return (
        f"auto, this machine as it was measured: {own.device_name}, {machine.memory_bytes / 1e9:.4g} GB at "
        f"{machine.memory_bytes_per_s / 1e9:.4g} GB/s, {peak}, link {machine.link_name}{link}"
    )
