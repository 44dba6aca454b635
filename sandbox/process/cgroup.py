"""The cgroups of this process: what memory they leave, and whether the kernel killed for it (cgroups(7))."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

_MOUNT = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # version 1 says LONG_MAX in pages
HOST = "/proc/vmstat oom_kill"


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


def oom_kills() -> dict[str, int]:
    """How many processes the kernel has killed for memory, by counter.

    The counter of our own cgroup, or of what a container sees of it (`memory.events` in version 2,
    `memory.oom_control` in version 1), counts every OOM kill of a process in it; that of /proc/vmstat
    (Linux >= 4.13) counts those of the whole host. What cannot be read is absent.
    """
    found = {}
    for folder in folders("memory")[:1]:
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError, ValueError):
                found[name] = _counter(folder / name)
    with contextlib.suppress(OSError, ValueError):
        found[HOST] = _counter(Path("/proc/vmstat"))
    return found


def killed_for_memory(before: dict[str, int], after: dict[str, int]) -> str:
    """The counter that says that a process of ours was killed for memory, or an empty string.

    The host's counter is asked only where our cgroup has none: somebody else's process may have been killed.
    One that could be read at first, and not at last for want of a descriptor, tells nothing.
    """
    ours = [name for name in {**before, **after} if name != HOST] or [HOST]
    return next((name for name in ours if after.get(name, 0) > before.get(name, after.get(name, 0))), "")


def _counter(path: Path) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    raise ValueError(f"{path} has no oom_kill")
