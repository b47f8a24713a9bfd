"""Rows as people read them, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from campaign.campaign import SPEED, summary
from campaign.rows import Row

_COLUMNS = (
    ("TTFT s", "ttft", "{:.2f}", 1.0),
    ("ms/token", "tpot", "{:.1f}", 1e3),
    ("tokens/s", "decode_tokens_per_s", "{:.1f}", 1.0),
    ("of bound", "fraction_of_bound", "{:.3f}", 1.0),
    ("link busy", "link_utilization", "{:.2f}", 1.0),
    ("device MB", "device_cache_bytes", "{:.1f}", 1e-6),
    ("host MB", "host_bytes", "{:.1f}", 1e-6),
)


def campaign_tables(found: Sequence[Row]) -> list[Table]:
    """Of each device one table for each cell, fastest first, and one of the reasons for what was not measured."""
    devices = dict.fromkeys(row["device"] for row in found)
    return [table for device in devices for table in _tables_of_device(device, found)]


def _tables_of_device(device: str, rows: Sequence[Row]) -> list[Table]:
    found = [row for row in rows if row["device"] == device]
    tables = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell, providers in summary(found).items():
        full = providers.get("full_transfer", {}).get(SPEED)
        link = next(row["link"] for row in found if row["x"] == cell)
        table = Table(title=f"{cell}: {device}, link {link}", title_justify="left")
        table.add_column("provider", no_wrap=True)
        for name, *_ in _COLUMNS:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("speed", justify="right", no_wrap=True)
        measured = {name: figures for name, figures in providers.items() if SPEED in figures}
        for name, figures in sorted(measured.items(), key=lambda item: -item[1][SPEED]):
            shown = [
                text.format(figures[metric] * factor) if metric in figures else ""
                for _, metric, text, factor in _COLUMNS
            ]
            table.add_row(name, *shown, f"{figures[SPEED] / full:.2f}x" if full else "")
        for name, figures in providers.items():
            if "note" in figures:
                reasons.setdefault((name, figures["note"]), []).append(cell)
        tables.append(table)
    if reasons:
        tables.append(_reasons(reasons, len(tables), device))
    return tables


def _reasons(reasons: dict[tuple[str, str], list[str]], num_cells: int, device: str) -> Table:
    table = Table(title=f"not measured on {device} (speed above: against full_transfer)", title_justify="left")
    for name in ("provider", "cell", "why"):
        table.add_column(name)
    for (provider, why), cells in reasons.items():
        table.add_row(provider, "all" if len(cells) == num_cells else ", ".join(cells), why)
    return table
