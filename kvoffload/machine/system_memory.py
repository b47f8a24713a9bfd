"""Memory of the host as this process may use it: what is installed, what is free, what its control groups allow.

Owns the reading of `/proc` and of control groups (version 2 and 1). Does not own what share of it is taken. File cache
counts as free where the kernel drops it for whoever asks, in a control group as in all of the machine: a model that was
just read from files leaves gigabytes of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

UNLIMITED_BYTES = 2**60  # limits of this size mean "none"


class _Files(NamedTuple):
    """Where a version of control groups keeps what."""

    mount: str
    limit: str
    used: str
    stat_prefix: str  # of figures that count the groups below as well


_VERSION_1 = _Files("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = _Files("/sys/fs/cgroup", "memory.max", "memory.current", "")


def installed_bytes() -> int:
    """All memory of the machine."""
    return _meminfo_bytes("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit_bytes() -> int | None:
    """What the control groups of this process may use together; None where they are not limited."""
    return min((limit for limit, _ in _limits()), default=None)


def usable_bytes() -> int:
    """What this process may use at most: what is installed, or the limit of its control groups if that is less."""
    return min(installed_bytes(), limit_bytes() or installed_bytes())


def available_bytes() -> int:
    """What this process can have now without anything being swapped or killed; half of what it may use if unknown."""
    free = [limit - used for limit, used in _limits()]
    return max(0, min([_meminfo_bytes("MemAvailable") or usable_bytes() // 2, *free]))


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, used) of every limited control group that this process is in; used without cache that can be dropped."""
    for line in (_read("/proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _VERSION_1 if controllers else _VERSION_2
        for path in (PurePosixPath(group), *PurePosixPath(group).parents):  # in a container the host's, or just "/"
            folder = f"{files.mount}{path}".rstrip("/")
            limit = _number(_read(f"{folder}/{files.limit}"))
            if limit is not None and limit < UNLIMITED_BYTES:
                used = _number(_read(f"{folder}/{files.used}")) or 0
                stat = dict(line.split(maxsplit=1) for line in (_read(f"{folder}/memory.stat") or "").splitlines())
                cache = (_number(stat.get(f"{files.stat_prefix}{kind}_file")) or 0 for kind in ("active", "inactive"))
                yield limit, max(0, used - sum(cache))


def _meminfo_bytes(name: str) -> int | None:
    for line in (_read("/proc/meminfo") or "").splitlines():
        found, _, rest = line.partition(":")
        if found == name and rest.split():
            return int(rest.split()[0]) * 1024  # KiB
    return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
