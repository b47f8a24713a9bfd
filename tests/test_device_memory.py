"""Views of device memory that are made once, and let go with it."""

from __future__ import annotations

import gc
import weakref

import torch

from kvoffload.store.device_memory import DeviceMemory


def test_the_same_part_and_view_are_the_same_tensor() -> None:
    room = DeviceMemory(torch.arange(64, dtype=torch.uint8))
    assert room.part(24) is room.part(24)
    view = room.view(torch.float32, (2, 3))
    assert view is room.view(torch.float32, (2, 3))
    assert view is not room.view(torch.float32, (3, 2))
    assert view.data_ptr() == room.bytes.data_ptr()
    assert torch.equal(view.view(torch.uint8).flatten(), room.bytes[:24])


def test_a_view_that_was_made_in_inference_mode_can_be_written_outside() -> None:
    room = DeviceMemory(torch.zeros(16, dtype=torch.uint8))
    with torch.inference_mode():
        view = room.view(torch.int32, (4,))
    view.fill_(7)
    assert not view.is_inference()
    assert room.bytes[0] == 7


def test_an_emptied_room_holds_no_memory() -> None:
    data = torch.zeros(16, dtype=torch.uint8)
    room, storage = DeviceMemory(data), weakref.ref(data.untyped_storage())
    room.view(torch.int32, (2, 2))
    del data
    room.empty()
    gc.collect()
    assert storage() is None
    assert room.bytes.numel() == 0
