"""`split="transfer"` moves K and V bit for bit: whatever attention is given equals what transformers' own cache gives.

Two views of the same promise. Inside one run a `DynamicCache` is fed the same new tokens as ours, in every mode, and
each K and V that attention reads must be equal to the last bit. And between two runs, where attention runs on tensors
of another stride, everything that attention saw in a whole generation is equal as well.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from matrix import (
    ARCHITECTURES,
    Cell,
    check_cell,
    checking_backend,
    config_for,
    model_for,
)
from models import GPTJ_IS_LIKE_OTHERS
from modes import MODES, plain_cache
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvoffload.cache import attention
from kvoffload.cache.layer import CacheLayer
from kvoffload.hf import OffloadedHFCache, attention_modules
from kvoffload.kernels import ops
from kvoffload.pipeline.write_back import WriteBack
from kvoffload.session.session import Session

# (blocks, device budget, pipeline): resident blocks, ragged blocks and each schedule are met with every architecture.
PLANS = [("4x2", "min", "whole_layer"), ("3x1", "half", "kvpr"), ("auto", "auto", "sequential")]


class Shadow:
    """Feeds a `DynamicCache` what ours is fed, and compares what they return."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_compared = 0
        self._original = Cache.update
        self._plain: dict[int, DynamicCache] = {}
        self._awaited: dict[int, Any] = {}
        monkeypatch.setattr(Cache, "update", self._make_update())
        for name in ("reorder_cache", "crop"):
            monkeypatch.setattr(OffloadedHFCache, name, self._follow(name))
        self._attend = attention.attend
        monkeypatch.setattr(attention, "attend", self._watch_segments)

    def _compare(self, position: int, found: Any, wanted: Any) -> None:
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs), f"layer {position} at {theirs.shape[2]} tokens"
            self.num_compared += 1

    def _watch_segments(self, layer: CacheLayer, *args: Any) -> torch.Tensor:
        """Puts together what attention is given segment by segment; every position must come exactly once."""
        wanted = self._awaited.pop(id(layer))
        found = [torch.full_like(part, torch.nan) for part in wanted]
        attend_segment = ops.segment_attention

        def watch(query: Any, kv: torch.Tensor, *rest: Any, **options: Any) -> None:
            table, start = options["row_table"], options["first_position"]
            if table is not None:
                token = torch.arange(kv.shape[0])
                kv_rows = kv[token[:, None], table[token // options["block_tokens"]].long()]
            else:
                kv_rows = kv
            for part, data in zip(found, kv_rows.unbind(2), strict=True):  # [tokens, rows, heads, dim]
                target = part[:, :, start : start + kv.shape[0]]
                assert target.isnan().all(), "attended to twice"
                target.copy_(data.permute(1, 2, 0, 3))
            attend_segment(query, kv, *rest, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "segment_attention", watch)
            result = self._attend(layer, *args)
        self._compare(layer.position, found, wanted)
        return result

    def _make_update(self) -> Callable[..., Any]:
        shadow = self

        def update(self: Cache, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
            found = shadow._original(self, keys, values, layer_idx, *args, **kw)
            if isinstance(self, OffloadedHFCache):
                plain = shadow._plain.setdefault(id(self), plain_cache(self.session.model))
                if self.layers[layer_idx].record_past and not getattr(plain, "is_recording", False):
                    plain.activate_past_recording()
                    plain.is_recording = True
                wanted = shadow._original(plain, keys.clone(), values.clone(), layer_idx, *args, **kw)
                layer = self.layers[layer_idx]
                if getattr(layer, "awaits_attention", False) and layer.core.num_tokens:
                    shadow._awaited[id(layer.core)] = wanted  # attention over segments comes to see them
                else:
                    shadow._compare(layer_idx, found, wanted)
            return found

        return update

    def _follow(self, name: str) -> Callable[..., Any]:
        original = getattr(OffloadedHFCache, name)

        def method(cache: OffloadedHFCache, *args: Any, **kwargs: Any) -> Any:
            getattr(self._plain[id(cache)], name)(*args, **kwargs)
            return original(cache, *args, **kwargs)

        return method


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_reads_the_bits_that_were_cached(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for blocks, device, pipeline in [*PLANS, ("3x1", "half", "pipelined")]:
        with monkeypatch.context() as patch:
            shadow = Shadow(patch)
            check_cell(Cell("llama", mode, "transfer", device, blocks, pipeline))
            assert shadow.num_compared > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_reads_the_bits_that_were_cached(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow = Shadow(monkeypatch)
    check_cell(Cell(architecture, "padded_beams", "transfer", "min", "3x1", "pipelined"))
    assert shadow.num_compared > 0


@pytest.mark.parametrize("mode", ["greedy", "beams", "prompt_lookup"])
def test_one_flipped_bit_is_noticed(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = WriteBack.store

    def store(self: WriteBack, extent: Any, blocks: Any, pack: Callable[[torch.Tensor], None]) -> None:
        def pack_wrongly(data: torch.Tensor) -> None:
            pack(data)
            data[0] ^= 1  # the last bit of the mantissa of one value

        original(self, extent, blocks, pack_wrongly)

    Shadow(monkeypatch)
    monkeypatch.setattr(WriteBack, "store", store)
    with pytest.raises(AssertionError, match="layer 0 at"):
        check_cell(Cell("llama", mode, "transfer", "min", "4x2", "pipelined"))


class Recorder:
    """An attention function that keeps a copy of every K and V it is given, and leaves the rest to another."""

    name = "recording"

    def __init__(self, inner: Callable[..., Any]) -> None:
        self._inner = inner
        self.seen: list[torch.Tensor] = []

    def __call__(self, module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any) -> Any:
        self.seen += [key.clone(), value.clone()]
        return self._inner(module, query, key, value, *args, **kw)

    def run(self, model: PreTrainedModel, mode: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What attention saw, and the tokens."""
        self.seen = []
        outputs = MODES[mode].run(model, lambda: plain_cache(model))
        seen, self.seen = self.seen, []
        return seen, [out.sequences for out in outputs]


@contextmanager
def recording(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Attention of the model through a recorder: registered by name where it runs on SDPA, else around its own."""
    used = model.config._attn_implementation
    if used == "sdpa":
        recorder = Recorder(sdpa_attention_forward)
        AttentionInterface.register(Recorder.name, recorder)
        AttentionMaskInterface.register(Recorder.name, sdpa_mask)
        model.set_attn_implementation(Recorder.name)
        try:
            yield recorder
        finally:
            model.set_attn_implementation(used)
    else:
        code = sys.modules[type(next(iter(attention_modules(model).values()))).__module__]
        recorder = Recorder(code.eager_attention_forward)
        with monkeypatch.context() as patch:
            patch.setattr(code, "eager_attention_forward", recorder)
            yield recorder


# Attention of these is written into their modules; the test above sees what they read.
WITHOUT_ATTENTION_FUNCTIONS = ("bloom", "mpt", *(() if GPTJ_IS_LIKE_OTHERS else ("gptj",)))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in WITHOUT_ATTENTION_FUNCTIONS])
def test_attention_sees_the_same_bits_in_two_whole_generations(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for(architecture, False)
    with recording(model, monkeypatch) as recorder:
        for mode, (blocks, device, pipeline) in zip(("left_padding", "beams"), PLANS[:2], strict=True):
            wanted, wanted_tokens = recorder.run(model, mode)
            config = config_for(Cell(architecture, mode, "transfer", device, blocks, pipeline))
            config = dataclasses.replace(config, attention="whole_layer")  # the model's own attention sees everything
            with Session(model, config, backend=checking_backend()) as session:
                found, found_tokens = recorder.run(model, mode)
                assert session.stats is not None
                assert session.stats.h2d_bytes > 0
                assert session.stats.exact
            assert len(found) == len(wanted) > 0
            assert all(map(torch.equal, found, wanted))
            assert all(map(torch.equal, found_tokens, wanted_tokens))
