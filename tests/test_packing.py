"""bfloat16 caches packed without loss: every bit of K and V in every way to generate, and when it is done at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from form_matrix import SLOW_LINK
from matrix import FAST_LINK, checking_backend, distance, leaves_no_trace, noted_statistics, profile
from models import WIDE, make_model
from modes import COMMON, MODES, given, outcome, prompt
from printed import said
from transformers import PreTrainedModel

from kvoffload import HardwareProfile, OffloadConfig
from kvoffload.config import GIB
from kvoffload.errors import HostMemoryError
from kvoffload.hf import OffloadedHFCache
from kvoffload.kernels import ops
from kvoffload.machine.quantities import Quantity
from kvoffload.planning.rates import decode_quantity
from kvoffload.session.session import Session
from kvoffload.session.stats import GenerationStats
from kvoffload.store.block import Span
from kvoffload.store.device_memory import DeviceMemory
from kvoffload.store.forms import packed_kv


def machine(decode_s: float | None = 1e-12) -> HardwareProfile:
    """Behind a slow link, where decoding a packed value takes so long; None: that was not measured."""
    found = profile(SLOW_LINK.h2d_gb_per_s)
    measured = {} if decode_s is None else {decode_quantity("packed_kv"): Quantity(value=decode_s, unit="s")}
    return replace(found, quantities=found.quantities | measured)


MACHINE = machine()
# ways whose chunks are those that there are without packing, so that sums are the same: in the others some blocks are
# not packed, or written in other runs
SAME_ORDER = ("greedy", "sampling", "beams", "padded_beams", "prompt_lookup", "chunked_prefill", "return_sequences")


def model_of(architecture: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return make_model(architecture, **WIDE).to(dtype)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return model_of("llama")


def config(**options: Any) -> OffloadConfig:
    values: dict[str, Any] = {"block_tokens": 8, "chunk_blocks": 2, "slots": 2, "device_gib": "min", "speculate": "off"}
    values |= {"link": FAST_LINK, "profile": MACHINE, "deterministic": True}
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


def attend_as_bfloat16(self: Any, query: torch.Tensor, segment: Any, *results: torch.Tensor, **options: Any) -> None:
    kv = segment.decoded(0, len(segment.data), torch.bfloat16)
    ops.segment_attention(query, kv, *results, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_every_bit_is_kept_in_every_way_to_generate(
    architecture: str, mode: str, packs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(architecture)
    found, stats = run(model, mode)
    assert packs, "no block was packed"
    if mode in SAME_ORDER:  # the same sums, once what attention is given is bfloat16 again
        monkeypatch.setattr(packed_kv.Stored, "attend", attend_as_bfloat16)
        (found, _), (wanted, _) = run(model, mode), run(model, mode, packing="off")
        assert distance(found, wanted) == 0
    assert stats.exact
    assert stats.lossy_form is None
    assert stats.packed_fraction > 0.5
    assert "of the blocks packed" in said(stats)


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


@pytest.mark.parametrize(("decode_s", "packed"), [(1e-3, 0), (1e-12, 1), (None, 0)])
def test_it_is_done_where_decoding_is_known_to_cost_less_than_the_link_saves(
    model: PreTrainedModel, decode_s: float | None, packed: int
) -> None:
    assert run(model, profile=machine(decode_s))[1].packed_fraction == packed


def test_without_a_link_that_has_a_speed_nothing_is_packed(model: PreTrainedModel) -> None:
    from kvoffload import EmulatedLink

    with Session(model, OffloadConfig(link=EmulatedLink(), device_gib="min", block_tokens=8)) as session:
        model.generate(prompt(2), **COMMON)
        assert session.stats is not None
        assert session.stats.packed_fraction == 0


@contextmanager
def scattered(model: PreTrainedModel) -> Iterator[None]:
    """K and V of all layers have any exponent, so that no block can be packed."""

    def scatter(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        powers = torch.randint(-60, 3, output.shape, generator=torch.Generator().manual_seed(output.shape[1]))
        return output * torch.exp2(powers.float()).to(output.dtype)

    names = [(layer.self_attn, name) for layer in model.model.layers for name in ("k_proj", "v_proj")]
    handles = [getattr(module, name).register_forward_hook(scatter) for module, name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_blocks_of_random_bits_stay_unpacked_and_right(model: PreTrainedModel) -> None:
    with scattered(model):
        (wanted, _), (found, stats) = (run(model, packing=packing) for packing in ("off", "auto"))
    assert stats.packed_fraction == 0
    assert distance(found, wanted) == 0


@pytest.mark.parametrize("host", [1.02, 1.4, 1.9])
@pytest.mark.parametrize("device", ["min", 0.8])
def test_what_cannot_be_packed_fits_wherever_it_fits_without_packing(
    model: PreTrainedModel, host: float, device: Any
) -> None:
    """The cap on host memory, over what K and V take there, and the share of them that the device has room for."""
    options: dict[str, Any] = {}
    if device != "min":
        plan = run(model, packing="off")[1].plan
        cache_bytes = plan.num_offloaded_layers * plan.num_blocks * plan.block_tokens * plan.bytes_per_token["kv"]
        options["device_gib"] = (plan.device_bytes + device * cache_bytes) / GIB
    plain = run(model, packing="off", **options)[1]
    options["host_gib"] = host * plain.host_bytes / GIB
    assert run(model, **options)[1].exact
    with scattered(model):
        found = run(model, **options)[1]
    assert found.packed_fraction == 0
    assert found.h2d_bytes <= plain.h2d_bytes, "room on the device was lost"


def test_a_cap_that_leaves_no_room_for_both_is_planned_without_packing(model: PreTrainedModel) -> None:
    plain = run(model, packing="off")[1].host_bytes
    with pytest.raises(HostMemoryError):
        run(model, host_gib=0.9 * plain / GIB)
    assert run(model, host_gib=1.3 * plain / GIB)[1].packed_fraction == 0
    assert run(model, host_gib=2.0 * plain / GIB)[1].packed_fraction == 1
