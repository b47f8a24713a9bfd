"""Decode at a shape, in several modes, through the public API, beside the bound of the cost model.

Owns the rows that `scripts/bench_decode.py` and `kvoffload demo` show.

The bound of a row is the step time of the cost model for that mode's best plan, at rates measured in this process
before and after the row; a row whose rates moved by more than 10 % is measured again. Nothing here is faster than
the product: every mode is an `OffloadConfig`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from kvoffload.api import offload
from kvoffload.bench.lab import Lab, core_for_the_link, device_and_threads
from kvoffload.bench.presets import PRESETS
from kvoffload.config import OffloadConfig
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.planning.rates import Rates
from kvoffload.session.session import Session
from kvoffload.session.stats import GenerationStats
from kvoffload.timeline import Timeline

MAX_RATE_DRIFT_FRACTION = 0.1
MAX_TRIES = 4
NUM_UNEVEN_STEPS = 2  # the first waits for the end of the write-back, the second empties the ring


def steps(lab: Lab, config: OffloadConfig, new_tokens: int) -> GenerationStats:
    """Decode and return the statistics of the product."""
    with offload(lab.model, config) as session:
        return _generate(lab, session, new_tokens)


def recorded_steps(lab: Lab, config: OffloadConfig, new_tokens: int) -> tuple[GenerationStats, Timeline]:
    """The same, with what ran when."""
    with offload(lab.model, config) as session:
        session.record_timeline()
        return _generate(lab, session, new_tokens), session.timeline()


def _generate(lab: Lab, session: Session, new_tokens: int) -> GenerationStats:
    model: Any = lab.model
    model.generate(lab.ids, attention_mask=torch.ones_like(lab.ids), max_new_tokens=new_tokens, do_sample=False)
    assert session.stats is not None
    return session.stats


def measure(
    lab: Lab,
    mode: str,
    profile: HardwareProfile | str,
    new_tokens: int,
    split: float | None = None,
    before: Rates | None = None,
    max_tries: int | None = None,
) -> tuple[dict[str, Any], Rates]:
    """One row, measured again while the machine's rates move; and the rates after it.

    Args:
        lab: the model and the link.
        mode: one of `MODES` and `WHOLE_LAYER_MODES`.
        profile: as in `OffloadConfig`.
        new_tokens: as in `run`.
        split: instead of the mode's own.
        before: rates as this mode meets them, measured just now; None measures them.
        max_tries: None for `MAX_TRIES`.
    """
    max_tries = max_tries or MAX_TRIES
    for tries in range(1, max_tries + 1):
        before = before or lab.rates(mode)
        stats = steps(lab, lab.config(mode, profile, split), new_tokens)
        after = lab.rates(mode)
        bounds = [lab.bound_s(mode, rates, split) for rates in (before, after)]
        drift = abs(bounds[0] - bounds[1]) / min(bounds)
        if drift <= MAX_RATE_DRIFT_FRACTION or tries == max_tries:
            break
        before = after
    row = {
        "mode": mode,
        "decode_step_s": stats.decode_step_s[NUM_UNEVEN_STEPS:],
        "bounds_s": bounds,
        "rate_drift_fraction": drift,
        "tries": tries,
        "h2d_bytes_per_step": stats.plan.link_bytes_per_step,
        "h2d_gb_per_s": stats.h2d_gb_per_s,
        "link_utilization": stats.link_utilization,
        "split_fraction": stats.plan.split_fraction,
        "device_kv_peak_decode_bytes": stats.device_kv_peak_decode_bytes,
        "plan": stats.plan.to_json(),
    }
    return row, after


def _pooled(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of all rounds: the median step, the median bound; the rest as in the round nearest to that step."""
    step_s = [seconds for row in measured for seconds in row["decode_step_s"]]
    p50 = statistics.median(step_s)
    bound = statistics.median(min(row["bounds_s"]) for row in measured)
    typical = min(measured, key=lambda row: abs(statistics.median(row["decode_step_s"]) - p50))
    row = {name: value for name, value in typical.items() if name != "bounds_s"}
    return row | {
        "decode_step_s": step_s,
        "decode_step_s_p50": p50,
        "bound_step_s": bound,
        "fraction_of_bound": bound / p50,
        "rounds": len(measured),
    }


def run(
    preset_name: str,
    modes: list[str],
    new_tokens: int,
    profile: HardwareProfile | str = "auto",
    sweep: bool = False,
    rounds: int = 1,
    max_tries: int | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """All rows of a preset.

    Args:
        preset_name: one of `PRESETS`.
        modes: some of `MODES`.
        new_tokens: decoded per measurement; two steps of each are not counted.
        profile: as in `OffloadConfig`.
        sweep: also every split in whole blocks.
        rounds: passes over all rows, forwards and backwards in turn, whose steps are pooled: a busy minute of the
            machine then meets all rows alike.
        max_tries: of each row while the machine's rates move; None for `MAX_TRIES`.
        on_row: called with each row when it is complete, as the result has it. Its speedup is None before full transfer
            was measured.
    """
    with core_for_the_link():
        lab = Lab(PRESETS[preset_name])
        blocks = lab.preset.cached_tokens // lab.block_tokens
        settings: list[tuple[str, str, float | None]] = [(mode, mode, None) for mode in modes]
        if sweep:
            settings += [(f"sweep_{x}_of_{blocks}", "planned", x / blocks) for x in range(blocks + 1)]
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in settings}
        found: dict[str, dict[str, Any]] = {}
        for turn in range(rounds):
            met_before, rates = "", None  # the rates after a row are those before the next if it meets the same
            for name, mode, split in settings if turn % 2 == 0 else reversed(settings):
                met = lab.meets(mode)
                row, rates = measure(
                    lab, mode, profile, new_tokens, split, rates if met == met_before else None, max_tries
                )
                met_before = met
                measured[name].append(row | {"mode": name})
                if turn == rounds - 1:
                    found[name] = _pooled(measured[name]) | {"device": device_and_threads(), "link": lab.link_name}
                    _compare(found)
                    if on_row is not None:
                        on_row(found[name])
        rows = [found[name] for name, _, _ in settings]
        return {"preset": preset_name, "device": device_and_threads(), "link": lab.link_name, "rows": rows}


def _compare(found: dict[str, dict[str, Any]]) -> None:
    """Each row beside full transfer's, as far as there are any."""
    full_s = found["full_transfer"]["decode_step_s_p50"] if "full_transfer" in found else None
    for row in found.values():
        row["speedup_vs_full_transfer"] = None if full_s is None else full_s / row["decode_step_s_p50"]


def table(result: dict[str, Any]) -> Table:
    """The rows of a result as people read them."""
    result_table = Table(title=f"{result['preset']} on {result['device']}, link {result['link']}")
    for name in ("mode", "split", "step ms", "bound ms", "of bound", "vs full transfer", "link busy"):
        is_mode = name == "mode"
        result_table.add_column(name, justify="left" if is_mode else "right", no_wrap=is_mode)
    for row in result["rows"]:
        speedup = row["speedup_vs_full_transfer"]
        result_table.add_row(
            row["mode"],
            f"{row['split_fraction']:.2f}",
            f"{row['decode_step_s_p50'] * 1e3:.1f}",
            f"{row['bound_step_s'] * 1e3:.1f}",
            f"{row['fraction_of_bound']:.3f}",
            "" if speedup is None else f"{speedup:.2f}x",
            f"{row['link_utilization']:.3f}",
        )
    return result_table
