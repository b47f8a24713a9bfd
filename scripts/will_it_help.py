#!/usr/bin/env python3
"""The page "Will it help me?": models x devices x workloads, as `kvoffload.plan` predicts them, in README five of them.

scripts/will_it_help.py            every cell in words
scripts/will_it_help.py --write    put the table into docs/will-it-help.md and five of its cells into README.md
scripts/will_it_help.py --check    fail if either differs from what stands there
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from campaign.markers import write_or_check
from kvoffload.advise.advice import task_of
from kvoffload.advise.verdict import Verdict, judge
from kvoffload.config import OffloadConfig
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.planning.workload import Workload

ROOT = Path(__file__).parents[1]
PAGE, README = "docs/will-it-help.md", "README.md"
DEVICES = {
    "L4": "l4-24gb-pcie4",
    "RTX 3090": "rtx3090-24gb-pcie4",
    "RTX 4090": "rtx4090-24gb-pcie4",
    "RTX 5090": "rtx5090-32gb-pcie5",
    "A100 40GB": "a100-40gb-pcie4",
    "H100 80GB": "h100-80gb-pcie5",
    "H200": "h200-pcie5",
}
FILES = {
    "OPT-6.7B": "opt-6.7b",
    "Llama-2-7B": "llama-2-7b",
    "Llama-3.1-8B": "llama-3.1-8b",
    "Qwen3-8B": "qwen3-8b",
    "Mixtral-8x7B": "mixtral-8x7b",
    "Qwen2.5-32B, 4-bit weights": "qwen2.5-32b-awq",
}
CHANGES = tuple(itertools.product((16, 8, 4), (16, 8, 4)))  # bits of weights and of the cache, the best first
WEIGHT_BITS = {8: 8.5, 4: 4.5}  # with scales, as common formats have them
CACHE_BITS = {16: 16.0, 8: 8.5, 4: 5.3}  # with scales and ranges, as our forms have them
LARGER_OPT = {"OPT-13B": (5120, 40, 40), "OPT-30B": (7168, 56, 48)}  # hidden size, heads, layers
WORKLOADS = {
    "one context of 128k tokens": Workload(batch=1, prompt_tokens=131072 - 512, new_tokens=512),
    "one context of 32k tokens": Workload(batch=1, prompt_tokens=32768, new_tokens=256),
    "64 sequences of 1k tokens": Workload(batch=64, prompt_tokens=1024, new_tokens=128),
    "8 beams over 8k tokens": Workload(batch=1, prompt_tokens=8192, new_tokens=128, num_beams=8),
}
KEY = """
Read it so: **1.5x** means offload, predicted so many times as fast as the best alternative, which is full transfer
where no part of the work fits on the device; `=` offload, nothing else works, but planning gains nothing over full
transfer of K and V as they are. Where verified drafts gain, they are in it, and it is *assumed* that each from the
newest tokens is right with a chance of 0.7, and each from 4-bit copies of all with 0.9 ([drafts.md](drafts.md) has what
was measured); beams have none. bfloat16 caches (of Llama-3.1 and Qwen3 here) are packed without loss, at an *assumed*
cost on the device. The others:

- `fits`: plain `model.generate()`; weights and cache fit on the device.
- `3 parts`: run the batch in 3 parts, one after another, on the device. The number behind it is what planning gains
  over full transfer if the batch *must* stay together, which is slower than parts all the same.
- **7/s**, 85/s at 256: the weights do not fit. Those of some decoder layers stay in host memory and cross the link in
  every forward, which makes so many new tokens a second with this batch, and so many with one that comes close to the
  most (a host of 256 GB is assumed, and the same lengths). "or 4-bit 95/s" is what weights of 4 bits, which fit, make
  of this batch: take these where that loss of accuracy is acceptable.
- `none`: not even two layers and what is outside of them fit.

