"""The tools of others: what they are asked for, and what their output says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from campaigns import CellAlone, gpu_bed

from kvoffload.bench.cells import CELLS
from kvoffload.bench.external import FlexLLMGen, LlamaCpp
from kvoffload.errors import KVOffloadError


def test_flexllmgen_puts_the_cache_in_host_memory_and_its_log_becomes_figures() -> None:
    bed = gpu_bed()
    command = FlexLLMGen().command(bed)
    percent = command[command.index("--percent") + 1 :][:6]
    assert percent == ["100", "0", "0", "100", "100", "0"]
    assert command[command.index("--gpu-batch-size") + 1] == "64"
    log = (
        "prefill latency: 2.000 s\tprefill throughput: 16384.0 token/s\ndecode latency: 6.200 s\tdecode throughput: 320"
    )
    found = FlexLLMGen().parse(log, bed)
    assert found["ttft"] == ("s", [2.0])
    assert found["tpot"][1] == [pytest.approx(0.2)]
    assert found["decode_tokens_per_s"][1] == [pytest.approx(320)]
    with pytest.raises(KVOffloadError, match="printed no prefill and decode latency"):
        FlexLLMGen().parse("Traceback", bed)


def test_llama_bench_is_asked_for_a_cache_in_host_memory_and_its_json_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVOFFLOAD_GGUF", "model.gguf")
    bed: Any = CellAlone(CELLS["llama-2-7b 1x32768+32 24 GB"])
    assert "-nkvo 1" in " ".join(LlamaCpp().command(bed))
    text = json.dumps([{"n_prompt": 32768, "n_gen": 32, "samples_ns": [2_000_000_000, 3_000_000_000]}])
    assert LlamaCpp().parse(text, bed) == {"total": ("s", [2.0, 3.0])}
    with pytest.raises(KVOffloadError, match="printed no test"):
        LlamaCpp().parse("[]", bed)


def test_a_tool_that_fails_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlexLLMGen, "command", lambda self, bed: ["false"])
    with pytest.raises(KVOffloadError, match="flexllmgen ended with code 1"):
        FlexLLMGen().figures(gpu_bed())
