"""`kvoffload generate` and `kvoffload demo`, and `kvoffload custom-generate` for tools that generate themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvoffload.cli.options import (
    AsJson,
    Device,
    DeviceGib,
    DeviceWeightsGib,
    DraftCache,
    HostGib,
    KvDtype,
    LinkSpeed,
    Split,
    emulated_link,
    whole_number,
)
from kvoffload.cli.terminal import print_json
from kvoffload.config import OffloadConfig


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask or continue.")],
    model: Annotated[str | None, typer.Option(help="Folder, hub id or GGUF file; default: the demo's model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(callback=whole_number(), help="Length of the answer.")] = 64,
    split: Split = "auto",
    device: Device = None,
    device_weights_gib: DeviceWeightsGib = "auto",
    device_gib: DeviceGib = "auto",
    kv_dtype: KvDtype = "model",
    draft_cache: DraftCache = "auto",
    link_gb_per_s: LinkSpeed = None,
    compare: Annotated[bool, typer.Option(help="Also generate without offloading and compare the tokens.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt with the KV cache in host memory."""
    from kvoffload.cli.model_source import find_model

    config = OffloadConfig(
        split=split,
        device=device,
        device_weights_gib=device_weights_gib,
        device_gib=device_gib,
        kv_dtype=kv_dtype,
        draft_cache=draft_cache,
        link=emulated_link(link_gb_per_s) or "auto",
    )
    source = find_model(model)

    from kvoffload.cli import chat

    runs_on, config = chat.device_for(config)
    is_whole = config.device is None
    typer.echo(f"loading {source.gguf_file or source.name} {_where(str(runs_on), is_whole=is_whole)}", err=True)
    loaded, tokenizer = chat.load_model(source, runs_on, into_host=not is_whole)
    streamer = None if as_json else chat.streamer(tokenizer)
    answer = chat.answer(
        loaded, tokenizer, prompt, config=config, max_new_tokens=max_new_tokens, compare=compare, streamer=streamer
    )
    if as_json:
        print_json({"text": answer.text, "tokens_equal": answer.tokens_equal, "stats": answer.stats.to_json()})
        return
    if answer.tokens_equal is not None:
        typer.echo(_same_tokens(answer.tokens_equal), err=True)
    typer.echo(str(answer.stats), err=True)


def custom_generate(
    folder: Annotated[Path, typer.Argument(help="Where custom_generate/ goes: a model's folder, or any other.")],
    split: Split = "auto",
    device: Device = None,
    device_weights_gib: DeviceWeightsGib = "auto",
    device_gib: DeviceGib = "auto",
    host_gib: HostGib = "auto",
    kv_dtype: KvDtype = "model",
    draft_cache: DraftCache = "auto",
    hardware: Annotated[str, typer.Option(help="A preset, a profile file, or 'auto' for the machine.")] = "auto",
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
    typer.echo(f"model.generate(..., custom_generate={str(folder)!r}, trust_remote_code=True) runs it, and so does")
    typer.echo(f"generate() of a model from from_pretrained({str(folder)!r}, trust_remote_code=True)")


def demo(
    model: Annotated[str | None, typer.Option(help="Folder, hub id or GGUF file; default: the packaged one.")] = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "",
    max_new_tokens: Annotated[int, typer.Option(callback=whole_number(2), help="Length of the answer.")] = 24,
    as_json: AsJson = False,
) -> None:
    """Show it at work: a real model answers, then a table of what the plan gains (at most 3 minutes)."""
    from kvoffload.cli.model_source import find_model

    source = find_model(model)

    from kvoffload import bench
    from kvoffload.cli import demonstration

    found = demonstration.demonstrate(
        source, prompt or demonstration.PROMPT, max_new_tokens, tell=lambda text: typer.echo(text, err=True)
    )
    if as_json:
        print_json(found.to_json())
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


def _where(device: str, *, is_whole: bool) -> str:
    return f"on {device}" if is_whole or device == "cpu" else f"into host memory for {device}"


def _same_tokens(equal: bool) -> str:
    return f"{'the same' if equal else 'NOT the same'} tokens as without offloading"
