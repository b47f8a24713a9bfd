"""What the benchmark of streamed weights measures: models, how much of them is streamed, and how slow the link is.

Owns the workloads and the question each of them answers. Does not own who is measured (`weights`).

    link-bound   weights and cache take twice as long over the link as the device computes
    balanced     as long as that
    slow-link    six times as long: the device could recompute about half of the cache under the weights' transfers
    as a card    28 times as long: then recomputing K and V takes about 0.85 of the time that it saves the link, as it
                 does by the figures of OPT-30B in float16 on an A100 with PCIe 4 (operations a second over twice the
                 link's bytes a second and the hidden size)
    prefill      one token after a long prompt of many rows: weights cross once, whatever is computed with them

Emulated links get their speed from what this machine computes in that cell (`weights.Bed`). Large models have few of
their layers, as more of the same change no ratio.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace

import torch

from kvoffload.bench.presets import PRESETS, Preset


@dataclass(frozen=True, kw_only=True)
class WeightCell:
    """One workload."""

    name: str
    question: str
    preset: Preset  # its batch and cached_tokens are the sequences and the tokens of each prompt
    resident_share: float = 0.0  # of the decoder layers
    link_over_compute: float | None = None  # emulated: bytes of a step over the link, in times of its compute
    is_prefill: bool = False  # one new token: what is timed is the prefill

    @property
    def num_resident(self) -> int:
        """Decoder layers that stay on the device."""
        return int(self.resident_share * self.preset.layers)

    def to_json(self, new_tokens: int, rounds: int) -> dict[str, object]:
        """What identifies the cell in a row, whatever machine it ran on."""
        p = self.preset
        return {
            "architecture": p.architecture,
            "hidden": p.hidden,
            "ffn": p.ffn,
            "kv_heads": p.kv_heads,
            "layers": p.layers,
            "resident_layers": self.num_resident,
            "batch": p.batch,
            "prompt_tokens": p.cached_tokens,
            "new_tokens": 1 if self.is_prefill else new_tokens,
            "dtype": str(p.dtype).removeprefix("torch."),
            "link_over_compute": self.link_over_compute,
            "rounds": rounds,
        }


def _cpu(architecture: str, kv_heads: int, ffn: int, batch: int, tokens: int) -> Preset:
    return Preset(
        architecture=architecture,
        hidden=512,
        heads=8,
        kv_heads=kv_heads,
        ffn=ffn,
        layers=10,
        batch=batch,
        cached_tokens=tokens,
        h2d_gb_per_s=1.0,  # until the cell says otherwise
    )


GROUPED = _cpu("llama", 2, 1536, batch=16, tokens=128)  # 120 MB of weights, 21 MB of cache
MULTI_HEAD = _cpu("opt", 8, 2048, batch=32, tokens=128)  # 126 MB of weights, 168 MB of cache
SHORT = replace(GROUPED, hidden=256, ffn=768, layers=8, batch=32, cached_tokens=512)  # 25 MB of weights


def _emulated() -> list[WeightCell]:
    found = []
    for name, preset in (("llama", GROUPED), ("opt", MULTI_HEAD)):
        for share, kept in ((0.0, "all"), (0.5, "half")):
            for ratio, bound in ((2.0, "link-bound"), (1.0, "balanced")):
                if name == "opt" and bound == "balanced":
                    continue
                hides = ": can recomputation hide under the weights?" if name == "opt" else ""
                found.append(
                    WeightCell(
                        name=f"{name} {kept} {bound}",
                        question=f"{kept} of the layers streamed, {ratio:g} times the compute over the link{hides}",
                        preset=preset,
                        resident_share=share,
                        link_over_compute=ratio,
                    )
                )
    slow = WeightCell(
        name="opt all slow-link",
        question="recomputation of about half of the cache hides under the transfers",
        preset=MULTI_HEAD,
        link_over_compute=6.0,
    )
    as_a_card = WeightCell(
        name="opt all as a card",
        question="recomputation beside the link as on an A100 with OPT-30B",
        preset=replace(MULTI_HEAD, layers=4),
        link_over_compute=28.0,
    )
    prefill = WeightCell(
        name="prefill 32x512",
        question="how often weights cross the link for a long prompt of many rows",
        preset=SHORT,
        link_over_compute=0.4,
        is_prefill=True,
    )
    return [*found, slow, as_a_card, prefill]


def _on_gpu() -> list[WeightCell]:
    opt = replace(PRESETS["opt-30b"], cached_tokens=512)  # 4 of its 48 layers, 4.9 GB
    mixtral = replace(
        PRESETS["llama-3.1-8b"], architecture="mixtral", layers=3, vocab=32000, cached_tokens=512
    )  # 3 of the 32 layers of Mixtral-8x7B, 8.7 GB
    llama = replace(
        PRESETS["llama-3.1-8b"], hidden=8192, heads=64, ffn=28672, layers=4, vocab=32000, cached_tokens=512
    )  # 4 of the 80 layers of Llama-2-70B, 6.8 GB
    return [
        WeightCell(name="opt-30b", question="all of 4 layers streamed", preset=opt),
        WeightCell(name="mixtral-8x7b", question="all of 3 layers with 8 experts streamed", preset=mixtral),
        WeightCell(name="llama-2-70b", question="all of 4 layers streamed", preset=llama),
        WeightCell(
            name="opt-30b half",
            question="half of 6 layers streamed",
            preset=replace(opt, layers=6),
            resident_share=0.5,
        ),
        WeightCell(
            name="opt-30b prefill 32x512",
            question="how often weights cross the link for a long prompt of many rows",
            preset=opt,
            is_prefill=True,
        ),
    ]


CELLS: dict[str, WeightCell] = {cell.name: cell for cell in [*_emulated(), *_on_gpu()]}


def shrunk(cell: WeightCell) -> WeightCell:
    """The same with a tiny model in float32, for a smoke test."""
    p = cell.preset
    preset = replace(
        p,
        hidden=64,
        heads=4,
        kv_heads=4 if p.kv_heads == p.heads else 2,
        ffn=128,
        layers=6,  # half of them and two slabs are not all
        batch=4 if cell.is_prefill else 2,
        cached_tokens=64,
        vocab=128,
        dtype=torch.float32,
    )
    return replace(cell, preset=preset)


def choose(patterns: list[str], *, is_emulated: bool) -> list[WeightCell]:
    """The cells of this kind of machine whose name matches one of the patterns, in whole or in part."""
    here = [cell for cell in CELLS.values() if cell.preset.is_emulated == is_emulated]
    return [
        cell
        for cell in here
        if any(pattern in cell.name or fnmatch.fnmatch(cell.name, pattern) for pattern in patterns or ["*"])
    ]