Predicted from the figures of datasheets and the achievable speed of each link, with weights in 16 bits and enough host
memory; **not measured**. OPT and Llama-2 stand for multi-head attention at their size, and themselves end at 2k and 4k
tokens. Beams are counted as sequences of their own, although their prompt is stored once.
`kvoffload plan` says it for your model, machine and workload; `scripts/will_it_help.py` makes this table.
"""


LONG_MODELS = ("Qwen2.5-32B, 4-bit weights",)  # shown with the longest context alone
WITH_POSITIONS = ("Llama-3.1-8B", *LONG_MODELS)
LONGEST = "one context of 128k tokens"
ALTERNATIVES = """
**Or fewer bits.** Where that loss of accuracy is acceptable, one context of 128k tokens also fits with so many bits of
weights *and* cache, scales included, and then nothing has to cross a link. `none`: not even in 4 and 4.
"""


IN_SHORT = {
    "fits": ("Llama-3.1-8B", "one context of 32k tokens", "RTX 4090"),
    "parts": ("Llama-2-7B", "64 sequences of 1k tokens", "RTX 4090"),
    "stream": ("Mixtral-8x7B", "64 sequences of 1k tokens", "A100 40GB"),
    "multi-head": ("Llama-2-7B", "one context of 32k tokens", "RTX 4090"),
    "grouped": ("Llama-3.1-8B", LONGEST, "RTX 4090"),
}


class Cell(NamedTuple):
    """One workload of one model on one device."""

    workload: str
    model: str
    device: str
    verdict: Verdict


def cells() -> Iterator[Cell]:
    """All of them; the longest context is for models with positions for it, and these are large."""
    for workload_name, workload in WORKLOADS.items():
        for model, config in models().items():
            if (model in LONG_MODELS) if workload_name != LONGEST else (model not in WITH_POSITIONS):
                continue
            for device, preset in DEVICES.items():
                task = task_of(config, workload, HardwareProfile.preset(preset), OffloadConfig())
                yield Cell(workload_name, model, device, judge(task))


def models() -> dict[str, dict[str, Any]]:
    """Configurations by the names in the table, the smaller ones first."""
    found = {name: json.loads((ROOT / f"tests/data/configs/{file}.json").read_text()) for name, file in FILES.items()}
    for name, (hidden, heads, layers) in LARGER_OPT.items():
        sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}
        found[name] = found["OPT-6.7B"] | sizes | {"num_attention_heads": heads, "num_hidden_layers": layers}
    return found


def table(found: Sequence[Cell]) -> str:
    """The section as Markdown; models that are the same in all cells of a workload share a line."""
    lines = ["| Workload | Model | " + " | ".join(DEVICES) + " |", "|---|---|" + "---|" * len(DEVICES)]
    for workload in WORKLOADS:
        rows: dict[str, list[str]] = {}
        for model in models():
            row = " | ".join(short(cell.verdict) for cell in found if (cell.workload, cell.model) == (workload, model))
            if row:
                rows.setdefault(row, []).append(model)
        for idx, (row, names) in enumerate(rows.items()):
            lines.append(f"| {workload if idx == 0 else ''} | {', '.join(names)} | {row} |")
    return "\n".join([*lines, KEY.rstrip(), *_alternatives()])


def in_short(found: Sequence[Cell]) -> str:
    """README's five lines, one for each answer.

    Raises:
        ValueError: a cell has another answer by now, so that its line would be wrong.
    """
    named = {(cell.model, cell.workload, cell.device): cell.verdict for cell in found}
    lines = []
    for kind, (model, workload, device) in IN_SHORT.items():
        verdict = named[model, workload, device]
        expected = "faster" if kind in ("multi-head", "grouped") else kind
        if verdict.answer != expected or (kind == "stream" and not verdict.quantised_tokens_per_s):
            raise ValueError(f"{model}, {workload}, {device} is {verdict.answer!r} now: choose another cell for {kind}")
        lines.append(f"- {_line(kind, verdict, f'{model}, {workload}, {device}')}")
    return "\n".join(lines)


def _line(kind: str, verdict: Verdict, example: str) -> str:
    if kind == "fits":
        return f"**Weights and cache fit.** {example}: use plain `generate()`."
    if kind == "parts":
        return f"**The batch fits in parts.** {example}: run {verdict.parts} parts in turn, without offloading."
    if kind == "stream":
        streamed, quantised = (
            _rate(rate).replace("/s", " new tokens/s")
            for rate in (verdict.tokens_per_s, verdict.quantised_tokens_per_s)
        )
        return (
            f"**The weights do not fit.** {example}: streamed they make {streamed}; in 4 bits they fit, and make "
            f"{quantised}. **Quantise instead**, if that loss of accuracy is acceptable."
        )
    gain = f"offload, **{verdict.gain:.1f}x** as fast as full transfer, {_without_drafts(kind):.1f}x without drafts"
    if kind == "multi-head":
        return f"**One cache is too large, multi-head attention** (OPT, Llama 2). {example}: {gain}."
    weight_bits, cache_bits = _bits_that_fit(kind)
    bits = f"a cache in {cache_bits} bits" + ("" if weight_bits == "16" else f" and weights in {weight_bits}")
    title = "**One cache is too large, grouped-query attention** (Llama 3, Mistral, Qwen)."
    return f"{title} {example}: {gain}. With {bits} it fits, with loss."


def _without_drafts(kind: str) -> float:
    """What offloading alone gains in a cell."""
    model, workload, device = IN_SHORT[kind]
    config, profile = OffloadConfig(speculate="off"), HardwareProfile.preset(DEVICES[device])
    return judge(task_of(models()[model], WORKLOADS[workload], profile, config)).gain


def _bits_that_fit(kind: str) -> tuple[str, str]:
    """Of weights and cache, the most with which the longest context fits in a cell.

    Raises:
        ValueError: it fits as it is, or not at all.
    """
    model, _, device = IN_SHORT[kind]
    found = _fewest_changes(models()[model], HardwareProfile.preset(DEVICES[device])).split(" and ")
    if len(found) != 2:
        raise ValueError(f"{model} on {device} is {found[0]!r} in fewer bits: choose another cell for {kind}")
    return found[0], found[1]


def _alternatives() -> Iterator[str]:
    """What would fit one long context on the device in fewer bits, where it does not in the model's own."""
    yield ALTERNATIVES
    yield "| Model | " + " | ".join(DEVICES) + " |"
    yield "|---|" + "---|" * len(DEVICES)
    rows: dict[str, list[str]] = {}
    for model, config in models().items():
        if model not in WITH_POSITIONS:
            continue
        found = [_fewest_changes(config, HardwareProfile.preset(preset)) for preset in DEVICES.values()]
        rows.setdefault(" | ".join(found), []).append(model)
    for row, names in rows.items():
        yield f"| {', '.join(names)} | {row} |"


