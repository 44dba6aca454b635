"""What /proc says of a stopped process: memory, limits, and what each thread was doing."""

from __future__ import annotations

import platform
import re
from pathlib import Path, PurePosixPath

from crumplezone.reports.schema import Mapping, Thread
from crumplezone.sandbox.procfs import Map, find_map, threads

_MAPS_MAX = 4096
_THREADS_MAX = 1024
# The calls that a thread of llama.cpp or CPython is found in; others keep their number (syscalls(2)).
_CALLS = {
    "x86_64": {
        0: "read", 1: "write", 7: "poll", 9: "mmap", 16: "ioctl", 23: "select", 24: "sched_yield",
        34: "pause", 35: "nanosleep", 45: "recvfrom", 47: "recvmsg", 61: "wait4", 202: "futex",
        230: "clock_nanosleep", 232: "epoll_wait", 247: "waitid", 257: "openat", 270: "pselect6",
        271: "ppoll", 281: "epoll_pwait",
    },
    "aarch64": {
        22: "epoll_pwait", 29: "ioctl", 56: "openat", 63: "read", 64: "write", 72: "pselect6", 73: "ppoll",
        95: "waitid", 98: "futex", 101: "nanosleep", 115: "clock_nanosleep", 124: "sched_yield",
        207: "recvfrom", 212: "recvmsg", 222: "mmap", 260: "wait4",
    },
}  # fmt: skip
_KILOBYTES = re.compile(r"^(Vm\w+|Rss\w+):\s+(\d+) kB$", re.MULTILINE)
_LIMIT = re.compile(r"^(Max [a-z -]+?)\s{2,}(\S+)\s+\S+[ ]*(\S*)[ ]*$", re.MULTILINE)


def memory(pid: int) -> dict[str, int]:
    """The sizes of /proc/PID/status ("VmHWM" is the peak of "VmRSS"), in bytes."""
    status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    return {name: int(size) * 1024 for name, size in _KILOBYTES.findall(status)}


def limits(pid: int) -> dict[str, str]:
    """The soft limits of /proc/PID/limits, with their units."""
    found = _LIMIT.findall(Path(f"/proc/{pid}/limits").read_text(errors="replace"))
    return {name: soft if soft == "unlimited" else f"{soft} {unit}".strip() for name, soft, unit in found}


def thread_list(pid: int, maps: list[Map]) -> list[Thread]:
    """Every thread: its name, the system call it is in, and where in which module."""
    return [_thread(pid, tid, maps) for tid in threads(pid)[:_THREADS_MAX]]


def records(maps: list[Map], build_ids: dict[str, str]) -> list[Mapping]:
    """Maps as a report keeps them."""
    return [
        Mapping(hex(m.start), hex(m.end), m.perms, hex(m.offset), m.path, build_ids.get(m.path, ""))
        for m in maps[:_MAPS_MAX]
    ]


def _thread(pid: int, tid: int, maps: list[Map]) -> Thread:
    task = Path(f"/proc/{pid}/task/{tid}")
    try:
        name = (task / "comm").read_text(errors="replace").strip()
        fields = (task / "syscall").read_text().split()  # "NUMBER args... sp pc", "-1 sp pc" or "running"
    except OSError:  # it ended meanwhile, or may not be looked at
        return Thread(tid)
    if fields[0] in {"running", "-1"}:
        doing = "running"
    else:
        doing = _CALLS.get(platform.machine(), {}).get(int(fields[0]), f"system call {fields[0]}")
    return Thread(tid, name, doing=doing, pc=_place(int(fields[-1], 16), maps) if fields[1:] else "")


def _place(address: int, maps: list[Map]) -> str:
    within = find_map(maps, address)
    if within is None:
        return hex(address)
    return f"{PurePosixPath(within.path).name or 'anonymous'}+{address - within.start + within.offset:#x}"
