"""`kvoffload chat`: a conversation with a model whose cache stays on the host between the turns.

Owns the prompt, the words that begin with a slash, and what is shown of a turn. Does not own the turns (`conversation`)
nor how an answer is printed and stopped (`stream`).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kvoffload.cli.loading import load_for
from kvoffload.cli.options import (
    AsJsonLines,
    Device,
    DeviceGib,
    DeviceWeightsGib,
    DraftCache,
    HostGib,
    KvDtype,
    LinkSpeed,
    MaxNewTokens,
    Model,
    Split,
    System,
    config_of,
)
from kvoffload.cli.sampling import Seed, Temperature, TopK, TopP, sampling_of
from kvoffload.cli.terminal import print_text
from kvoffload.errors import KVOffloadError

if TYPE_CHECKING:
    from kvoffload.cli.conversation import Conversation

PROMPT = "> "
COMMANDS = {
    "/stats": "what the last answer took and moved",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "end; so does Ctrl-D",
}


def converse(
    model: Model = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
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
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="A line about each answer: tokens, speed.")] = True,
    as_json: AsJsonLines = False,
) -> None:
    """Talk with a model in the terminal, with the conversation's cache in host memory.

    Each turn goes on in the same cache: only what is new is read.
    Ctrl-C stops an answer, Ctrl-D ends. Lines that are piped in are one turn each.
    """
    sampling = sampling_of(temperature, top_p, top_k, seed)
    config = config_of(split, kv_dtype, draft_cache, device, device_weights_gib, device_gib, host_gib, link_gb_per_s)
    loaded = load_for(model, config)

    from kvoffload.api import offload
    from kvoffload.cli.conversation import Conversation

    with offload(loaded.model, loaded.config) as session:
        talk = Conversation(session, loaded.tokenizer, max_new_tokens=max_new_tokens, sampling=sampling, system=system)
        if not talk.has_template:
            print_text("this model has no chat template: what you write is continued as plain text", err=True)
        if sys.stdin.isatty():
            print_text(f"{', '.join(COMMANDS)}; Ctrl-C stops an answer, Ctrl-D ends", err=True, style="dim")
        while (text := _read()) is not None:
            if text.startswith("/"):
                if text in ("/quit", "/exit"):
                    break
                _obey(text, talk)
            elif text:
                _turn(text.strip(), talk, shows_stats=stats, as_json=as_json)


def _read() -> str | None:
    """The next line; "" after Ctrl-C, None at the end."""
    if not sys.stdin.isatty():
        return _line()
    import readline  # noqa: F401  lines can be edited, and earlier ones taken back

    try:
        if sys.stdout.isatty():
            return input(PROMPT).rstrip()
        typer.echo(PROMPT, nl=False, err=True)
        return _line()
    except KeyboardInterrupt:
        typer.echo("\n(Ctrl-D or /quit ends)", err=True)
        return ""
    except EOFError:
        typer.echo(err=True)
        return None


def _line() -> str | None:
    line = sys.stdin.readline()
    return line.rstrip() if line else None


def _obey(text: str, talk: Conversation) -> None:
    """A word that begins with a slash."""
    if text == "/reset":
        talk.reset()
        print_text("forgotten: the conversation begins anew", err=True, style="dim")
    elif text == "/stats":
        found = talk.session.stats
        print_text("no answer yet" if found is None else str(found), err=True)
    elif text == "/help":
        print_text("\n".join(f"{name:8}{what}" for name, what in COMMANDS.items()), err=True)
    else:
        print_text(
            f"unknown command {text.split()[0]}; known: {', '.join(COMMANDS)}; a space before it makes it text",
            err=True,
        )


def _turn(text: str, talk: Conversation, *, shows_stats: bool, as_json: bool) -> None:
    """One answer; an error in it, or a second Ctrl-C, leaves the conversation as it was before."""
    from kvoffload.cli.stream import Stream, stopped_by_interrupt, tell_for_now

    stream = Stream(talk.tokenizer, is_silent=as_json)

    def on_stop() -> None:
        if not stream.has_begun:
            tell_for_now("stops at the first token; Ctrl-C again stops at once")

    tell_for_now("reading ...")
    try:
        with stopped_by_interrupt(on_stop) as stop:
            turn = talk.say(text, streamer=stream, stop=stop)
    except KeyboardInterrupt:
        print_text("\nstopped; the conversation is as before this turn, the next one reads it anew", err=True)
        return
    except KVOffloadError as error:
        if not sys.stdin.isatty():
            raise
        print_text(f"kvoffload: {error}", err=True)
        return
    if as_json:
        import json

        typer.echo(json.dumps({"prompt": text, **turn._asdict()}))
    if shows_stats:
        print_text(str(turn), err=True, style="dim")
    if talk.is_near_its_end:
        print_text(
            f"{talk.num_tokens} tokens: another answer may exceed what this model was made for; /reset begins anew",
            err=True,
        )
    if not as_json and sys.stdin.isatty():
        typer.echo(err=True)
