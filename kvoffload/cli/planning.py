"""`kvoffload plan`, `kvoffload roofline` and `kvoffload report`: what to expect of a model on a machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvoffload.cli.machine import devices_named, machine_named, preset_or_file
from kvoffload.cli.options import (
    COST,
    MACHINE,
    PRECISION,
    WORKLOAD,
    Acceptance,
    AsJson,
    Batch,
    DeviceGib,
    DeviceWeightsGib,
    DraftCache,
    Hardware,
    HostGib,
    KvDtype,
    LinkSpeed,
    ManyHardware,
    ModelConfig,
    NumNewTokens,
    PromptTokens,
    Split,
    WeightBits,
    a_file_to_write,
    a_link,
    bits,
    emulated_link,
    one_of,
    share,
    whole_number,
    within,
)
from kvoffload.cli.terminal import print_json, print_text, progress, waiting
from kvoffload.config import OffloadConfig
from kvoffload.errors import ConfigError, InfeasiblePlanError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.facts import Facts
from kvoffload.model.stored_facts import facts_of, is_known
from kvoffload.planning.workload import Workload


def plan(
    model: ModelConfig,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 1024,
    new_tokens: NumNewTokens = 128,
    num_beams: Annotated[
        int, typer.Option(callback=whole_number(), rich_help_panel=WORKLOAD, help="Beams of each sequence.")
    ] = 1,
    hardware: ManyHardware = "auto",
    link_gb_per_s: LinkSpeed = None,
    device_gib: DeviceGib = "auto",
    host_gib: HostGib = "auto",
    w_bits: WeightBits = None,
    split: Split = "auto",
    kv_dtype: KvDtype = "model",
    link: Annotated[
        str | None,
        typer.Option(
            callback=a_link,
            rich_help_panel=MACHINE,
            help="What if: pcie3 to pcie6, pcie5x8, nvlink-c2c, cxl, or 3GB/s+100us.",
        ),
    ] = None,
    device_memory: Annotated[
        float | None,
        typer.Option(
            callback=within(0.1, 1e5, "a number of GB"),
            rich_help_panel=MACHINE,
            help="What if the device had so many GB.",
        ),
    ] = None,
    host_memory: Annotated[
        float | None,
        typer.Option(
            callback=within(0.1, 1e6, "a number of GB"),
            rich_help_panel=MACHINE,
            help="GB of host memory there are; of a named device 256 are assumed.",
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            callback=within(0, 1e6, "a price"),
            rich_help_panel=COST,
            help="Of the device; default: that of its file.",
        ),
    ] = None,
    grid_g_per_kwh: Annotated[
        float | None,
        typer.Option(
            callback=within(0, 5000, "grams"),
            rich_help_panel=COST,
            help="Grams of CO2 per kWh of your electricity.",
        ),
    ] = None,
    acceptance: Acceptance = None,
    draft_cache: DraftCache = "auto",
    device_weights_gib: DeviceWeightsGib = "auto",
    sweep: Annotated[
        str | None, typer.Option(rich_help_panel=WORKLOAD, help="Batches and prompts, such as 1,8,64:1024,8192.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether offloading pays for a workload, how fast it will be, what it costs and what limits it."""
    from kvoffload.advise.advice import advise, task_of
    from kvoffload.advise.answer import otherwise
    from kvoffload.advise.cards import card
    from kvoffload.advise.economics import Economics
    from kvoffload.advise.overview import overview
    from kvoffload.advise.snippets import loaded_by
    from kvoffload.advise.sweep import grid
    from kvoffload.advise.sweep import sweep as swept
    from kvoffload.machine.machine import what_if
    from kvoffload.profiler.drawing import terminal_tables as tables

    config = OffloadConfig(
        split=split,
        device_gib=device_gib,
        host_gib=host_gib,
        kv_dtype=kv_dtype,
        draft_cache=draft_cache,
        device_weights_gib=device_weights_gib,
    )
    workload = Workload(batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens, num_beams=num_beams)
    emulated = emulated_link(link_gb_per_s)
    cells = grid(sweep)
    facts_shown(model)  # what is wrong with it is told before this machine is measured
    memory_bytes = None if device_memory is None else device_memory * 1e9
    host_bytes = None if host_memory is None else host_memory * 1e9
    chosen: dict[str, Any] = {"acceptance": acceptance, "w_bits": w_bits}

    def machine_of(name: str) -> HardwareProfile:
        found = machine_named(name, emulated, needs_speed=link is None)
        return what_if(found, link=link, device_memory_bytes=memory_bytes, host_memory_bytes=host_bytes)

    names = devices_named(hardware)
    if len(names) > 1 and sweep is not None:
        raise ConfigError("--sweep is of one device: leave it out, or name one with --hardware")
    if len(names) > 1:
        with progress("planning for") as tell:
            cards = []
            for idx, name in enumerate(names):
                if tell is not None:
                    tell(name, idx / len(names))
                one = machine_of(name)
                task = task_of(model, workload, one, config, **chosen)
                cards.append(card(one, task, partial(advise, model, workload, one, config, **chosen)))
        if as_json:
            print_json({"cards": [one.to_json() for one in cards]})
        else:
            tables.print_cards(cards)
        return
    machine = machine_of(names[0])
    money = Economics.of(machine, price_per_hour, grid_g_per_kwh)
    task = task_of(model, workload, machine, config, **chosen)
    if sweep is not None and not as_json:
        tables.print_sweep(swept(task, cells.batches, cells.prompts))
        return
    with waiting("planning"):
        try:
            advice = advise(model, workload, machine, config, **chosen)
            said, document = advice.answer, advice.to_json()
        except InfeasiblePlanError as error:
            facts = facts_of(model)
            alone = otherwise(task, facts, str(error), loaded_by(model))
            if alone is None:
                raise
            said = alone
            document = {"recommendation": said.text, "answer": said.to_json(), "problem": str(error)}
            document |= {"is_exact": facts.is_exact, "doubt": facts.doubt}
        seen = overview(task, money, cells)
    if as_json:
        print_json(document | seen.to_json())
    else:
        tables.print_answer(said, machine)
        tables.print_forecast(seen)


