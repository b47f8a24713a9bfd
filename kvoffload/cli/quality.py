"""`kvoffload quality`: what K and V in fewer bits do to a model's predictions, measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvoffload.cli.loading import loading, without_bars_of_others
from kvoffload.cli.options import AsJson, Model
from kvoffload.cli.rules import one_of, whole_number
from kvoffload.cli.terminal import print_json, print_text
from kvoffload.cli.waits import progress, waiting
from kvoffload.errors import ConfigError

if TYPE_CHECKING:
    from kvoffload.bench.quality import Quality


def quality(
    model: Model = None,
    kv_dtype: Annotated[
        str, typer.Option(callback=one_of("int8", "int4", "int2", "all"), help="'int8', 'int4', 'int2', or 'all'.")
    ] = "all",
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file; default: Python's own manual.")
    ] = None,
    positions: Annotated[int, typer.Option(callback=whole_number(), help="Predictions that count.")] = 1000,
    contexts: Annotated[str, typer.Option(help="Tokens before them, such as 1000,3000.")] = "1000,3000",
    as_json: AsJson = False,
) -> None:
    """Measure how much K and V in fewer bits change a model's predictions (minutes on a CPU)."""
    lengths = _lengths(contexts)
    words = None if text is None else _read(text)

    from kvoffload.cli.model_source import find_model

    source = find_model(model)
    without_bars_of_others(source)
    with waiting("starting PyTorch and transformers"):
        import torch

        from kvoffload.bench.quality import measure_quality, text_of_python
        from kvoffload.cli import chat

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with loading(source, f"on {device}"):
        loaded, tokenizer = chat.load_model(source, device)
    ids = tokenizer(text_of_python() if words is None else words, return_tensors="pt", verbose=False)["input_ids"]
    kv_dtypes = ["int8", "int4", "int2"] if kv_dtype == "all" else [kv_dtype]
    with progress("measuring") as tell:
        found = measure_quality(loaded, ids.to(device), kv_dtypes, contexts=lengths, positions=positions, tell=tell)
    if as_json:
        print_json({"model": source.gguf_file or source.name, "quality": [one._asdict() for one in found]})
        return
    _print(found, str(loaded.dtype).removeprefix("torch."))


def _lengths(contexts: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in contexts.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(f"--contexts must be numbers of tokens such as 1000,3000, got {contexts!r}")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text: cannot read {path}: {error}") from error


def _print(found: list[Quality], dtype: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Predictions against the exact {dtype} cache", title_justify="left")
    for name in ("K/V", "context", "mean KLD", "99 % KLD", "same top", "perplexity", "fewer bytes"):
        table.add_column(name, justify="left" if name == "K/V" else "right")
    for one in found:
        table.add_row(
            one.kv_dtype,
            str(one.context_tokens),
            f"{one.mean_kld:.2g}",
            f"{one.p99_kld:.2g}",
            f"{one.same_top_share:.3f}",
            f"{one.perplexity_change:+.2%}",
            f"{one.bytes_ratio:.2f}x",
        )
    Console().print(table)
    kept = sum(one.kept_exact_blocks for one in found)
    if kept:
        print_text(f"{kept} blocks are not finite and were kept exact", is_below_table=True)
    print_text(
        f"{found[0].positions} predictions each. KLD: Kullback-Leibler divergence of the next token's distribution, in "
        "nats; same top: how often its likeliest token is the same; perplexity: its change.",
        is_below_table=True,
    )