def _fewest_changes(config: dict[str, Any], profile: HardwareProfile) -> str:
    """The most bits of weights, then of the cache, with which the context fits on the device."""
    task = task_of(config, WORKLOADS[LONGEST], profile, OffloadConfig())
    own_bits = 4 if "quantization_config" in config else 16
    for weight_bits, cache_bits in CHANGES:
        if weight_bits > own_bits:
            continue
        changed = task if weight_bits == own_bits else task.in_weight_bits(WEIGHT_BITS[weight_bits])
        if task.resident_bytes(1) * CACHE_BITS[cache_bits] / 16 <= changed.free_bytes(1):
            return "fits" if (weight_bits, cache_bits) == (own_bits, 16) else f"{weight_bits} and {cache_bits}"
    return "none"


def short(verdict: Verdict) -> str:
    """One cell of the table."""
    if verdict.answer == "faster":
        return "**only way**" if math.isinf(verdict.gain) else f"**{verdict.gain:.1f}x**"
    if verdict.answer == "stream":
        said = f"**{_rate(verdict.tokens_per_s)}**"
        if verdict.best_tokens_per_s > verdict.tokens_per_s:
            said += f", {_rate(verdict.best_tokens_per_s)} at {verdict.best_batch}"
        faster = verdict.quantised_tokens_per_s
        return said + (f", or 4-bit {_rate(faster)}" if faster > verdict.tokens_per_s else "")
    if verdict.answer == "parts":
        together = f" ({verdict.gain_together:.1f}x)" if 1 < verdict.gain_together < math.inf else ""
        return f"{verdict.parts} parts{together}"
    return {"only way": "=", "nothing": "none"}.get(verdict.answer, verdict.answer)


def _rate(tokens_per_s: float) -> str:
    """New tokens of all sequences, in two digits."""
    return f"{tokens_per_s:.0f}/s" if tokens_per_s >= 10 else f"{tokens_per_s:.2g}/s"


def sentence(cell: Cell) -> str:
    """One cell in words."""
    verdict = cell.verdict
    if verdict.answer == "faster":
        over = "nothing else works" if math.isinf(verdict.gain) else f"{verdict.gain:.2f}x the best alternative"
        said = f"yes, offload: {over}"
    elif verdict.answer == "only way":
        said = "yes, offload: nothing else works, and transferring everything is as fast as the plan"
    elif verdict.answer == "stream":
        said = (
            f"stream the weights: {_rate(verdict.tokens_per_s)}, {_rate(verdict.best_tokens_per_s)} with a batch of "
            f"{verdict.best_batch}"
        )
        if verdict.quantised_tokens_per_s:
            said += f"; weights in 4 bits fit and make {_rate(verdict.quantised_tokens_per_s)} of this batch"
    elif verdict.answer == "parts":
        would = f"would be {verdict.gain:.2f}x as fast" if verdict.gain else "does not work"
        said = f"no, run {verdict.parts} parts one after another: offloading {would}"
    elif verdict.answer == "fits":
        said = "no, generate() as it is: it fits"
    else:
        said = f"no: {verdict.reason}; quantise the weights or take a larger device"
    return f"{cell.workload}, {cell.model}, {cell.device}: {said}"


def main(
    write: Annotated[bool, typer.Option("--write", help="Put table and lines into their pages.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail if a page says something else.")] = False,
    root: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of README.md and docs/.")] = ROOT,
) -> None:
    """Print, write or check the table."""
    found = list(cells())
    if not write and not check:
        for cell in found:
            print(sentence(cell))
        return
    for page, section in ((PAGE, table(found)), (README, in_short(found))):
        command = "scripts/will_it_help.py --write"
        write_or_check(root / page, "will-it-help", section, check=not write, command=command)


if __name__ == "__main__":
    typer.run(main)
