"""Predictions as tables for a terminal.

Owns columns and units. Does not own the numbers (`roofline`, `kvoffload/advise/comparison.py`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from rich.console import Console

from kvoffload.advise import capacity, comparison
from kvoffload.advise.answer import Answer
from kvoffload.advise.capacity import Limits
from kvoffload.advise.cards import Card
from kvoffload.advise.overview import Overview
from kvoffload.advise.precisions import in_words
from kvoffload.advise.roofline import OperationTime, Phase, Roofline, remedy_text
from kvoffload.advise.snippets import CODE
from kvoffload.advise.sweep import BestAtSize
from kvoffload.advise.ways import LABELS
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.profiler.drawing.figures import Figures
from kvoffload.units import count, counted, gb, rate

WIDTH = 160  # where the output is no terminal, and COLUMNS says nothing
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def _console() -> Console:
    """Of the terminal's width, or what COLUMNS says, else a wide one."""
    return Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit() else WIDTH)


def print_roofline(found: Roofline) -> None:
    """What it all comes to, then every phase with its operations."""
    console = _console()
    console.print("\n".join(summary(found)), highlight=False, markup=False)
    for phase in found.phases:
        console.print(*_phase_figures(found, phase).tables(console.width))


def print_answer(said: Answer, machine: HardwareProfile) -> None:
    """What to do, the code for it, how fast that is; prose at the width of the terminal, code as it is."""
    console = _console()
    for line in said.text.splitlines():
        console.print(line, highlight=False, markup=False, soft_wrap=line.startswith(CODE))
    console.print(f"\nOn {machine.device_name}, {machine.link_name}: {_source(machine)}", highlight=False, markup=False)
    console.print(said.details, highlight=False, markup=False)


def _source(machine: HardwareProfile) -> str:
    """Where the figures of a machine come from."""
    if "datasheet" not in machine.extra:
        return "predicted from rates that were measured on it."
    told = machine.extra["datasheet"]["provenance"].get("link_achievable_bytes_per_s", "assumed")
    link = {"measured": "measured by others", "datasheet": "the datasheet's"}.get(told, "assumed")
    return f"peaks of the datasheet, the speed of the link {link}; nothing of this was measured."


def print_forecast(seen: Overview) -> None:
    """Every way to do a workload, then what still fits and what other precisions would give."""
    console = _console()
    console.print(*_forecast_figures(seen.rows).tables(console.width))
    for row in seen.rows:
        if row.problem and row.name != "sub_batches":  # which says no more than the row of the whole batch
            console.print(f"{LABELS[row.name]}: {row.problem}", highlight=False, markup=False)
    for line in [*limit_lines(seen.limits), *what_if_lines(seen)]:
        console.print(line, highlight=False, markup=False)


def print_sweep(cells: Sequence[BestAtSize]) -> None:
    """The best way at every size."""
    console = _console()
    console.print(*_sweep_figures(cells).tables(console.width))


def print_cards(cards: Sequence[Card]) -> None:
    """One line for each device, then why nothing works where nothing does."""
    console = _console()
    has_quantised = any(one.quantised is not None for one in cards)
    rows = []
    for one in cards:
        best = one.best
        cells = ["", "", ""]
        if best is not None:
            cells = [rate(best.tokens_per_s), seconds(best.runs * best.prefill_s), seconds(best.step_s)]
        quantised = "" if one.quantised is None else rate(one.quantised.tokens_per_s)
        rows.append([_short(one.name), one.way, *cells, *[quantised] * has_quantised])
    names = ["device", "best way", "tokens/s", "prompts", "step", *["4-bit tokens/s"] * has_quantised]
    console.print(*Figures("Predicted, not measured; 4-bit: with such weights", names, rows).tables(console.width))
    for one in cards:
        if one.problem and one.best is None:
            console.print(f"{one.name}: {one.problem}", highlight=False, markup=False)


def _short(device_name: str) -> str:
    """Without its maker."""
    return re.sub(r"^(NVIDIA (GeForce )?|AMD (Instinct )?)", "", device_name)


