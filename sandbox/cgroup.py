"""The cgroups of this process, and the memory that they and the machine leave to it (cgroups(7))."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

_MOUNT = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # version 1 says LONG_MAX in pages


def available_memory() -> int:
    """Bytes that may still be allocated, by the machine and by the cgroups of this process."""
    return min([psutil.virtual_memory().available, *(left for left, _, _ in memory_limits())])


def memory_limits() -> Iterator[tuple[int, int, Path]]:
    """Bytes left, the limit, and the folder of each cgroup of this process that has such a limit."""
    for folder in folders("memory"):
        limit = number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < _UNLIMITED:
            yield max(limit - used + _reclaimable(folder), 0), limit, folder


def folders(controller: str) -> list[Path]:
    """The cgroup of this process and those above it, as far as they are visible."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups = dict(line.split(":", 2)[1:] for line in lines)
    base, own = _MOUNT, groups.get("")  # version 2
    for controllers, path in groups.items():
        if controller in controllers.split(","):  # version 1
            base, own = _MOUNT / controller, path
    place = PurePosixPath(own or "/")
    found = [base / str(each).lstrip("/") for each in (place, *place.parents)]
    return [folder for folder in found if folder.is_dir()]


def number(*paths: Path) -> int | None:
    """What the first of these files says; None if there is none, or if it says "max"."""
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text())
    return None


def _reclaimable(folder: Path) -> int:
    """Bytes of the page cache that count as used but are given back under pressure, as the kubelet counts."""
    with contextlib.suppress(OSError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in {"inactive_file", "total_inactive_file"} and value.isdigit():
                return int(value)
    return 0
