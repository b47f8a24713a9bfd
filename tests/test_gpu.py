"""The CUDA backend on a real device: logits, races, memory. Skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model

import kvoffload
from kvoffload.backend import CheckingBackend, CudaBackend
from kvoffload.session.session import Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ARCHITECTURES = ["llama", "opt", "qwen3", "gemma2", "phi", "mixtral"]
LOGIT_TOLERANCE = 5e-6
SPLITS: list[Any] = ["transfer", "recompute", 0.5]


def _run(model: Any, config: kvoffload.OffloadConfig | None, checked: bool = False, **kwargs: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    ids = torch.randint(3, 90, (2, 61), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    options = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= kwargs
    if config is None:
        return model.generate(ids, attention_mask=mask, **options), None
    backend = CheckingBackend(CudaBackend(torch.device("cuda"))) if checked else None
    with Session(model, config, backend=backend) as session:
        out = model.generate(ids, attention_mask=mask, **options)
        assert session.stats is not None
        assert session.stats.h2d_bytes > 0
    return out, session.stats


def _distance(one: Any, other: Any) -> float:
    distances = [(a.float() - b.float()).abs().max() for a, b in zip(one.logits, other.logits, strict=True)]
    return float(torch.stack(distances).max())  # NaN if one is


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("path", ["auto", "whole_layer"])
def test_logits_equal_those_without_offloading(architecture: str, split: Any, beams: int, path: Any) -> None:
    model = make_model(architecture).cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    expected, _ = _run(model, None, num_beams=beams)
    config = kvoffload.OffloadConfig(split=split, block_tokens=8, chunk_blocks=2, device_gib="min", attention=path)
    found, stats = _run(model, config, num_beams=beams)
    assert torch.equal(found.sequences, expected.sequences)
    assert _distance(found, expected) <= LOGIT_TOLERANCE
    assert (stats.recomputed_tokens > 0) == (split != "transfer")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("path", ["auto", "whole_layer"])
def test_declared_accesses_are_ordered_by_events(split: Any, path: Any) -> None:
    model = make_model("llama").cuda()
    config = kvoffload.OffloadConfig(
        split=split, block_tokens=8, chunk_blocks=1, slots=2, device_gib="min", attention=path
    )
    expected, _ = _run(model, None)
    found, _ = _run(model, config, checked=True)
    assert _distance(found, expected) <= LOGIT_TOLERANCE


@pytest.mark.filterwarnings("default:bfloat16")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("path", ["auto", "whole_layer"])
def test_bfloat16_distance_is_reported(split: Any, path: Any, record_property: Any) -> None:
    model = make_model("llama").to("cuda", torch.bfloat16)
    expected, _ = _run(model, None)
    config = kvoffload.OffloadConfig(split=split, block_tokens=8, device_gib="min", attention=path)
    found, stats = _run(model, config)
    distance = _distance(found, expected)
    record_property("max_abs_logit_difference", distance)
    # In pytest's summary:
    warnings.warn(f"bfloat16, split={split}, attention={path}: max |d logits| = {distance:.3g}", stacklevel=1)
    assert stats.exact == (split == "transfer")  # of K and V; attention over segments rounds in other places
    if split == "transfer" and path == "whole_layer":
        assert distance == 0


def test_device_memory_peaks_where_the_plan_says() -> None:
    model = make_model(
        "llama", hidden_size=256, head_dim=64, num_key_value_heads=4, max_position_embeddings=4096
    ).cuda()
    ids = torch.randint(3, 90, (4, 2048), device="cuda")
    config = kvoffload.OffloadConfig(split="transfer", device_gib="min")
    with kvoffload.offload(model, config) as session:
        model.generate(ids, max_new_tokens=8, do_sample=False)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - sum(session.engine.account.held_bytes.values())
        model.generate(ids, max_new_tokens=8, do_sample=False, prefill_chunk_size=64)
        peak = torch.cuda.max_memory_allocated() - before
    stats = session.stats
    assert stats is not None
    cache_bytes = 3 * 2 * 4 * 64 * 4 * 4 * 2056  # layers, K and V, heads, head_dim, float32, rows, tokens
    assert stats.device_kv_peak_decode_bytes < cache_bytes
    assert peak < stats.device_kv_peak_decode_bytes * 1.02 + 64 * 2**20  # the model's own work on 64 tokens


def test_nothing_is_left_after_an_exception() -> None:
    model = make_model("llama").cuda()
    expected, _ = _run(model, None)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()

    def fail(*args: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(model, kvoffload.OffloadConfig(split=0.5, block_tokens=8), logits_processor=[fail])
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20
    again, _ = _run(model, None)
    assert _distance(again, expected) == 0


def test_stream_sanitizer_finds_nothing() -> None:
    """A run of its own, under PyTorch's CUDA stream sanitizer."""
    code = (
        "import dataclasses, torch, kvoffload; from models import make_model; m = make_model('llama').cuda();"
        "ids = torch.randint(3, 90, (2, 64), device='cuda');"
        "c = kvoffload.OffloadConfig(split=0.5, block_tokens=8, chunk_blocks=1, slots=2, device_gib='min');"
        "s = kvoffload.offload(m, c); m.generate(ids, max_new_tokens=20, do_sample=False); s.close();"
        "c = dataclasses.replace(c, attention='whole_layer');"
        "s = kvoffload.offload(m, c); m.generate(ids, max_new_tokens=20, do_sample=False); s.close(); print('clean')"
    )
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TORCH_CUDA_SANITIZER": "1", "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "data race" not in result.stderr.lower(), result.stderr[-4000:]
