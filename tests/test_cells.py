"""The workloads of the campaign and their prompts."""

from __future__ import annotations

import dataclasses

import torch
from campaigns import TINY, tiny_cell

from campaign.cells import CELLS, Cell, choose


def test_cells_ask_something_fit_their_machine_and_come_most_informative_first() -> None:
    assert [cell.rank for cell in CELLS.values()] == sorted(cell.rank for cell in CELLS.values())
    assert all(cell.question and cell.preset.cached_tokens >= 128 for cell in CELLS.values())
    groups = {cell.group for cell in choose([], is_emulated=False)}
    assert groups == {"first", "latency", "throughput", "large", "long", "gqa", "shapes"}
    assert all(cell.device_memory_gb for cell in choose([], is_emulated=False))
    latency = choose(["latency"], is_emulated=False)
    assert {(cell.prompt_tokens, cell.new_tokens) for cell in latency} == {
        (prompt, new) for prompt in (128, 256, 512) for new in (32, 128)
    }
    assert all(cell.batch == 64 for cell in latency)
    assert {cell.name.split(" ")[0] for cell in latency} == {"opt-6.7b", "opt-13b", "llama-2-7b", "llama-2-13b"}
    assert [cell.name for cell in choose(["cpu-gqa*"], is_emulated=True)] == [
        "cpu-gqa 2x2048",
        "cpu-gqa 8x512 in parts",
    ]


def test_prompts_are_the_same_at_every_call_padded_on_the_left_and_repeat_where_asked() -> None:
    cell = tiny_cell(is_ragged=True)
    ids, mask = cell.prompts(torch.device("cpu"))
    assert torch.equal(ids, cell.prompts(torch.device("cpu"))[0])
    assert mask.sum(1).tolist() == [256, 160, 64]
    assert bool((mask[:, 1:] >= mask[:, :-1]).all())
    copied = Cell(
        **{**{f.name: getattr(cell, f.name) for f in dataclasses.fields(cell)}, "is_ragged": False}
        | {"prompt_lookup_tokens": 2, "preset": dataclasses.replace(TINY, cached_tokens=200)}
    )
    ids, _ = copied.prompts(torch.device("cpu"))
    assert torch.equal(ids[:, :64], ids[:, 64:128])