def limit_lines(limits: Limits) -> list[str]:
    """What still fits, in words."""

    def batch(value: int) -> str:
        return "none" if not value else count(value) + " or more" * (value >= capacity.MAX_SEARCHED)

    def prompt(value: int) -> str:
        if limits.most_positions is not None and 0 < value >= limits.most_positions:
            return f"{count(value)} (all of the model's positions)"
        return batch(value)

    known = "" if limits.host_is_known else " (assumed)"
    lines = [
        f"Largest batch with these prompts: {batch(limits.largest_batch_on_device)} on the device, "
        f"{batch(limits.largest_batch_offloaded)} offloaded.",
        f"Longest prompt with this batch, in tokens: {prompt(limits.longest_prompt_on_device)} on the device, "
        f"{prompt(limits.longest_prompt_offloaded)} offloaded.",
        f"Offloaded: in {gb(limits.host_bytes)} of host memory{known}.",
    ]
    if limits.on_device_by_bits:
        fitting = [f"{prompt(one.longest_prompt)} in {one.weight_bits} bits" for one in limits.on_device_by_bits]
        lines.append(f"Longest prompt on the device with quantised weights: {', '.join(fitting)}.")
    return lines


def what_if_lines(seen: Overview) -> list[str]:
    """What K and V in fewer bytes would give, and weights in fewer bits."""
    lines = []
    if line := in_words(seen.precisions):
        lines.append(line)
    rates = []
    for bits, one in seen.quantised:
        how = "on the device" if one.way in ("on_device", "sub_batches") else "offloaded"
        parts = f" in {one.runs} parts of {one.batch}" if one.runs > 1 else ""
        rates.append(f"{rate(one.tokens_per_s)} tokens/s in {bits} bits ({how}{parts})")
    if rates:
        lines.append(
            f"With quantised weights: {', '.join(rates)}; half a bit more for scales, and what it costs to dequantise "
            "is not known and not counted."
        )
    return lines


def _forecast_figures(rows: Sequence[comparison.WayFigures]) -> Figures:
    has_price = any(row.price_per_million_new_tokens is not None for row in rows)
    has_co2 = any(row.co2_g is not None for row in rows)
    names = [
        "way",
        "batch",
        "TTFT",
        "TPOT",
        "all",
        "tokens/s",
        "link",
        "device",
        "device mem",
        "host mem",
        "MFU",
        "MBU",
    ]
    names += ["price/M prompt", "price/M new"] * has_price + ["CO2", "CO2/M new"] * has_co2
    title = "Predicted for the whole run: TPOT is the mean of its steps; link and device, their share of one (0..1)"
    lines = []
    for row in rows:
        if row.problem:
            continue  # told below the table
        cells = [
            LABELS[row.name],
            f"{row.runs} x {row.batch}" if row.runs > 1 else str(row.batch),
            *(seconds(value) for value in (row.ttft_s, row.tpot_s, row.total_s)),
            f"{row.tokens_per_s:.4g}",
            *(f"{value:.2f}" for value in (row.link_utilization, row.device_utilization)),
            *(si(value, "B") for value in (row.device_bytes, row.host_bytes)),
            *(f"{value:.3f}" for value in (row.mfu, row.mbu)),
        ]
        if has_price:
            cells += [_maybe(row.price_per_million_prompt_tokens), _maybe(row.price_per_million_new_tokens)]
        if has_co2:
            cells += [f"{_maybe(row.co2_g)} g", f"{_maybe(row.co2_g_per_million_new_tokens)} g"]
        lines.append(cells)
    return Figures(title, names, lines)


