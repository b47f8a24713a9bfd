"""The baseline that moves whole layers: the same logits under a checker that poisons buffers, and no race."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from modes import given

from campaign.whole_layer_cache import WholeLayerCache
from kvoffload.backend import CheckingBackend, EmulatedBackend, RaceError
from kvoffload.backend.base import HostBuffer
from kvoffload.backend.checking import CheckedEvent
from kvoffload.bench.presets import Preset, make_model
from kvoffload.config import EmulatedLink

SHAPE = Preset(
    architecture="opt", hidden=32, heads=2, kv_heads=2, ffn=32, layers=3, batch=2, cached_tokens=7, vocab=64,
    h2d_gb_per_s=1.0,
)  # fmt: skip
NEW_TOKENS = 5
ROW_BYTES = SHAPE.batch * 2 * SHAPE.hidden * 4  # keys and values, float32


class _Counting(CheckingBackend):
    """Knows what was pinned."""

    def __init__(self) -> None:
        super().__init__(EmulatedBackend(EmulatedLink()), poison=True)
        self.pinned: list[int] = []

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        self.pinned.append(num_bytes)
        return super().allocate_host(num_bytes)


class _NeverWaitsForWrites(_Counting):
    """A copy to the host that nobody is ordered behind."""

    def copy_to_host(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Any]) -> CheckedEvent:
        return super().copy_to_host(dst, src, after)._replace(clock={})


class _ComputeNeverWaits(_Counting):
    """Compute that goes on while copies run."""

    def compute_waits(self, event: CheckedEvent) -> None:
        self.inner.compute_waits(event.inner)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return make_model(SHAPE, torch.device("cpu"))


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[_Counting]:
    made: _Counting = getattr(request, "param", _Counting)()
    yield made
    made.close()


def _generate(model: Any, cache: WholeLayerCache | None) -> Any:
    ids = torch.arange(14).view(2, 7) + 3
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **given(cache),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def _cache(model: Any, backend: CheckingBackend, *, writes_back: bool = True) -> WholeLayerCache:
    return WholeLayerCache(model, backend, SHAPE.cached_tokens + NEW_TOKENS, ROW_BYTES, writes_back=writes_back)


@pytest.mark.parametrize("writes_back", [True, False])
def test_logits_are_those_of_the_plain_cache_under_a_checker(
    model: Any, backend: _Counting, *, writes_back: bool
) -> None:
    expected = _generate(model, None)
    found = _generate(model, _cache(model, backend, writes_back=writes_back))
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert backend.num_checked > 4 * SHAPE.layers * NEW_TOKENS


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (_NeverWaitsForWrites, "while d2h may still"),
        (_ComputeNeverWaits, "compute .* while (d2h|h2d) may still"),
    ],
    indirect=["backend"],
)
def test_a_missing_wait_is_a_race(model: Any, backend: _Counting, message: str) -> None:
    with pytest.raises(RaceError, match=message):
        _generate(model, _cache(model, backend))


def test_all_host_memory_is_there_before_the_first_token(model: Any, backend: _Counting) -> None:
    cache = _cache(model, backend)
    expected = [ROW_BYTES * (SHAPE.cached_tokens + NEW_TOKENS)] * SHAPE.layers
    assert backend.pinned == expected
    assert cache.host_bytes == sum(expected)
    _generate(model, cache)
    assert backend.pinned == expected


def test_one_layer_has_none_to_fetch_ahead(backend: _Counting) -> None:
    single = make_model(dataclasses.replace(SHAPE, layers=1), torch.device("cpu"))
    with pytest.raises(ValueError, match="needs 2 layers, the model has 1"):
        _cache(single, backend)
