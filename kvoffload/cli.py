"""The `kvoffload` command and its subcommands, each with `--json`.

Owns the commands, messages and exit codes (2 and one line on stderr for every error of ours). Does not own what the
commands compute, nor the range of options that several share (`options`). PyTorch is imported inside the commands, and
after whatever can be checked without it, so that `--help` and a typo are answered at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvoffload.config import EmulatedLink, OffloadConfig
from kvoffload.errors import ConfigError, KVOffloadError, ProfileError
from kvoffload.options import (
    AsJson,
    Batch,
    DeviceGib,
    Hardware,
    HostGib,
    LatencyUs,
    LinkSpeed,
    ModelConfig,
    NewTokens,
    PromptTokens,
    Split,
    a_link,
    bits,
    one_of,
    share,
    whole,
    within,
)
from kvoffload.types import Workload


class _Commands(TyperGroup):
    """Turns our errors into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KVOffloadError as error:
            typer.echo(f"kvoffload: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    help="Decode with the KV cache in host memory: what this machine can do, and whether it pays.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from kvoffload import __version__

        typer.echo(f"kvoffload {__version__}")
        raise typer.Exit


@app.callback()
def _before_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What comes before the name of a command."""


@app.command("env")
def env(as_json: AsJson = False) -> None:
    """Show the facts that decide how fast offloading can be: PCIe, NUMA, memory and pinning limits."""
    from kvoffload.profiler.environment import environment
    from kvoffload.profiler.rows import fact_rows

    facts = environment()
    if as_json:
        _print_json(facts)
    else:
        _print_rows("This machine", fact_rows(facts))


@app.command("profile")
def profile(
    device: Annotated[str, typer.Option(help="'auto', 'cuda', 'cuda:1' or 'cpu'.")] = "auto",
    link_gb_per_s: LinkSpeed = None,
    latency_us: LatencyUs = 0.0,
    quick: Annotated[bool, typer.Option("--quick", help="In under 15 s: no pageable memory, large copies, energy.")] = (
        False
    ),
    force: Annotated[bool, typer.Option("--force", help="Keep the result even if it is too doubtful.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the profile here, not to the cache.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine (in under 60 s) and keep the result for planning."""
    link = _link(link_gb_per_s, latency_us)

    from kvoffload.profiler import stored
    from kvoffload.profiler.profile import measure_hardware

    with _progress("measuring") as tell:
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
        _print_json(measured.to_json())
    else:
        from kvoffload.profiler.rows import profile_rows

        _print_rows(f"Profile of {measured.device_name}", profile_rows(measured))
    if not is_kept:
        raise ProfileError(
            f"not stored, since {doubt}: measure again while nothing else runs, or keep such a profile with --force "
            "or --output FILE"
        )
    if doubt:
        typer.echo(f"this profile is doubtful: {doubt}", err=True)
    typer.echo(f"stored in {output}", err=True)


@app.command("plan")
def plan(
    model: ModelConfig,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 1024,
    new_tokens: NewTokens = 128,
    num_beams: Annotated[int, typer.Option(callback=whole(), help="Beams of each sequence.")] = 1,
    hardware: Hardware = "auto",
    link_gb_per_s: LinkSpeed = None,
    device_gib: DeviceGib = "auto",
    host_gib: HostGib = "auto",
    split: Split = "auto",
    link: Annotated[
        str | None,
        typer.Option(callback=a_link, help="What if: pcie3 to pcie6, pcie5x8, nvlink-c2c, cxl, or 3GB/s+100us."),
    ] = None,
    device_memory: Annotated[
        float | None,
        typer.Option(callback=within(0.1, 1e5, "a number of GB"), help="What if the device had so many GB."),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(callback=within(0, 1e6, "a price"), help="Of the device; default: that of its file."),
    ] = None,
    grid_g_per_kwh: Annotated[
        float | None,
        typer.Option(callback=within(0, 5000, "grams"), help="Grams of CO2 per kWh of your electricity."),
    ] = None,
    sweep: Annotated[str | None, typer.Option(help="Batches and prompts, such as 1,8,64:1024,8192.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether offloading pays for a workload, how fast it will be, what it costs and what limits it."""
    from kvoffload.advice import advise, describe, task_of
    from kvoffload.forecast import Economics, foresee, grid
    from kvoffload.profiler.hardware import find_profile, what_if

    config = OffloadConfig(split=split, device_gib=device_gib, host_gib=host_gib)
    workload = Workload(batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens, num_beams=num_beams)
    emulated = _link(link_gb_per_s)
    cells = grid(sweep)
    describe(model)  # what is wrong with it is told before this machine is measured
    if hardware == "auto":
        from kvoffload.profiler import stored

        with _progress("measuring") as tell:
            machine = stored.load_or_measure(link=emulated or "auto", progress=tell)
    else:
        machine = find_profile(hardware)
        if emulated:
            from kvoffload.profiler.profile import with_link

            machine = with_link(machine, emulated)
    machine = what_if(machine, link=link, device_memory_bytes=None if device_memory is None else device_memory * 1e9)
    money = Economics.of(machine, price_per_hour, grid_g_per_kwh)
    advice = advise(model, workload, machine, config)
    seen = foresee(task_of(model, workload, machine, config), money, cells)
    if as_json:
        _print_json(advice.to_json() | seen.to_json())
        return
    from kvoffload.profiler.report import print_forecast

    typer.echo(advice.plan.recommendation)
    typer.echo(f"On {machine.device_name}, {machine.link_name}:")
    print_forecast(seen)


@app.command("roofline")
def roofline(
    config: ModelConfig,
    hardware: Hardware,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 1024,
    new_tokens: NewTokens = 128,
    w_bits: Annotated[float | None, bits("Bits per weight; default: the model's own.")] = None,
    a_bits: Annotated[float | None, bits("Bits per activation.")] = None,
    kv_bits: Annotated[float | None, bits("Bits per value of K and V.")] = None,
    attention: Annotated[
        str, typer.Option(callback=one_of("fused", "unfused"), help="'fused', or 'unfused': as LLM-Viewer counts it.")
    ] = "fused",
    kv_on_host: Annotated[float, share("Share 0..1 of the K/V that lives on the host.")] = 0.0,
    weights_on_host: Annotated[float, share("Share 0..1 of the weights that is streamed.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Show what every operation computes and moves, what bounds it and what would move that bound."""
    from kvoffload.model_shape import dimensions_from_config
    from kvoffload.profiler.hardware import find_machine, machine_of
    from kvoffload.profiler.roofline import evaluate, setting_of

    dims = dimensions_from_config(config)
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
        found = evaluate(dims, find_machine(hardware), setting)
    if as_json:
        _print_json(found.to_json())
        return
    from kvoffload.profiler.report import print_roofline

    print_roofline(found)


@app.command("report")
def report(
    config: ModelConfig,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 1024,
    new_tokens: NewTokens = 128,
    hardware: Hardware = "auto",
    link_gb_per_s: LinkSpeed = None,
    device_gib: DeviceGib = "auto",
    measure: Annotated[
        bool, typer.Option("--measure", help="Also run decode steps on this machine, random weights.")
    ] = False,
    rows: Annotated[Path | None, typer.Option(help="A results file: measured steps beside predicted ones.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Also write the timelines, for ui.perfetto.dev.")] = None,
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Write one HTML file with charts: roofline, step timeline, split, batch and context, memory, measurements."""
    from kvoffload import __version__
    from kvoffload import report as reports
    from kvoffload.model_shape import dimensions_from_config
    from kvoffload.profiler import chart, study
    from kvoffload.profiler.hardware import find_profile

    chart.require_plotly()
    options = OffloadConfig(device_gib=device_gib)
    workload = Workload(batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    dimensions, compared = dimensions_from_config(config), study.compared_rows(rows) if rows else ()
    emulated = _link(link_gb_per_s)
    if hardware == "auto":
        from kvoffload.profiler import stored

        with _progress("measuring") as tell:
            machine = stored.load_or_measure(link=emulated or "auto", progress=tell)
    else:
        machine = find_profile(hardware)
        if emulated:
            from kvoffload.profiler.profile import with_link

            machine = with_link(machine, emulated)
    run = None
    if measure:
        from kvoffload import measured_run

        with _progress("measuring") as tell:
            run = measured_run.measure(dimensions, workload, tell)
    with _progress("working out") as tell:
        found = study.study(config, workload, machine, options, compared=compared, measured=run, progress=tell)
    written = reports.write(found, _model_name(config), output, trace, __version__)
    if as_json:
        _print_json(written)
    else:
        typer.echo(found.recommendation)
    for path in (output, trace):
        if path is not None:
            typer.echo(f"wrote {path}", err=True)
    if run is not None and run.doubt:
        typer.echo(run.doubt, err=True)


def _model_name(config: str) -> str:
    """What a configuration file or its folder is called."""
    path = Path(config).resolve()
    return path.parent.name if path.name == "config.json" else path.stem if path.suffix == ".json" else path.name


@app.command("generate")
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask or continue.")],
    model: Annotated[str | None, typer.Option(help="Folder, hub id or GGUF file; default: the demo's model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(callback=whole(), help="Length of the answer.")] = 64,
    split: Split = "auto",
    device_gib: DeviceGib = "auto",
    link_gb_per_s: LinkSpeed = None,
    compare: Annotated[bool, typer.Option(help="Also generate without offloading and compare the tokens.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt with the KV cache in host memory."""
    from kvoffload.model_source import find_model

    config = OffloadConfig(split=split, device_gib=device_gib, link=_link(link_gb_per_s) or "auto")
    source = find_model(model)

    import torch

    from kvoffload import chat

    loaded, tokenizer = chat.load(source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    streamer = None if as_json else chat.streamer(tokenizer)
    answer = chat.answer(
        loaded, tokenizer, prompt, config=config, max_new_tokens=max_new_tokens, compare=compare, streamer=streamer
    )
    if as_json:
        _print_json({"text": answer.text, "tokens_equal": answer.tokens_equal, "stats": answer.stats.to_json()})
        return
    if answer.tokens_equal is not None:
        typer.echo(_same_tokens(answer.tokens_equal), err=True)
    typer.echo(str(answer.stats), err=True)


@app.command("custom-generate")
def custom_generate(
    folder: Annotated[Path, typer.Argument(help="Where custom_generate/ goes: a model's folder, or any other.")],
    split: Split = "auto",
    device_gib: DeviceGib = "auto",
    host_gib: HostGib = "auto",
    hardware: Annotated[str, typer.Option(help="A preset, a profile file, or 'auto' for the machine.")] = "auto",
    link_gb_per_s: LinkSpeed = None,
    as_json: AsJson = False,
) -> None:
    """Write a custom_generate/ folder: transformers, and tools that call it, then generate through kvoffload."""
    from kvoffload.profiler.hardware import find_profile

    if hardware != "auto":
        find_profile(hardware)  # now, not in the first call
        hardware = str(Path(hardware).absolute()) if Path(hardware).exists() else hardware
    config = OffloadConfig(
        split=split,
        device_gib=device_gib,
        host_gib=host_gib,
        profile=hardware,
        link=_link(link_gb_per_s) or "auto",
    )

    from kvoffload.custom_generate import write

    path = write(folder, config)
    if as_json:
        _print_json({"path": str(path), "options": config.to_json()})
        return
    typer.echo(f"wrote {path}")
    typer.echo(f"model.generate(..., custom_generate={str(folder)!r}, trust_remote_code=True) runs it, and so does")
    typer.echo(f"generate() of a model from from_pretrained({str(folder)!r}, trust_remote_code=True)")


@app.command("demo")
def demo(
    model: Annotated[str | None, typer.Option(help="Folder, hub id or GGUF file; default: the packaged one.")] = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "",
    max_new_tokens: Annotated[int, typer.Option(callback=whole(2), help="Length of the answer.")] = 24,
    as_json: AsJson = False,
) -> None:
    """Show it at work: a real model answers, then a table of what the plan gains (at most 3 minutes)."""
    from kvoffload.model_source import find_model

    source = find_model(model)

    from kvoffload import bench
    from kvoffload import demo as demonstration

    found = demonstration.run(
        source, prompt or demonstration.PROMPT, max_new_tokens, tell=lambda text: typer.echo(text, err=True)
    )
    if as_json:
        _print_json(found.to_json())
        return
    from rich.console import Console

    console = Console()
    console.print()
    console.print(f"[bold]{prompt or demonstration.PROMPT}[/bold]")
    console.print(found.answer.text, style="green", markup=False)
    console.print(_same_tokens(bool(found.answer.tokens_equal)))
    console.print(str(found.answer.stats), style="dim", markup=False, highlight=False, soft_wrap=True)
    console.print()
    console.print(bench.table(found.result))


def _same_tokens(equal: bool) -> str:
    return f"{'the same' if equal else 'NOT the same'} tokens as without offloading"


def main() -> None:
    """The entry point of the `kvoffload` command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the progress bars of what we load
    app()


def _link(gb_per_s: float | None, latency_us: float = 0.0) -> EmulatedLink | None:
    """The emulated link the options ask for."""
    if gb_per_s is None:
        if latency_us:
            raise ConfigError(
                f"--latency-us {latency_us:g} needs --link-gb-per-s: an unpaced link has no time to add it to"
            )
        return None
    return EmulatedLink(h2d_gb_per_s=gb_per_s, latency_s=latency_us * 1e-6)


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[str, float], None] | None]:
    """A progress bar on stderr, only on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda what, share: bar.update(task, completed=share, description=f"{title} {what}")


def _print_json(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=1))


def _print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console().print(table)


if __name__ == "__main__":
    main()
