#!/usr/bin/env python3
"""Kernels at decode shapes, each beside what bounds it: reading the cache, and computing K and V from activations.

scripts/bench_kernels.py --json -

Attention of one query token per sequence over the cached tokens, chunk by chunk, in GB/s of K and V read: ours, torch's
attention over all tokens at once (heads apart, as transformers has them, and in our order), and a copy of as many bytes
on the device, of which half are read and half written. Recomputation of one chunk in TFLOP/s: two matrix products into
strided halves and the rotation, the fused kernel for the keys, and bare `torch.mm`. On a CUDA device each time is that
of eight calls between two events, all queued before the first ran (`kvoffload/backend/clock.py`), after a warm-up; on a
CPU the shapes are small and the clock is the host's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from campaign import rows
from kvoffload.backend import DeviceClock
from kvoffload.cli.options import a_file_to_write
from kvoffload.cli.terminal import script
from kvoffload.errors import ConfigError
from kvoffload.kernels import ops
from kvoffload.kernels.stored import StoredKV
from kvoffload.planning.forms import FORMS
from kvoffload.store.forms import made_of_kv
from kvoffload.store.forms.encoded import Encoded
from kvoffload.store.tail import KVShape


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer of a model at decode."""

    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    rotary: bool = True
    bias: bool = False
    batch: int = 32
    cached_tokens: int = 1024
    chunk_tokens: int = 256

    @property
    def width(self) -> int:
        return self.kv_heads * self.head_dim


ON_CUDA = {
    "llama-3.1-8b": Shape(hidden=4096, q_heads=32, kv_heads=8, head_dim=128),
    "opt-6.7b": Shape(hidden=4096, q_heads=32, kv_heads=32, head_dim=128, rotary=False, bias=True),
    "llama-2-7b": Shape(hidden=4096, q_heads=32, kv_heads=32, head_dim=128),
}
BLOCK_TOKENS = 64  # of forms
_SMALL: dict[str, Any] = {
    "hidden": 256,
    "q_heads": 4,
    "head_dim": 64,
    "batch": 4,
    "cached_tokens": 256,
    "chunk_tokens": 64,
}
ON_CPU = {"small-gqa": Shape(kv_heads=2, **_SMALL), "small-mha": Shape(kv_heads=4, **_SMALL)}

Sample = tuple[str, str, str, list[float]]  # provider, metric, unit, samples