def _maybe(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _sweep_figures(cells: Sequence[BestAtSize]) -> Figures:
    """Batches down, prompts across: the best way and its tokens/s."""
    prompts = sorted({cell.prompt_tokens for cell in cells})
    found = {(cell.batch, cell.prompt_tokens): _sweep_cell(cell) for cell in cells}
    lines = [[str(batch), *(found[batch, prompt] for prompt in prompts)] for batch in sorted({one[0] for one in found})]
    names = ["batch", *(counted(prompt, "token") for prompt in prompts)]
    return Figures("Best way, new tokens/s (offloaded)", names, lines)


def _sweep_cell(cell: BestAtSize) -> str:
    if cell.name is None:
        return "nothing works"
    return f"{LABELS[cell.name]} {cell.tokens_per_s:.4g} ({cell.offload_tokens_per_s:.4g})"


def summary(found: Roofline) -> list[str]:
    """The totals in words."""
    setting, machine = found.setting, found.machine
    mode = "predicted by the fit of its profile" if machine.fits else "lower bounds from its datasheet"
    lines = [f"{found.dims.model_type}, {si(found.dims.num_weights)} parameters, on {machine.device_name}: {mode}"]
    if not found.dims.is_exact:
        lines.append(f"a guess: {found.dims.doubt}")
    quantized = found.dims.quantized
    if quantized is not None and setting.precision.weight_bits is None:
        if not quantized.is_known:
            lines.append(f"quantisation {quantized.method!r} is not known: weights are counted as not quantised")
        else:
            lines.append(f"weights quantised by {quantized.method}: {found.dims.linear_bits:.3g} bits in linear layers")
    for phase in found.phases:
        interval = "" if phase.low_s == phase.high_s else f" ({seconds(phase.low_s)} to {seconds(phase.high_s)})"
        lines.append(f"{phase.name}: {seconds(phase.seconds)}{interval}, bound by {phase.bound}")
    room = f"weights {si(found.weight_bytes)}B, K/V {si(found.kv_bytes)}B of {si(machine.memory_bytes)}B device memory"
    if found.fits:
        lines.append(f"{room}: fits")
    else:
        missing = found.device_bytes - machine.memory_bytes
        lines.append(f"{room}: does not fit by {si(missing)}B, try {_way_out(found, missing)}")
    return lines


def _way_out(found: Roofline, missing: float) -> str:
    """The options with which it fits: K/V on the host, else narrower weights, else weights on the host as well."""
    setting, memory = found.setting, found.machine.memory_bytes
    share = setting.kv_on_host + missing / max(1, found.kv_bytes)
    if share <= 0.995:
        return f"--kv-on-host {share + 0.005:.2f}"
    bits = found.dims.linear_bits if setting.precision.weight_bits is None else setting.precision.weight_bits
    cache = found.kv_bytes * (1 - setting.kv_on_host)
    ways = [f"--w-bits {width}" for width in (8, 4) if found.weight_bytes * width / bits + cache <= memory][:1]
    streamed = (found.weight_bytes - memory) / found.weight_bytes
    cached = " --kv-on-host 1" if found.kv_bytes else ""
    ways.append(f"--weights-on-host {max(0.0, streamed) + 0.005:.2f}{cached}")
    return " or ".join(ways)


def si(value: float, unit: str = "") -> str:
    """A number with a prefix: 13.5 G."""
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {_PREFIXES[power]}{unit}"


def seconds(value: float) -> str:
    """Seconds with three digits, or whole ones."""
    if value >= 999.5:
        return f"{count(round(value))} s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def _phase_figures(found: Roofline, phase: Phase) -> Figures:
    setting = found.setting
    what = {
        "prefill": f"{setting.batch} x {counted(setting.seq, 'token')}",
        "decode": f"one token of {counted(setting.batch, 'sequence')} at a context of {count(setting.seq)}",
        "task": f"{setting.batch} x {counted(setting.seq, 'token')} and {counted(setting.new_tokens, 'new one')} each",
    }[phase.name]
    has_link = phase.total("link_bytes") > 0
    names = ["operation", "FLOP", "device memory"] + ["link", "host memory"] * has_link
    names += ["FLOP/byte", "bound", "time", "share", "remedy"]
    lines = [
        _cells(row, has_link, max(row.seconds, row.link_s) / phase.seconds, remedy_text(row)) for row in phase.rows
    ]
    total = [phase.total(name) for name in ("flops", "memory_bytes", "link_bytes", "host_bytes")]
    cells = ["all", si(total[0]), si(total[1], "B")] + [si(value, "B") for value in total[2:]] * has_link
    cells += [f"{total[0] / total[1]:.3g}", phase.bound, seconds(phase.seconds), "", ""]
    return Figures(f"{phase.name}: {what}", names, [*lines, cells], has_sum=True)


def _cells(row: OperationTime, has_link: bool, share: float, remedy: str) -> Sequence[str]:
    crossing = [si(row.link_bytes, "B"), si(row.host_bytes, "B")] * has_link
    time = seconds(max(row.seconds, row.link_s))
    return (
        *(row.name, si(row.flops), si(row.memory_bytes, "B"), *crossing, f"{row.intensity:.3g}", row.bound),
        *(time, f"{share:.3f}", remedy),
    )
