"""What single providers ask for, and what they leave out of their times."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from campaigns import gpu_bed

from campaign import providers as kvproviders
from campaign.providers import HFQuantized, Ours
from campaign.serving import ServedGroup


@pytest.mark.parametrize(("installed", "backend"), [("hqq", "hqq"), ("optimum", "quanto")])
def test_the_quantised_cache_is_asked_for_with_the_backend_that_is_there(
    installed: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {installed, f"{installed}.quanto"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in there else None)
    provider = HFQuantized()
    assert provider.problem(gpu_bed()) is None
    assert provider.own_options() == {"cache_implementation": "quantized", "cache_config": {"backend": backend}}


def test_pinning_is_taken_out_of_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    used = dict.fromkeys(("host_bytes", "h2d_bytes", "d2h_bytes", "device_kv_peak_decode_bytes"), 1)
    stats = SimpleNamespace(setup_s=2.0, device_kv_peak_prefill_bytes=3, **used)
    monkeypatch.setattr(kvproviders, "offload", lambda *args: nullcontext(SimpleNamespace(stats=stats)))
    given = (torch.tensor([[1, 2]]), None, ServedGroup(1, 0.0, [5.0, 6.5]))
    clock = iter([10.0, 17.0])
    monkeypatch.setattr(kvproviders.time, "perf_counter", lambda: next(clock))
    lab = SimpleNamespace(config=lambda *args, **kwargs: None, model=None, device=torch.device("cpu"))
    bed: Any = SimpleNamespace(
        lab=lab, room_bytes=None, profile=None, options=dict, generate=lambda *args, **kwargs: given
    )
    found = Ours("planned").run(bed, 2, keeps_logits=False)
    assert found.groups[0].token_s == [3.0, 4.5]
    assert found.total_s == 5.0
