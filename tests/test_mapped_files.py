"""Memory mapped from files goes out of the process, and nothing else does."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from kvoffload import EmulatedLink
from kvoffload.backend import EmulatedBackend
from kvoffload.machine import mapped_files
from kvoffload.store.layer_weights import LayerWeights

PAGES = 64


def _resident_pages(tensor: torch.Tensor) -> int:
    """Of the process, as the kernel counts them."""
    first = tensor.data_ptr() // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        file.seek(8 * first)
        entries = file.read(8 * PAGES)
    return sum(entries[8 * number + 7] >> 7 for number in range(PAGES))


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    """Bytes of a file, as safetensors maps them."""
    num_bytes = PAGES * mmap.PAGESIZE
    (tmp_path / "file").write_bytes(bytes(range(256)) * (num_bytes // 256))
    return torch.from_file(str(tmp_path / "file"), shared=False, size=num_bytes, dtype=torch.uint8)


def test_pages_that_were_only_read_go_and_come_again(mapped: torch.Tensor) -> None:
    before = mapped.clone()
    assert _resident_pages(mapped) == PAGES
    mapped_files.let_go(mapped.data_ptr(), mapped.numel())
    assert _resident_pages(mapped) == 0
    assert torch.equal(mapped, before)


def test_pages_that_were_written_and_the_ends_of_others_tensors_stay(mapped: torch.Tensor) -> None:
    mapped[5 * mmap.PAGESIZE] = 77
    before = mapped.clone()
    part = mapped[100 : 60 * mmap.PAGESIZE - 100]
    mapped_files.let_go(part.data_ptr(), part.numel())
    assert _resident_pages(mapped) == 1 + 1 + 5  # the first, the written one, the last five
    assert torch.equal(mapped, before)


def test_memory_that_is_in_no_file_stays() -> None:
    own = torch.full((PAGES * mmap.PAGESIZE,), 3, dtype=torch.uint8)
    mapped_files.let_go(own.data_ptr(), own.numel())
    mapped_files.let_go(own.data_ptr(), 0)
    assert own.eq(3).all()


def test_it_is_known_what_lies_in_a_file(mapped: torch.Tensor) -> None:
    own = torch.zeros(2**20, dtype=torch.uint8)
    stretches = [(own.data_ptr(), 2**20), (mapped.data_ptr(), 1000), (mapped.data_ptr() + 5000, 70)]
    assert mapped_files.bytes_in_files(stretches) == 1070


def test_weights_that_moved_leave_nothing_of_their_file_behind(mapped: torch.Tensor) -> None:
    backend = EmulatedBackend(EmulatedLink())
    weights = torch.nn.Parameter(mapped.view(torch.float32)[: 32 * mmap.PAGESIZE // 4], requires_grad=False)
    other = mapped[-5:].sum()
    LayerWeights(0, [weights]).move_to_host(backend)
    backend.close()
    assert _resident_pages(mapped[: 32 * mmap.PAGESIZE]) <= PAGES - 32
    assert mapped[-5:].sum() == other
    assert torch.equal(weights.view(torch.uint8), mapped[: 32 * mmap.PAGESIZE])
