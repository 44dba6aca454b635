"""What /proc tells of another process: its mappings, its threads, its memory.

The process is untrusted, and so is all of this: counts are bounded, and a bad address is an error of the
kernel's (no bytes), not a fault.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import BinaryIO, NamedTuple

_MAPS_MAX = 65_536  # the kernel's own default limit, vm.max_map_count, is 65530


class Map(NamedTuple):
    """One line of /proc/PID/maps; ``start``, ``end`` and ``offset`` are in bytes."""

    start: int
    end: int
    perms: str
    offset: int
    path: str


def read_maps(pid: int) -> list[Map]:
    """Parse /proc/PID/maps: address order, no overlaps (proc_pid_maps(5)).

    Raises:
        OSError: /proc refuses (permissions), or the process is gone.
    """
    maps = []
    with open(f"/proc/{pid}/maps", errors="replace") as lines:
        for line in itertools.islice(lines, _MAPS_MAX):
            span, perms, offset, _, _, *path = line.split(None, 5)
            start, end = span.split("-")
            maps.append(
                Map(
                    int(start, 16), int(end, 16), perms, int(offset, 16), path[0].rstrip("\n") if path else ""
                )
            )
    return maps


def find_map(maps: list[Map], address: int) -> Map | None:
    """The mapping that holds an address."""
    return next((m for m in maps if m.start <= address < m.end), None)


def is_code(maps: list[Map], address: int) -> bool:
    """Whether an address lies in an executable mapping."""
    within = find_map(maps, address)
    return within is not None and "x" in within.perms


def threads(pid: int) -> list[int]:
    """Thread ids of a process, the main thread first."""
    return sorted(
        (int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()), key=lambda t: (t != pid, t)
    )


def stack_pointer(pid: int, tid: int) -> int | None:
    """Stack pointer of a thread that waits in the kernel or is stopped; None while it runs."""
    # /proc/PID/task/TID/syscall ends in the stack pointer and the program counter, unless "running".
    fields = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()
    return int(fields[-2], 16) if len(fields) >= 3 else None


def read_at(mem: BinaryIO, address: int, size: int) -> bytes:
    """Up to ``size`` bytes of an open /proc/PID/mem; fewer, or none, where nothing is mapped."""
    try:
        mem.seek(address)
        return mem.read(size)
    except (OSError, ValueError, OverflowError):
        return b""
