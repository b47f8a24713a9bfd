"""Nothing adds up: many generations of any kind, and a long one, leave the process and the model as they were.

The short form runs by default. The full one, 200 calls and 2,000 tokens, is marked slow; `scripts/test -m slow
--log-cli-level=INFO tests/test_soak.py` shows its figures.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from drafting import window_gib
from matrix import FAST_LINK, TOLERANCE, distance, leaves_no_trace, profile
from models import make_model
from modes import Shape, once, outcome
from soak import Footprint, earlier_objects_aside, play
from test_memory import CountingBackend
from transformers import PreTrainedModel

from kvoffload import OffloadConfig
from kvoffload.backend import EmulatedBackend
from kvoffload.hf import ModelHooks, SegmentAttention
from kvoffload.session.offloaded_model import OffloadedModel
from kvoffload.session.session import Session
from kvoffload.store.pool import HostPool

logger = logging.getLogger(__name__)
RSS_NOISE_BYTES = 8 * 2**20  # allocators keep some of what they were given


@pytest.fixture(autouse=True)
def new_objects_only() -> Iterator[None]:
    with earlier_objects_aside():
        yield


@pytest.fixture
def models() -> list[PreTrainedModel]:
    """With activations half as large as K and V, and with larger ones."""
    return [make_model("llama", num_key_value_heads=4), make_model("llama")]


def soak(models: list[PreTrainedModel], calls: int, warm_up: int, seed: int) -> str:
    """Play; the figures. What is alive after `warm_up` calls is what may be alive afterwards."""
    began, warm = time.perf_counter(), Footprint.now()

    def look(num_calls: int) -> None:
        nonlocal warm
        if num_calls <= warm_up:
            warm = Footprint.now()

    done = play(models, calls, seed, look)
    end = Footprint.now()
    growth = end.growth_since(warm, rss_noise_bytes=RSS_NOISE_BYTES)
    assert not growth, f"more than after {warm_up} calls: {growth}"
    assert done.h2d_bytes > 1e5 * calls
    assert done.checked >= calls / 8
    assert done.interrupted >= calls / 20
    return f"{done}, {warm} -> {end}, {time.perf_counter() - began:.1f} s"


def test_twenty_calls_of_random_shape_and_mode(models: list[PreTrainedModel]) -> None:
    soak(models, 20, 10, seed=1)


@pytest.mark.slow
def test_two_hundred_calls_of_random_shape_and_mode(models: list[PreTrainedModel]) -> None:
    logger.info("%s", soak(models, 200, 50, seed=2))


def long_run(new_tokens: int, split: Any, block_tokens: int, drafts: int = 0) -> str:
    """One long generation, looked at on its way; the figures."""
    model = make_model("llama", num_key_value_heads=4, max_position_embeddings=4096)
    shape = Shape(rows=2, prompt_tokens=40, new_tokens=new_tokens)
    wanted = outcome(once(shape).run(model, None))
    gc.collect()
    options: dict[str, Any] = {"device_gib": "min", "block_tokens": block_tokens, "chunk_blocks": 2}
    if drafts:
        gib = window_gib(model, shape.rows, new_tokens // 4, block_tokens, 1)
        options |= {"speculate": drafts, "device_gib": gib, "slots": 4}
    config = OffloadConfig(split=split, link=FAST_LINK, profile=profile(), **options)
    began, before, seen = time.perf_counter(), Footprint.now(), []
    backend = CountingBackend(FAST_LINK)

    def look(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = ids.shape[1] - shape.prompt_tokens
        if new in (new_tokens // 10, new_tokens - 1):
            seen.append((backend.device_bytes, backend.host_bytes, threading.active_count(), Footprint.now()))
        return torch.zeros(len(ids), dtype=torch.bool)

    with leaves_no_trace(model), Session(model, config, backend) as session:
        found = outcome(once(shape, stopping_criteria=[look]).run(model, None))
        assert session.stats is not None
        row_bytes = 3 * 2 * 4 * 12 * 4  # layers, K and V, heads, head_dim, float32
        share = 1.0 if split == "transfer" else 0.75  # of what K and V alone would take
        expected = shape.rows * row_bytes * share * sum(shape.prompt_tokens + step for step in range(new_tokens - 1))
        if not drafts:
            assert session.stats.h2d_bytes == pytest.approx(expected, rel=0.1)
    del session
    first, last = seen
    assert last[:3] == first[:3], "memory on the device, slabs on the host, threads"
    # What may grow on the way: the tokens and their logits, which generate() was asked to keep, the position embeddings
    # of keys that are recomputed (doubled when full), and the pages of the slabs that are in use.
    kept_bytes = shape.rows * new_tokens * (96 * 4 + 8)
    if split != "transfer":
        kept_bytes += 2 * 2 * shape.max_tokens * (12 * 4 + shape.rows * 4)
    assert last[3].tensor_bytes - first[3].tensor_bytes <= kept_bytes
    assert last[3].rss_bytes - first[3].rss_bytes <= kept_bytes + shape.rows * row_bytes * new_tokens + RSS_NOISE_BYTES
    error = distance(found, wanted)
    assert error <= TOLERANCE, f"logits differ by {error:.3g}"
    steps = len(found.logits)
    del found, wanted
    end = Footprint.now()
    assert not end.growth_since(before, rss_noise_bytes=RSS_NOISE_BYTES)
    return f"{steps} tokens, error {error:.2g}, {before} -> {end}, {time.perf_counter() - began:.1f} s"


@pytest.mark.parametrize("split", ["transfer", 0.5])
def test_a_run_of_150_tokens(split: Any) -> None:
    long_run(150, split, block_tokens=8)


def test_a_run_of_150_tokens_with_drafts() -> None:
    long_run(150, "transfer", block_tokens=8, drafts=6)


@pytest.mark.slow
def test_a_run_of_2000_tokens_with_drafts() -> None:
    logger.info("%s", long_run(2000, "transfer", block_tokens=32, drafts=8))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["transfer", 0.5])
def test_a_run_of_2000_tokens(split: Any) -> None:
    logger.info("%s", long_run(2000, split, block_tokens=32))


# ---- what the soak is there to find ----------------------------------------------------------------------------------


class Plant(NamedTuple):
    """A fault that is planted.

    Attributes:
        owner: class whose method is replaced.
        name: of the method.
        make: of the original method and a list that lives on, the faulty one.
        found: what the soak then says.
        mend: method that does for the list what was left undone; None where letting go is enough.
    """

    owner: type[Any]
    name: str
    make: Callable[[Callable[..., Any], list[Any]], Callable[..., Any]]
    found: str
    mend: Callable[[Any], Any] | None = None


def keep_result(original: Callable[..., Any], hoard: list[Any]) -> Callable[..., Any]:
    def keep(*args: Any) -> Any:
        hoard.append(original(*args))
        return hoard[-1]

    return keep


def do_not(original: Callable[..., Any], hoard: list[Any]) -> Callable[..., Any]:
    return lambda owner: hoard.append(owner)


def leave_a_file_open(original: Callable[..., Any], hoard: list[Any]) -> Callable[..., Any]:
    def leave(*args: Any) -> Any:
        hoard.append(os.open(os.devnull, os.O_RDONLY))
        return original(*args)

    return leave


def write_to_memory_of_its_own(original: Callable[..., Any], hoard: list[Any]) -> Callable[..., Any]:
    def take(*args: Any) -> Any:
        hoard.append(bytearray(b"x") * (8 * 2**20))  # no tensor: only the process as a whole shows it
        return original(*args)

    return take


def copy_half(original: Callable[..., Any], hoard: list[Any]) -> Callable[..., Any]:
    def copy(backend: Any, dst: torch.Tensor, src: torch.Tensor, after: Any) -> Any:
        return original(backend, dst[: len(dst) // 2], src[: len(src) // 2], after)

    return copy


PLANTS = {
    "slabs": Plant(EmulatedBackend, "allocate_host", keep_result, r"calls: .*'tensor_bytes'"),
    "device memory": Plant(EmulatedBackend, "allocate_device", keep_result, "device memory is held"),
    "other memory": Plant(HostPool, "close", write_to_memory_of_its_own, r"calls: .*'rss_bytes'"),
    "files": Plant(HostPool, "close", leave_a_file_open, r"calls: .*'files'", os.close),
    "threads": Plant(EmulatedBackend, "close", do_not, "threads are left", EmulatedBackend.close),
    "hooks": Plant(ModelHooks, "remove", do_not, "hooks are left", ModelHooks.remove),
    "attention": Plant(SegmentAttention, "remove", do_not, "attention functions are left", SegmentAttention.remove),
    "caches": Plant(OffloadedModel, "_reap", do_not, "bytes of the pool are in use"),
    "copies": Plant(EmulatedBackend, "copy_to_device", copy_half, "logits differ"),
}


@pytest.mark.filterwarnings("ignore:K/V of some tokens")  # what is half copied may show in a comparison first
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found(name: str, models: list[PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    plant, hoard = PLANTS[name], []
    with monkeypatch.context() as patch:
        patch.setattr(plant.owner, plant.name, plant.make(getattr(plant.owner, plant.name), hoard))
        with pytest.raises(AssertionError, match=plant.found):
            soak(models, 8, 3, seed=1)
    for left in hoard:
        if plant.mend is not None:
            plant.mend(left)