def roofline(
    config: ModelConfig,
    hardware: Hardware,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 1024,
    new_tokens: NumNewTokens = 128,
    w_bits: Annotated[float | None, bits("Bits per weight, the head's too; default: the model's own.")] = None,
    a_bits: Annotated[float | None, bits("Bits per activation.")] = None,
    kv_bits: Annotated[float | None, bits("Bits per value of K and V.")] = None,
    attention: Annotated[
        str,
        typer.Option(
            metavar="fused|unfused",
            callback=one_of("fused", "unfused"),
            rich_help_panel=PRECISION,
            help="'unfused': as LLM-Viewer counts it.",
        ),
    ] = "fused",
    kv_on_host: Annotated[float, share("Share 0..1 of the K/V that lives on the host.")] = 0.0,
    weights_on_host: Annotated[float, share("Share 0..1 of the weights that is streamed.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Show what every operation computes and moves, what bounds it and what would move that bound."""
    from kvoffload.advise.roofline import evaluate, setting_of
    from kvoffload.machine.machine import find_machine, machine_of

    dims = facts_shown(config)
    setting = setting_of(
        dims,
        batch=batch,
        seq=prompt_tokens,
        new_tokens=new_tokens,
        bits=(w_bits, a_bits, kv_bits),
        convention=attention,
        kv_on_host=kv_on_host,
        weights_on_host=weights_on_host,
    )
    if hardware == "auto":
        from kvoffload.profiler.stored import load

        found = evaluate(dims, machine_of(load()), setting)
    else:
        found = evaluate(dims, find_machine(preset_or_file(hardware)), setting)
    if as_json:
        print_json(found.to_json())
        return
    from kvoffload.profiler.drawing.terminal_tables import print_roofline

    print_roofline(found)


def report(
    config: ModelConfig,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 1024,
    new_tokens: NumNewTokens = 128,
    hardware: Hardware = "auto",
    link_gb_per_s: LinkSpeed = None,
    device_gib: DeviceGib = "auto",
    kv_dtype: KvDtype = "model",
    acceptance: Acceptance = None,
    draft_cache: DraftCache = "auto",
    device_weights_gib: DeviceWeightsGib = "auto",
    measure: Annotated[
        bool, typer.Option("--measure", help="Also run decode steps on this machine, random weights.")
    ] = False,
    rows: Annotated[Path | None, typer.Option(help="A results file: measured steps beside predicted ones.")] = None,
    trace: Annotated[
        Path | None, typer.Option(callback=a_file_to_write, help="Also write the timelines, for ui.perfetto.dev.")
    ] = None,
    output: Annotated[Path, typer.Option(callback=a_file_to_write, help="The file to write.")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Write one HTML file with charts: roofline, step timeline, split, batch and context, memory, measurements."""
    from kvoffload import __version__
    from kvoffload.cli import report_page as reports
    from kvoffload.machine.machine import what_if
    from kvoffload.profiler.drawing import chart, study

    chart.require_plotly()
    options = OffloadConfig(
        device_gib=device_gib, kv_dtype=kv_dtype, draft_cache=draft_cache, device_weights_gib=device_weights_gib
    )
    workload = Workload(batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    dimensions, compared = facts_shown(config), study.compared_rows(rows) if rows else ()
    emulated = emulated_link(link_gb_per_s)
    machine = what_if(machine_named(hardware, emulated))  # with as much host memory as `plan` assumes
    run = None
    if measure:
        from kvoffload.cli import measured_run

        with progress("measuring") as tell:
            run = measured_run.measure_run(dimensions, workload, tell)
    with progress("working out") as tell:
        found = study.study(
            config, workload, machine, options, acceptance=acceptance, compared=compared, measured=run, progress=tell
        )
    written = reports.write_page(found, _model_name(config), output, trace, __version__)
    if as_json:
        print_json(written)
    else:
        print_text(found.recommendation)
    for path in (output, trace):
        if path is not None:
            typer.echo(f"wrote {path}", err=True)
    if run is not None and run.doubt:
        print_text(run.doubt, err=True)


def facts_shown(config: str) -> Facts:
    """The facts of a model; on a terminal with a line about what takes seconds the first time."""
    if is_known(config):
        return facts_of(config)
    with waiting("asking transformers what this model is made of, once"):
        return facts_of(config)


def _model_name(config: str) -> str:
    """What a configuration file or its folder is called."""
    path = Path(config).resolve()
    return path.parent.name if path.name == "config.json" else path.stem if path.suffix == ".json" else path.name
