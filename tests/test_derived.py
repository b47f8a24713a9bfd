"""Views are made once, for as long as the tensor they are of."""

from __future__ import annotations

import gc
import weakref

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvoffload.store.derived import Derived


def halves(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor[:, :2], tensor[:, 2:]


def test_the_same_views_come_back_for_the_same_tensor_alone() -> None:
    derived, data = Derived(halves), torch.zeros(32)
    one, other = data[:16].view(4, 4), data[:16].view(4, 4)
    first = derived.of(one)
    assert derived.of(one) is first
    assert derived.of(other) is not first
    first[1].fill_(1.0)
    assert data.sum() == 8


def test_no_memory_is_kept() -> None:
    derived, data = Derived(halves), torch.zeros(32)
    storage, view = StorageWeakRef(data.untyped_storage()), data[:16].view(4, 4)
    made = weakref.ref(derived.of(view)[0])
    del view
    gc.collect()
    assert made() is None
    del data
    gc.collect()
    assert storage.expired()


def test_a_tensor_that_is_no_view_keeps_nothing_either() -> None:
    derived, whole = Derived(halves), torch.zeros(4, 4)
    storage = StorageWeakRef(whole.untyped_storage())
    derived.of(whole)
    del whole
    gc.collect()
    assert storage.expired()


def test_a_new_tensor_at_an_old_ones_place_is_not_mistaken_for_it() -> None:
    derived, data = Derived(halves), torch.arange(64.0)
    for start in range(0, 48, 16):
        view = data[start : start + 16].view(4, 4)  # likely to get the last one's id
        assert derived.of(view)[0][0, 0] == start
        del view


def test_views_made_in_inference_mode_can_be_written_after_it() -> None:
    derived, data = Derived(halves), torch.zeros(32)
    with torch.inference_mode(False):
        view = data[:16].view(4, 4)
    with torch.inference_mode():
        left, _ = derived.of(view)
    left.add_(1.0)
    assert data.sum() == 8