def timed(call: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Seconds of one call, of each of some stretches after three that are not counted."""
    clock = DeviceClock(torch.device(device))
    n = clock.least_calls
    seconds = [clock.time(call, n).seconds / n for _ in range(3 + repeats)]
    return seconds[3:]


def attention(shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> Iterator[Sample]:
    """Reading the cache of one layer."""
    kv = torch.randn(shape.cached_tokens, shape.batch, 2, shape.kv_heads, shape.head_dim, device=device, dtype=dtype)
    q = torch.randn(shape.batch, 1, shape.q_heads, shape.head_dim, device=device, dtype=dtype)
    out, lse = torch.empty(q.shape, device=device), torch.empty(q.shape[:3], device=device)
    result, other = torch.empty_like(q), torch.empty_like(kv)
    scale = shape.head_dim**-0.5

    def ours() -> None:
        for first in range(0, shape.cached_tokens, shape.chunk_tokens):
            ops.segment_attention(
                q,
                kv[first : first + shape.chunk_tokens],
                out,
                lse,
                scale=scale,
                is_first=first == 0,
                first_position=first,
                query_position=shape.cached_tokens,
            )
        ops.finish(out, lse, result)

    def sdpa(keys: Tensor, values: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, scale=scale, enable_gqa=shape.q_heads != shape.kv_heads
        )

    keys, values = kv.permute(2, 1, 3, 0, 4).unbind(0)  # [batch, kv_heads, tokens, head_dim]
    apart = (keys.contiguous(), values.contiguous())
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "ours": (ours, 1),
        "sdpa": (lambda: sdpa(*apart), 1),
        "sdpa_token_major": (lambda: sdpa(keys, values), 1),
        "copy": (lambda: other.copy_(kv), 2),  # reads and writes
    }
    heads, head_dim = shape.kv_heads, shape.head_dim
    encoded = [name for name, row in FORMS.items() if row.is_encoded]
    for name, form in made_of_kv(encoded, KVShape(heads, head_dim, heads, head_dim, dtype), BLOCK_TOKENS).items():
        assert isinstance(form, Encoded)
        calls[name] = (reading(form, q, kv, shape.chunk_tokens, scale), 1)  # of what the blocks stand for
    for provider, (call, times_bytes) in calls.items():
        seconds = timed(call, device, repeats)
        rates = [times_bytes * kv.nbytes / second / 1e9 for second in seconds]
        yield provider, "attention_kv", "GB/s", rates


def reading(form: Encoded, q: Tensor, kv: Tensor, chunk_tokens: int, scale: float) -> Callable[[], object]:
    """Attention over the same K and V as blocks of a form, chunk by chunk."""
    tokens, rows, _, heads, head_dim = kv.shape
    blocks = kv.view(-1, BLOCK_TOKENS, rows, 2, heads, head_dim)
    data = torch.empty(len(blocks), form.block_bytes(rows), dtype=torch.uint8, device=kv.device)
    for idx in range(len(blocks)):
        form.encode(blocks[idx : idx + 1], data[idx : idx + 1])
    out, lse = torch.empty(q.shape, device=q.device), torch.empty(q.shape[:3], device=q.device)

    def attend() -> None:
        for first in range(0, tokens, chunk_tokens):
            part = data[first // BLOCK_TOKENS : (first + chunk_tokens) // BLOCK_TOKENS]
            stored = StoredKV(form.name, part, BLOCK_TOKENS, rows, heads, head_dim, form.decode)
            ops.stored_attention(
                q, stored, out, lse, scale=scale, is_first=first == 0, first_position=first, query_position=tokens
            )

    return attend


def recompute(shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> Iterator[Sample]:
    """K and V of one chunk from its activations."""
    tokens, m, width = shape.chunk_tokens, shape.chunk_tokens * shape.batch, shape.width
    x = torch.randn(m, shape.hidden, device=device, dtype=dtype)
    weights = torch.randn(2, width, shape.hidden, device=device, dtype=dtype) * shape.hidden**-0.5
    bias = torch.randn(2, width, device=device, dtype=dtype) if shape.bias else (None, None)
    angle = torch.rand(tokens, 1, shape.head_dim, device=device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    kv = torch.empty(m, 2 * width, device=device, dtype=dtype)
    keys = kv[:, :width].view(tokens, shape.batch, shape.kv_heads, shape.head_dim)
    plain = torch.empty(2, m, width, device=device, dtype=dtype)

    def two_steps() -> None:
        ops.linear_into(x, weights[0], bias[0], kv[:, :width])
        ops.linear_into(x, weights[1], bias[1], kv[:, width:])
        if shape.rotary:
            ops.rope_(keys, cos, sin)

    def fused() -> None:
        from kvoffload.kernels.linear_rope import linear_rope

        linear_rope(x, weights[0], bias[0], keys, cos, sin)
        ops.linear_into(x, weights[1], bias[1], kv[:, width:])

    def mm() -> None:
        torch.mm(x, weights[0].t(), out=plain[0])
        torch.mm(x, weights[1].t(), out=plain[1])

    calls = {"mm_rope": two_steps, "fused": fused, "mm": mm}
    if device == "cpu" or not shape.rotary:
        del calls["fused"]
    operations = 2 * m * width * shape.hidden * 2  # multiply and add; keys and values
    for provider, call in calls.items():
        seconds = timed(call, device, repeats)
        yield provider, "recompute", "TFLOP/s", [operations / second / 1e12 for second in seconds]


def measure(device: str, quick: bool, on_rows: Callable[[list[rows.Row]], None] = lambda found: None) -> list[rows.Row]:
    """All rows of a device; few repetitions of one shape with `quick`. `on_rows` gets those of a provider at once."""
    shapes = ON_CPU if device == "cpu" else ON_CUDA
    dtypes = (torch.float32,) if device == "cpu" else (torch.bfloat16, torch.float16)
    if quick:
        shapes, dtypes = dict(list(shapes.items())[:1]), dtypes[:1]
    cells = [(name, dtype, part) for name in shapes for dtype in dtypes for part in (attention, recompute)]
    repeats = 5 if quick else 50
    found = []
    with torch.no_grad():
        for name, dtype, part in track(cells, console=Console(stderr=True), disable=not sys.stderr.isatty()):
            config = {**asdict(shapes[name]), "dtype": str(dtype).removeprefix("torch.")}
            for provider, metric, unit, samples in part(shapes[name], dtype, device, repeats):
                found.append(rows.row("kernels", provider, metric, unit, name, samples, config, "none"))
                on_rows(found[-1:])
    return found


def main(
    quick: Annotated[bool, typer.Option("--quick", help="one shape, few repetitions")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    json_path: Annotated[
        Path | None,
        typer.Option("--json", callback=a_file_to_write, help="write rows as JSON to a file, - for standard output"),
    ] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="add rows to this CSV file")] = None,
) -> None:
    """Kernels at decode shapes, each beside what bounds it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"unknown device {device!r}; known: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device: --device cpu times the twins of the kernels, at small shapes")
    if csv_path is not None:
        rows.check(csv_path)
    found = measure(device, quick, lambda new: rows.save(csv_path, new) if csv_path else None)
    if str(json_path) == "-":
        json.dump(found, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        Console().print(table(found))
        if json_path is not None:
            json_path.write_text(json.dumps(found, indent=1) + "\n")


def table(found: list[dict[str, Any]]) -> Table:
    """Rows as people read them, with the share of each row's bound."""
    result = Table(title=f"kernels on {found[0]['device']}")
    for column in ("shape", "dtype", "what", "provider", "p50", "of bound"):
        result.add_column(column, justify="right" if column in ("p50", "of bound") else "left")
    key = ("x", "config_json", "metric")
    bounds = {tuple(row[k] for k in key): float(row["p50"]) for row in found if row["provider"] in ("copy", "mm")}
    for row in found:
        share = float(row["p50"]) / bounds[tuple(row[k] for k in key)]
        dtype = json.loads(row["config_json"])["dtype"]
        value = f"{np.round(float(row['p50']), 3):g} {row['unit']}"
        result.add_row(row["x"], dtype, row["metric"], row["provider"], value, f"{share:.2f}")
    return result


if __name__ == "__main__":
    script(main)()
