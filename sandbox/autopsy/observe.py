"""What /proc says of a stopped process: memory, limits, and what each thread was doing."""

from __future__ import annotations

import contextlib
import platform
import re
from pathlib import PurePosixPath

from crumplezone.reports.records.report import Mapping, Thread
from crumplezone.sandbox.process.procfs import Map, SystemCall, find_map, read_text, threads

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
_LIMIT = re.compile(r"^(Max [a-z -]+?)\s{2,}(\S+)\s+\S+[ ]*(\S*)[ ]*$", re.MULTILINE)


def limits(pid: int) -> dict[str, str]:
    """The soft limits of /proc/PID/limits, with their units."""
    found = _LIMIT.findall(read_text(f"/proc/{pid}/limits"))
    return {name: soft if soft == "unlimited" else f"{soft} {unit}".strip() for name, soft, unit in found}


def thread_list(pid: int, calls: dict[int, SystemCall | None], maps: list[Map]) -> list[Thread]:
    """Every thread: its name, the system call it is in, and where in which module."""
    return [_thread(pid, tid, calls, maps) for tid in threads(pid)[:_THREADS_MAX]]


def records(maps: list[Map], build_ids: dict[str, str]) -> list[Mapping]:
    """Maps as a report keeps them."""
    return [
        Mapping(hex(m.start), hex(m.end), m.perms, hex(m.offset), m.path, build_ids.get(m.path, ""))
        for m in maps[:_MAPS_MAX]
    ]


def _thread(pid: int, tid: int, calls: dict[int, SystemCall | None], maps: list[Map]) -> Thread:
    name = ""
    with contextlib.suppress(OSError):  # it ended meanwhile
        name = read_text(f"/proc/{pid}/task/{tid}/comm").removesuffix("\n")
    if tid not in calls:
        return Thread(tid, name)
    call = calls[tid]
    if call is None:
        return Thread(tid, name, doing="running")
    known = _CALLS.get(platform.machine(), {})
    doing = "running" if call.number < 0 else known.get(call.number, f"system call {call.number}")
    return Thread(tid, name, doing=doing, pc=_place(call.pc, maps))


def _place(address: int, maps: list[Map]) -> str:
    within = find_map(maps, address)
    if within is None:
        return hex(address)
    return f"{PurePosixPath(within.path).name or 'anonymous'}+{address - within.start + within.offset:#x}"
