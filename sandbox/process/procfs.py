"""What /proc tells of another process: its mappings, its threads, its memory.

The process is untrusted, and so is all of this: counts are bounded, and a bad address is an error of the
kernel's (no bytes), not a fault.
"""

from __future__ import annotations

import bisect
import contextlib
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

_MAPS_MAX = 65_536  # the kernel's own default limit, vm.max_map_count, is 65530
_KILOBYTES = re.compile(r"^(Vm\w+|Rss\w+):\s+(\d+) kB$", re.MULTILINE)


class Map(NamedTuple):
    """One line of /proc/PID/maps; ``start``, ``end`` and ``offset`` are in bytes."""

    start: int
    end: int
    perms: str
    offset: int
    path: str


class SystemCall(NamedTuple):
    """Where a thread that waits in the kernel or is stopped has left user space."""

    number: int  # of its system call; -1: it is in none
    arguments: tuple[int, ...]
    sp: int
    pc: int


def read_text(path: str) -> str:
    """A file of /proc. Names in it are bytes that a process chose; lines end at a newline only."""
    with open(path, "rb", 0) as file:
        return file.read().decode("utf-8", "backslashreplace")


def read_maps(pid: int) -> list[Map]:
    """Parse /proc/PID/maps: address order, no overlaps (proc_pid_maps(5)). Bad lines are left out.

    Raises:
        OSError: /proc refuses (permissions), or the process is gone.
    """
    with open(f"/proc/{pid}/maps", "rb") as file:
        lines = file.read().split(b"\n", _MAPS_MAX)[:_MAPS_MAX]
    maps = []
    for line in lines:
        with contextlib.suppress(ValueError):
            span, perms, offset, _, _, *path = line.split(None, 5)
            start, end = span.split(b"-")
            name = path[0].decode("utf-8", "backslashreplace") if path else ""
            maps.append(Map(int(start, 16), int(end, 16), perms.decode(), int(offset, 16), name))
    return maps


def find_map(maps: list[Map], address: int) -> Map | None:
    """The mapping that holds an address."""
    at = bisect.bisect_right(maps, address, key=lambda m: m.start) - 1
    return maps[at] if at >= 0 and address < maps[at].end else None


def is_code(maps: list[Map], address: int) -> bool:
    """Whether an address lies in an executable mapping."""
    within = find_map(maps, address)
    return within is not None and "x" in within.perms


def threads(pid: int) -> list[int]:
    """Thread ids of a process, the main thread first."""
    return sorted(
        (int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()), key=lambda t: (t != pid, t)
    )


def states(pid: int) -> set[str]:
    """The states that the threads of a process are in: "R", "S", "T", ... (proc_pid_stat(5))."""
    found = set()
    for tid in threads(pid):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.add(stat_fields(f"{pid}/task/{tid}")[0])
    return found


def stat_fields(place: str) -> list[str]:
    """The fields of /proc/PLACE/stat from the third on. The second is a name that may hold anything."""
    return read_text(f"/proc/{place}/stat").rpartition(")")[2].split()


def current_calls(pid: int) -> dict[int, SystemCall | None]:
    """The system call that each thread is in, None while it runs; the main thread comes first.

    What ended meanwhile, or may not be looked at, is absent. This is what costs most of a capture: the kernel
    makes sure that each thread is off its processor, some 0.03 ms.
    """
    calls: dict[int, SystemCall | None] = {}
    for tid in threads(pid):
        with contextlib.suppress(OSError):
            # "running", "-1 SP PC", or "NUMBER six arguments SP PC"
            number, *rest = read_text(f"/proc/{pid}/task/{tid}/syscall").split()
            words = [int(each, 16) for each in rest]
            calls[tid] = SystemCall(int(number), tuple(words[:-2]), *words[-2:]) if words else None
    return calls


def sizes(pid: int) -> dict[str, int]:
    """The sizes of /proc/PID/status ("VmHWM" is the peak of "VmRSS"), in bytes; none of what has ended.

    Raises:
        OSError: /proc refuses, or the process is gone.
    """
    return {name: int(size) * 1024 for name, size in _KILOBYTES.findall(read_text(f"/proc/{pid}/status"))}


def blocked_signals(pid: int, tid: int) -> int:
    """Signals that a thread blocks: bit n - 1 for signal n.

    Raises:
        OSError: The thread is gone.
        ValueError: The kernel does not say.
    """
    for line in read_text(f"/proc/{pid}/task/{tid}/status").split("\n"):
        if line.startswith("SigBlk:"):
            return int(line.partition(":")[2], 16)
    raise ValueError("no SigBlk")


def read_at(mem: BinaryIO, address: int, size: int) -> bytes:
    """Up to ``size`` bytes of an open /proc/PID/mem; fewer, or none, where nothing is mapped."""
    try:
        mem.seek(address)
        return mem.read(size)
    except (OSError, ValueError, OverflowError):
        return b""
