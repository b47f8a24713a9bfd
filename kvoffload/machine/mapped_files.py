"""Memory of this process that is a mapped file, as a checkpoint is where transformers just loaded it.

Owns which memory that is, and letting go of it. Its pages count for this process from when they were first read until
all of the file is unmapped, however few of its tensors are left; those that were only read can be taken out of it one
by one, and are read from the file again where somebody asks for them. Does not own what lies in them.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from array import array
from collections.abc import Iterable
from pathlib import Path

_IN_A_FILE = 1 << 61  # of a page in /proc/self/pagemap: in a file or shared, and not a copy that was written to
_MADV_DONTNEED = 4
_ENTRY_BYTES = 8


def let_go(address: int, num_bytes: int) -> None:
    """Take whole pages of this memory out of the process, as far as all there is of them is in a file.

    Where that cannot be seen, nothing is done.
    """
    first, end = -(-address // mmap.PAGESIZE), (address + num_bytes) // mmap.PAGESIZE
    if end <= first or sys.platform != "linux":
        return
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(first * _ENTRY_BYTES)
            entries = array("Q", file.read((end - first) * _ENTRY_BYTES))
    except (OSError, ValueError):
        return
    libc = ctypes.CDLL(None)
    start = None
    for number, entry in enumerate((*entries, 0), first):
        if entry & _IN_A_FILE:
            start = number if start is None else start
        elif start is not None:
            run = ctypes.c_void_p(start * mmap.PAGESIZE), ctypes.c_size_t((number - start) * mmap.PAGESIZE)
            libc.madvise(*run, _MADV_DONTNEED)
            start = None


def bytes_in_files(stretches: Iterable[tuple[int, int]]) -> int:
    """How many of the bytes of these (address, bytes) are mapped from files; 0 where that cannot be seen."""
    try:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return 0
    mapped = [[int(part, 16) for part in words[0].split("-")] for words in lines if words[4] != "0"]
    return sum(num_bytes for at, num_bytes in stretches if any(start <= at < end for start, end in mapped))
