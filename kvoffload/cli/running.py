"""`kvoffload generate` and `kvoffload demo`, and `kvoffload custom-generate` for tools that generate themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvoffload.cli.loading import load_for, without_bars_of_others
from kvoffload.cli.options import (
    AsJson,
    Device,
    DeviceGib,
    DeviceWeightsGib,
    DraftCache,
    Hardware,
    HostGib,
    KvDtype,
    LinkSpeed,
    MaxNewTokens,
    Model,
    Split,
    System,
    config_of,
    emulated_link,
)
from kvoffload.cli.prompts import read_prompts
from kvoffload.cli.rules import a_file_to_write, whole_number
from kvoffload.cli.sampling import Seed, Temperature, TopK, TopP, sampling_of
from kvoffload.cli.terminal import print_json, print_text
from kvoffload.cli.waits import steps, waiting
from kvoffload.config import OffloadConfig
from kvoffload.errors import ConfigError

PROMPTS = "Prompts and answers"


def generate(
    text: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to ask or continue; '-' or piped: standard input.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(rich_help_panel=PROMPTS, help="The same, as an option.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel=PROMPTS, help="A file whose text is the prompt.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=PROMPTS, help='Many: one a line, or JSON lines with a "prompt"; "-": piped.'
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            callback=whole_number(), rich_help_panel=PROMPTS, help="Of --prompts, so many are answered together."
        ),
    ] = 8,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=a_file_to_write,
            rich_help_panel=PROMPTS,
            help="Write answers as JSON lines: prompt, text, tokens; '-': to standard output.",
        ),
    ] = None,
    model: Model = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    split: Split = "auto",
    kv_dtype: KvDtype = "model",
    draft_cache: DraftCache = "auto",
    device: Device = None,
    device_weights_gib: DeviceWeightsGib = "auto",
    device_gib: DeviceGib = "auto",
    host_gib: HostGib = "auto",
    link_gb_per_s: LinkSpeed = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also without offloading, if it fits: both speeds, whether tokens equal.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt, or a file of them, with the KV cache in host memory."""
    sampling = sampling_of(temperature, top_p, top_k, seed)
    config = config_of(split, kv_dtype, draft_cache, device, device_weights_gib, device_gib, host_gib, link_gb_per_s)
    if as_json and str(output) == "-":
        raise ConfigError("--json and --output - both write to standard output: leave out one")
    records = read_prompts(text, prompt, prompt_file, prompts)
    loaded = load_for(model, config)

    from kvoffload.cli.generating import Request, run

    request = Request(
        records, is_many=prompts is not None, batch=batch, system=system, max_new_tokens=max_new_tokens,
        sampling=sampling.with_seed(), compare=compare, output=output,
    )  # fmt: skip
    run(loaded, request, as_json=as_json)


def custom_generate(
    folder: Annotated[Path, typer.Argument(help="Where custom_generate/ goes: a model's folder, or any other.")],
    split: Split = "auto",
    device: Device = None,
    device_weights_gib: DeviceWeightsGib = "auto",
    device_gib: DeviceGib = "auto",
    host_gib: HostGib = "auto",
    kv_dtype: KvDtype = "model",
    draft_cache: DraftCache = "auto",
    hardware: Hardware = "auto",
    link_gb_per_s: LinkSpeed = None,
    force: Annotated[bool, typer.Option("--force", help="Also over one with other options, or edited.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a custom_generate/ folder: transformers, and tools that call it, then generate through kvoffload."""
    from kvoffload.machine.machine import find_profile

    if hardware != "auto":
        find_profile(hardware)  # now, not in the first call
        hardware = str(Path(hardware).absolute()) if Path(hardware).exists() else hardware
    config = OffloadConfig(
        split=split,
        device=device,
        device_weights_gib=device_weights_gib,
        device_gib=device_gib,
        host_gib=host_gib,
        kv_dtype=kv_dtype,
        draft_cache=draft_cache,
        profile=hardware,
        link=emulated_link(link_gb_per_s) or "auto",
    )

    from kvoffload.custom_generate import write

    path = write(folder, config, force=force)
    if as_json:
        print_json({"path": str(path), "options": config.to_json()})
        return
    typer.echo(f"wrote {path}")
    print_text(
        f"model.generate(..., custom_generate={str(folder)!r}, trust_remote_code=True) runs it, and so does\n"
        f"generate() of a model from from_pretrained({str(folder)!r}, trust_remote_code=True)"
    )


def demo(
    model: Model = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "",
    max_new_tokens: Annotated[int, typer.Option(callback=whole_number(2), help="Length of the answer.")] = 24,
    as_json: AsJson = False,
) -> None:
    """Let a small real model answer, then show in a table what the plan gains. It takes 3 minutes at most."""
    from kvoffload.cli.model_source import find_model

    source = find_model(model)
    without_bars_of_others(source)
    with waiting("starting PyTorch and transformers"):
        from kvoffload import bench
        from kvoffload.cli import demonstration
        from kvoffload.cli.generating import same_tokens

    question = prompt or demonstration.PROMPT
    with steps() as tell:
        found = demonstration.demonstrate(source, question, max_new_tokens, tell=tell)
    if as_json:
        print_json(found.to_json())
        return
    from rich.console import Console

    typer.echo()
    print_text(question, style="bold")
    print_text(found.answer.text, style="green")
    print_text(same_tokens(bool(found.answer.tokens_equal)))
    print_text(str(found.answer.stats), style="dim")
    typer.echo()
    Console().print(bench.table(found.result))
