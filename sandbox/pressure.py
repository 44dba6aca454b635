"""Whether the kernel killed for memory: its counters, read before and after."""

from __future__ import annotations

import contextlib
from pathlib import Path

from crumplezone.sandbox.cgroup import folders

HOST = "/proc/vmstat oom_kill"


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
    """
    ours = [name for name in after if name != HOST] or [HOST]
    return next((name for name in ours if after.get(name, 0) > before.get(name, after.get(name, 0))), "")


def _counter(path: Path) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    raise ValueError(f"{path} has no oom_kill")
