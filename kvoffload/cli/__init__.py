"""The `kvoffload` command and its subcommands, each with `--json`.

Owns the list of commands, and with `terminal` messages and exit codes (2 and one line on stderr for every error of
ours). Does not own what the commands compute, nor the range of options that several share (`options`). PyTorch is
imported inside the commands, and after whatever can be checked without it, so that `--help` and a typo are answered at
once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvoffload.cli.chatting import converse
from kvoffload.cli.hardware import hardware
from kvoffload.cli.machine import env, profile
from kvoffload.cli.planning import plan, report, roofline
from kvoffload.cli.quality import quality
from kvoffload.cli.running import custom_generate, demo, generate
from kvoffload.cli.terminal import LogLines, errors_in_one_line


class _Commands(TyperGroup):
    """Turns our errors into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        with errors_in_one_line("kvoffload"):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="Decode with the KV cache in host memory: what this machine can do, and whether it pays.",
    no_args_is_help=True,
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


# What each is called, and what its help ends with.
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "demo": (demo, "kvoffload demo"),
    "generate": (generate, "kvoffload generate 'Why is the sky blue?' --temperature 0.7"),
    "chat": (converse, "kvoffload chat --model DIR --system 'Answer briefly.'"),
    "plan": (plan, "kvoffload plan --config llama-3.1-8b --hardware 4090 --seq 128k"),
    "roofline": (roofline, "kvoffload roofline --config DIR --hardware h100-80gb-sxm5 --batch 8"),
    "report": (report, "kvoffload report --config DIR --hardware a100-40gb-pcie4 --batch 64"),
    "hardware": (hardware, "kvoffload hardware l4-24gb-pcie4"),
    "env": (env, "kvoffload env"),
    "profile": (profile, "kvoffload profile --quick"),
    "quality": (quality, "kvoffload quality --model DIR --kv-dtype int4"),
    "custom-generate": (custom_generate, "kvoffload custom-generate DIR --split auto"),
}
PANELS = {
    "Answers": ("demo", "generate", "chat"),
    "Predictions": ("plan", "roofline", "report"),
    "Machines": ("hardware", "env", "profile"),
    "More": ("quality", "custom-generate"),
}
for panel, names in PANELS.items():
    for name in names:
        command, example = COMMANDS[name]
        app.command(name, epilog=f"Example: {example}", rich_help_panel=panel)(command)


def main() -> None:
    """The entry point of the `kvoffload` command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogLines()])
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the progress bars of what we load
    app()
