"""Memory of the host: what is installed, what is free, and what control groups of either version allow."""

from __future__ import annotations

import pytest

from kvoffload.machine import system_memory

MEMORY = "MemTotal:       1000 kB\nMemFree:        100 kB\nMemAvailable:    600 kB"
NO_LIMIT = "9223372036854771712"
VERSION_1 = {
    "/proc/self/cgroup": "5:cpu,cpuacct:/box\n4:memory:/box\n0::/",
    "/sys/fs/cgroup/memory/box/memory.limit_in_bytes": "300000",
    "/sys/fs/cgroup/memory/box/memory.usage_in_bytes": "200000",
    "/sys/fs/cgroup/memory/box/memory.stat": "active_file 1\ntotal_active_file 20000\ntotal_inactive_file 40000",
}
VERSION_2 = {
    "/proc/self/cgroup": "0::/user/box",
    "/sys/fs/cgroup/user/box/memory.max": "300000",
    "/sys/fs/cgroup/user/box/memory.current": "200000",
    "/sys/fs/cgroup/user/box/memory.stat": "anon 120000\nactive_file 20000\ninactive_file 40000\nshmem 20000",
}


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of a machine of 1,000 KiB, by path."""
    files = {"/proc/meminfo": MEMORY}
    monkeypatch.setattr(system_memory, "_read", files.get)
    return files


@pytest.mark.parametrize(
    ("more", "limit"),
    [
        (VERSION_2, 300000),
        (VERSION_1, 300000),
        (VERSION_2 | {"/sys/fs/cgroup/user/memory.max": "250000"}, 250000),
        ({"/proc/self/cgroup": "0::/host/box", "/sys/fs/cgroup/memory.max": "250000"}, 250000),
        (VERSION_2 | {"/sys/fs/cgroup/user/box/memory.max": "max"}, None),
        (VERSION_1 | {"/sys/fs/cgroup/memory/box/memory.limit_in_bytes": NO_LIMIT}, None),
        ({}, None),
    ],
    ids=["version 2", "version 1", "of the group above", "path of the host", "no limit", "version 1, none", "no group"],
)
def test_the_limit_of_the_control_groups(files: dict[str, str], more: dict[str, str], limit: int | None) -> None:
    files |= more
    assert system_memory.limit_bytes() == limit
    assert system_memory.usable_bytes() == (1024000 if limit is None else limit)


@pytest.mark.parametrize("group", [VERSION_1, VERSION_2], ids=["version 1", "version 2"])
def test_file_cache_of_a_control_group_is_free(files: dict[str, str], group: dict[str, str]) -> None:
    files |= group
    assert system_memory.available_bytes() == 300000 - 200000 + 60000


def test_the_group_with_least_room_decides(files: dict[str, str]) -> None:
    files |= VERSION_2 | {"/sys/fs/cgroup/user/memory.max": "500000", "/sys/fs/cgroup/user/memory.current": "450000"}
    assert system_memory.limit_bytes() == 300000
    assert system_memory.available_bytes() == 50000
    files["/sys/fs/cgroup/user/memory.current"] = "510000"  # over the limit while the kernel reclaims
    assert system_memory.available_bytes() == 0


def test_without_a_limit_free_memory_is_what_the_system_calls_available(files: dict[str, str]) -> None:
    assert system_memory.installed_bytes() == 1024000
    assert system_memory.available_bytes() == 614400
    files |= VERSION_2 | {"/sys/fs/cgroup/user/box/memory.max": "999999"}
    assert system_memory.available_bytes() == 614400  # less than the group has left


def test_a_system_that_does_not_tell_has_half_of_its_memory_free(files: dict[str, str]) -> None:
    files["/proc/meminfo"] = "MemTotal:       1000 kB"
    assert system_memory.available_bytes() == 512000


def test_this_machine_has_memory() -> None:
    assert 0 < system_memory.available_bytes() <= system_memory.usable_bytes() <= system_memory.installed_bytes()
