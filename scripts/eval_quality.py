#!/usr/bin/env python3
"""What K and V in fewer bytes do to SmolLM2-135M: predictions against its own cache, with and without the rotation of
keys, with keys of which a few channels stand out, and how much of a real bfloat16 cache is packed without loss.

scripts/eval_quality.py
scripts/eval_quality.py --ways packed_kv
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console

import kvoffload
from campaign import rows
from kvoffload import hf
from kvoffload.bench.quality import POSITIONS, Quality, bytes_decide, measure_quality, text_of_python
from kvoffload.cli import chat
from kvoffload.cli.terminal import script
from kvoffload.config import EmulatedLink
from kvoffload.store.forms import int4, int8

RESULTS = Path(__file__).parent / "results"
FORMS = ("int8", "int4", "int2")
WAYS = ("forms", "no_rotation", "outliers", "packed_kv")
CONTEXTS = (1000, 3000)
OUTLIER_BIAS, OUTLIER_CHANNELS = 30.0, (30, 31, 62)  # of slow rotations, as where Qwen2.5 has its large biases
PACKED_TOKENS = 3000


@contextlib.contextmanager
def without_rotation() -> Iterator[None]:
    """Keys and queries as the model makes them."""
    with (
        mock.patch.object(int8.Stored, "rotates_keys", new=False),
        mock.patch.object(int4.Stored, "rotates_keys", new=False),
    ):
        yield


@contextlib.contextmanager
def outliers(model: Any) -> Iterator[None]:
    """Biases that make a few key channels stand out; taken away again."""
    projections = [layer.self_attn.k_proj for layer in model.model.layers]
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    try:
        for idx, projection in enumerate(projections):
            bias = torch.zeros(projection.out_features)
            for head in range(model.config.num_key_value_heads):
                for channel in OUTLIER_CHANNELS:
                    bias[head * head_dim + channel] = OUTLIER_BIAS * (1 if (idx + head + channel) % 2 else -1)
            projection.bias = torch.nn.Parameter(bias, requires_grad=False)
        yield
    finally:
        for projection in projections:
            projection.bias = None


def packed(model: Any, ids: torch.Tensor) -> dict[str, tuple[str, float]]:
    """What of the model's bfloat16 cache is packed, and how many bytes that saves."""
    with kvoffload.offload(model, bytes_decide(packing="auto", link=EmulatedLink(h2d_gb_per_s=2.0))) as session:
        cache = session.new_cache()
        with torch.no_grad():
            model(ids, **{hf.generation_name(): cache})
        core = cache.core
        values = sum(
            block.rows * core.placement.block_tokens * layer.shape.width
            for layer in core.layers
            for block in layer.blocks
        )
        stored = sum(block.num_bytes for layer in core.layers for block in layer.blocks)
        counts = core.count_blocks()
    return {
        "packed_fraction": ("fraction", counts["packed_kv"] / sum(counts.values())),
        "bytes_ratio": ("ratio", 2 * values / stored),
    }


def figures(found: Quality) -> dict[str, tuple[str, float]]:
    """Those of a row."""
    return {
        "mean_kld": ("nats", found.mean_kld),
        "p99_kld": ("nats", found.p99_kld),
        "same_top_share": ("fraction", found.same_top_share),
        "perplexity": ("perplexity", found.perplexity),
        "perplexity_change": ("fraction", found.perplexity_change),
        "bytes_ratio": ("ratio", found.bytes_ratio),
        "kept_exact_blocks": ("blocks", found.kept_exact_blocks),
    }


def main(
    ways: Annotated[str, typer.Option(help=f"of {', '.join(WAYS)}")] = ",".join(WAYS),
    positions: Annotated[int, typer.Option(min=16, help="predictions that count")] = POSITIONS,
    csv_path: Annotated[Path, typer.Option("--csv", help="rows are added to this file")] = RESULTS / "quality.csv",
) -> None:
    """KL divergence, share of the same top token, change of perplexity, and bytes."""
    rows.check(csv_path)
    console = Console(width=160)
    model, tokenizer = chat.load_model(None, torch.device("cpu"))[:2]
    ids = tokenizer(text_of_python(), return_tensors="pt", verbose=False)["input_ids"]
    how: dict[str, Any] = {"model": "SmolLM2-135M", "dtype": "float32", "positions": positions}
    link = "emulated, unpaced"

    def save(provider: str, context: int, way: str, found: dict[str, tuple[str, float]]) -> None:
        new = [
            rows.row("quality", provider, metric, unit, context, [value], how | {"way": way}, link)
            for metric, (unit, value) in found.items()
        ]
        rows.save(csv_path, new)
        console.print(
            f"{provider} ({way}), {context} tokens: " + ", ".join(f"{k} {v:.4g}" for k, (_, v) in found.items())
        )

    for way in ways.split(","):
        if way == "packed_kv":
            how["dtype"] = "bfloat16"
            save("packed_kv", PACKED_TOKENS, way, packed(model.to(torch.bfloat16), ids[:, :PACKED_TOKENS]))
            continue
        forms = ("int8", "int4") if way != "forms" else FORMS
        contexts = CONTEXTS if way == "forms" else CONTEXTS[-1:]
        around = {"forms": contextlib.nullcontext, "no_rotation": without_rotation, "outliers": lambda: outliers(model)}
        with around[way]():
            for found in measure_quality(model, ids, forms, contexts=contexts, positions=positions):
                save(found.kv_dtype, found.context_tokens, way, figures(found))


if __name__ == "__main__":
    script(main)()
