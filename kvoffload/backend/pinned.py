"""Pinned host memory of one process: how it is made, and what is kept of it from one session to the next.

Owns registrations with CUDA that no backend uses any more: pinning takes seconds for some gigabytes, and sessions of a
process often need the same again. One pool for each device, up to a share of the host's memory; `free_pinned` gives all
of it back. Does not own what a backend uses (`cuda`).

Pinned memory is pageable memory registered with `cudaHostRegister`: PyTorch's pinned allocator rounds each allocation
up to a power of two, which for a cache of tens of gigabytes is far from the truth. CUDA pins whole pages and none of
them twice, so every buffer has pages of its own. The thread that registers them touches every page first, alone and on
a CPU near the device: the system places a page where it is touched first, and PyTorch would have its threads do that,
which run anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading

import torch

from kvoffload.machine import system_memory

KEPT_SHARE = 0.25  # of the memory that this process may use, that is kept for later sessions at most
MAX_WASTE = 2  # how many times as large as asked for a buffer may be that is used again


class PinnedPool:
    """Memory that is pinned for one device and that nobody uses now."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._lock = threading.Lock()

    @property
    def kept_bytes(self) -> int:
        """What is kept."""
        return sum(pages.numel() for pages in self._kept)

    def take(self, num_bytes: int) -> torch.Tensor | None:
        """Kept pages of about that size; None where there are none: then as much is given back as will be taken."""
        with self._lock:
            fitting = [pages for pages in self._kept if num_bytes <= pages.numel() <= MAX_WASTE * num_bytes]
            if fitting:
                best = min(fitting, key=torch.Tensor.numel)
                self._kept = [pages for pages in self._kept if pages is not best]
                return best
        self._give_back_down_to(self.kept_bytes - num_bytes)
        return None

    def give(self, pages: torch.Tensor) -> None:
        """Keep pages that nothing uses any more, as far as there is room; the others are the system's again."""
        with self._lock:
            self._kept.append(pages)
        self._give_back_down_to(int(KEPT_SHARE * system_memory.usable_bytes()))

    def free(self) -> None:
        """Give all of it back."""
        self._give_back_down_to(0)

    def _give_back_down_to(self, num_bytes: int) -> None:
        """Oldest first."""
        with self._lock:
            while self._kept and self.kept_bytes > num_bytes:
                unpin(self._kept.pop(0))


_POOLS: dict[torch.device, PinnedPool] = {}  # what outlives sessions can belong to none of them


def pool_of(device: torch.device) -> PinnedPool:
    """The process's pool of a device."""
    return _POOLS.setdefault(device, PinnedPool())


def free_pinned() -> None:
    """Give back all pinned memory that is kept for later sessions of this process."""
    for pool in _POOLS.values():
        pool.free()


def make_pages(num_bytes: int) -> torch.Tensor:
    """Whole pages of that size, uint8, each on the node of the CPU that this thread runs on."""
    with torch.inference_mode(False):
        room = torch.empty(num_bytes + mmap.PAGESIZE, dtype=torch.uint8)
        first = -room.data_ptr() % mmap.PAGESIZE
        pages = room[first : first + num_bytes]
        ctypes.memset(pages.data_ptr(), 0, num_bytes)
    return pages


def pin(pages: torch.Tensor, device: torch.device) -> int:
    """Register pages; returns CUDA's code, which is 0 where that worked."""
    code = int(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.numel(), 0))
    if code:
        _forget_last_error(device)
    return code


def unpin(pages: torch.Tensor) -> None:
    """Memory must not be freed while it is pinned."""
    torch.cuda.cudart().cudaHostUnregister(pages.data_ptr())


def _forget_last_error(device: torch.device) -> None:
    """CUDA keeps the error of a failed call for whoever asks next: let a kernel of no consequence report it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
