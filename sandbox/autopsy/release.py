"""Let a held cell go on until it is parked, and read what faulthandler writes meanwhile.

The text is that of an untrusted process: bounded in size and time, and believed only where nothing else is
known.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import select
import signal
import time

from crumplezone.reports.records.report import Fault
from crumplezone.sandbox.process.process import Process
from crumplezone.sandbox.process.procfs import blocked_signals, current_calls

_DEADLINE = 3.0  # seconds in all
_QUIET = 0.5  # seconds without a word, where it cannot be seen that it is parked
_LOOK = 0.002  # seconds between looks
_TEXT_MAX = 64 * 1024
# As bits: all but SIGKILL and SIGSTOP, which cannot be blocked, and the two that glibc keeps for itself.
_PARKED = ~sum(1 << (n - 1) for n in (signal.SIGKILL, signal.SIGSTOP, 32, 33)) & 2**64 - 1
_PAUSE = {"x86_64": 34, "aarch64": 73}.get(platform.machine())  # syscalls(2); there it is made of ppoll()
# faulthandler.c, faulthandler_handlers. Of two threads that fault at once, both write the beginning.
_NAMES = {
    "Bus error": signal.SIGBUS,
    "Illegal instruction": signal.SIGILL,
    "Floating point exception": signal.SIGFPE,
    "Floating-point exception": signal.SIGFPE,  # since Python 3.13
    "Aborted": signal.SIGABRT,
    "Segmentation fault": signal.SIGSEGV,
}
_FATAL_ERROR = re.compile(rf"(?:Fatal Python error: )+({'|'.join(_NAMES)})")


def release(process: Process, tid: int | None) -> str:
    """Continue a held cell, and drain its fault pipe until the crashed thread is parked.

    Args:
        process: The cell, still alive afterwards unless it ended by itself.
        tid: The crashed thread, or None if it is not known.

    Returns:
        The first 64 KiB of what it wrote.
    """
    process.signal(signal.SIGCONT)
    fd, text = process.lines.fault_fd, b""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.register(process.pidfd, select.POLLIN)
    end = time.monotonic() + _DEADLINE
    quiet = time.monotonic() + _QUIET
    parked = False
    while len(text) < _TEXT_MAX and time.monotonic() < end:
        ready = dict(poller.poll(0 if parked else _LOOK * 1000))
        if fd in ready:
            data = os.read(fd, 65536)
            if not data:  # every writer has closed it
                poller.unregister(fd)
            text += data
            quiet = time.monotonic() + _QUIET
        elif parked or ready or time.monotonic() > quiet:
            break
        else:
            parked = tid is not None and _is_parked(process.pid, tid)
    return text[:_TEXT_MAX].decode("utf-8", "replace")


def parked(pid: int) -> bool:
    """Whether a thread waits to be killed: in pause(), with every signal blocked."""
    with contextlib.suppress(OSError):  # it has ended
        calls = current_calls(pid)
        return any(call and call.number == _PAUSE and _is_parked(pid, tid) for tid, call in calls.items())
    return False


def _is_parked(pid: int, tid: int) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return blocked_signals(pid, tid) & _PARKED == _PARKED
    return False


def named_fault(text: str) -> Fault | None:
    """The signal that faulthandler's text begins with."""
    found = _FATAL_ERROR.match(text)
    return Fault(_NAMES[found[1]], _NAMES[found[1]].name) if found else None
