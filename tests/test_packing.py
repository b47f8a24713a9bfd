"""bfloat16 caches packed without loss: every bit of K and V in every way to generate, and when it is done at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from form_matrix import SLOW_LINK, WIDE
from matrix import FAST_LINK, checking_backend, distance, leaves_no_trace, noted_statistics, profile
from models import make_model
from modes import COMMON, MODES, given, outcome, prompt
from transformers import PreTrainedModel

from kvoffload import OffloadConfig
from kvoffload.config import GIB
from kvoffload.errors import HostMemoryError
from kvoffload.hf import OffloadedHFCache
from kvoffload.machine.quantities import Quantity
from kvoffload.planning.rates import decode_quantity
from kvoffload.session.session import Session
from kvoffload.session.stats import GenerationStats
from kvoffload.store.block import Span
from kvoffload.store.device_memory import DeviceMemory
from kvoffload.store.forms import packed_kv


def model_of(architecture: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return make_model(architecture, **WIDE).to(dtype)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return model_of("llama")


def config(**options: Any) -> OffloadConfig:
    values: dict[str, Any] = {"block_tokens": 8, "chunk_blocks": 2, "slots": 2, "device_gib": "min", "speculate": "off"}
    values |= {"link": FAST_LINK, "profile": profile(SLOW_LINK.h2d_gb_per_s), "deterministic": True}
    return OffloadConfig(**values | options)


def run(model: PreTrainedModel, mode: str = "greedy", **options: Any) -> tuple[Any, GenerationStats]:
    """What a way to generate gives, every access to buffers checked, and its statistics."""
    with (
        leaves_no_trace(model),
        Session(model, config(**options), backend=checking_backend()) as session,
        noted_statistics(model, session) as stats,
    ):
        found = outcome(MODES[mode].run(model, session.new_cache))
    return found, stats[-1]


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each packing had; each is compared with what it was made of, bit by bit."""
    original, counts = packed_kv.Stored.pack, list[int]()

    def pack(self: Any, out: torch.Tensor, leaving: Any) -> None:
        original(self, out, leaving)
        tokens = leaving.stop - leaving.start
        rows = leaving.tail.rows // leaving.row_step
        wanted, found = torch.empty(2, tokens, rows, self.shape.width, dtype=torch.bfloat16)
        leaving.copy("kv", wanted)
        span = Span(self.name, 0, tokens // self.block_tokens, self.block_tokens, rows, leaving.row_step)
        self.restore(DeviceMemory(out.clone()), span, found)
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
        counts.append(tokens)

    monkeypatch.setattr(packed_kv.Stored, "pack", pack)
    return counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_every_bit_is_kept_in_every_way_to_generate(architecture: str, mode: str, packs: list[int]) -> None:
    _, stats = run(model_of(architecture), mode, split="transfer")
    assert packs, "no block was packed"
    assert stats.exact
    assert stats.lossy_form is None
    assert stats.packed_fraction > 0.5
    assert "of the blocks packed" in str(stats)


def test_what_is_cached_can_be_read_back_bit_by_bit(model: PreTrainedModel) -> None:
    seen: dict[int, list[torch.Tensor]] = {}

    @contextmanager
    def watched(cache: OffloadedHFCache) -> Iterator[None]:
        originals = [layer.update for layer in cache.layers]
        for idx, (layer, original) in enumerate(zip(cache.layers, originals, strict=True)):

            def update(
                keys: Any, values: Any, *args: Any, idx: int = idx, original: Any = original, **kwargs: Any
            ) -> Any:
                seen.setdefault(idx, []).append(torch.stack((keys, values)).clone())
                return original(keys, values, *args, **kwargs)

            layer.update = update  # type: ignore[method-assign]
        yield

    with Session(model, config(), backend=checking_backend()) as session:
        cache = session.new_cache()
        with watched(cache):
            model.generate(prompt(2), **given(cache), **COMMON)
        assert cache.core.count_blocks()["packed_kv"]
        for idx, parts in seen.items():
            wanted = torch.cat(parts, dim=3)
            assert torch.equal(cache.layers[idx].keys.view(torch.int16), wanted[0].view(torch.int16))
            assert torch.equal(cache.layers[idx].values.view(torch.int16), wanted[1].view(torch.int16))


def test_fewer_bytes_cross_the_link(model: PreTrainedModel) -> None:
    plain, packed = (run(model, packing=packing)[1] for packing in ("off", "auto"))
    assert plain.packed_fraction == 0
    assert packed.packed_fraction == 1
    assert packed.h2d_bytes < plain.h2d_bytes / 1.2  # blocks of 8 tokens list more than large ones
    assert packed.host_bytes < plain.host_bytes / 1.2


def test_blocks_of_random_bits_stay_unpacked_and_right(model: PreTrainedModel) -> None:
    """K and V of one layer have any exponent: its blocks are those of a run without packing, and so is the answer."""

    def scatter(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(output.shape[1])
        powers = torch.randint(-60, 3, output.shape, generator=generator)
        return output * torch.exp2(powers.float()).to(output.dtype)

    handles = [
        getattr(layer.self_attn, name).register_forward_hook(scatter)
        for layer in model.model.layers
        for name in ("k_proj", "v_proj")
    ]
    try:
        (wanted, _), (found, stats) = (run(model, packing=packing) for packing in ("off", "auto"))
    finally:
        for handle in handles:
            handle.remove()
    assert stats.packed_fraction == 0
    assert distance(found, wanted) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_not_packed_which_is_said_once(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama", dtype)
    with caplog.at_level("INFO", logger="kvoffload"), Session(model, config(), backend=checking_backend()) as session:
        for _ in range(2):
            model.generate(prompt(2), **COMMON)
            assert session.stats is not None
            assert session.stats.packed_fraction == 0
    said = [record.getMessage() for record in caplog.records if "packing is for bfloat16" in record.getMessage()]
    assert len(said) == 1


def test_where_decoding_costs_more_than_the_link_saves_nothing_is_packed(model: PreTrainedModel) -> None:
    slow = profile(SLOW_LINK.h2d_gb_per_s)
    cost = {decode_quantity("packed_kv"): Quantity(value=1e-3, unit="s")}
    assert run(model, profile=replace(slow, quantities=slow.quantities | cost))[1].packed_fraction == 0
    cost = {decode_quantity("packed_kv"): Quantity(value=1e-12, unit="s")}
    assert run(model, profile=replace(slow, quantities=slow.quantities | cost))[1].packed_fraction == 1


def test_without_a_link_that_has_a_speed_nothing_is_packed(model: PreTrainedModel) -> None:
    from kvoffload import EmulatedLink

    with Session(model, OffloadConfig(link=EmulatedLink(), device_gib="min", block_tokens=8)) as session:
        model.generate(prompt(2), **COMMON)
        assert session.stats is not None
        assert session.stats.packed_fraction == 0


def test_a_cap_on_host_memory_counts_blocks_as_if_none_could_be_packed(model: PreTrainedModel) -> None:
    """Else a text that cannot be packed would end in the middle."""
    plain = run(model, packing="off")[1].host_bytes
    with pytest.raises(HostMemoryError):
        run(model, host_gib=0.9 * plain / GIB)
    assert run(model, host_gib=1.3 * plain / GIB)[1].packed_fraction == 1
