"""A process that is ours: its descriptors, its end, its status."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from crumplezone.reports.records.report import Step
from crumplezone.sandbox.process.lines import Lines, close_fds, open_lines

POLL_MAX = 86400.0
"""Seconds of one poll: it takes no more milliseconds than an int holds."""


class Child(NamedTuple):
    """A process that was started, and how to reap it.

    Attributes:
        reap: Called once, when it has ended: its return code as in subprocess, or None if it cannot be had.
        leads: Whether it was made the leader of a process group, which then ends with it.
    """

    pid: int
    pidfd: int
    reap: Callable[[], int | None]
    leads: bool = True


@dataclass
class Process:
    """A started cell: its process, the lines to it, and what the system refused on the way.

    Attributes:
        pid: Process id.
        leads: As in `Child`.
        returncode: As in subprocess, once it is reaped; None if nobody can tell it any more.
    """

    pid: int
    pidfd: int
    reap: Callable[[], int | None]
    lines: Lines
    leads: bool = True
    refused: list[Step] = field(default_factory=list)
    returncode: int | None = None
    _reaped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waiting: threading.Lock = field(default_factory=threading.Lock)
    _unwanted: bool = False

    @property
    def ended(self) -> bool:
        """Whether it has come to its end, reaped or not."""
        return self._reaped or _wait(self.pidfd, 0)

    def signal(self, signum: int) -> None:
        """Signal the cell if it has not been reaped, or let go."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if not self._reaped and self.pidfd >= 0:
                # Popen.send_signal would reap a dead leader, and its group could no longer be killed.
                signal.pidfd_send_signal(self.pidfd, signum)

    def kill(self) -> int | None:
        """SIGKILL it, and its group if it leads one; reap it, and return its returncode. Idempotent."""
        if not self._reaped:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # Once anybody has reaped it, its id can be another group's: this then finds no process.
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                if self.leads:
                    os.killpg(self.pid, signal.SIGKILL)
            _wait(self.pidfd)
            self.returncode = self.reap()
            with self._lock:
                self._reaped = True
        return self.returncode

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody is inside `waited_for`: that is whom a signal handler has interrupted."""
        return self._waiting.locked()

    @contextlib.contextmanager
    def waited_for(self) -> Iterator[None]:
        """Wait at its descriptors: they are not closed meanwhile. Others could get their numbers."""
        try:
            with self._waiting:
                yield
        finally:
            if self._unwanted:
                self.close()

    def close(self) -> None:
        """Release every descriptor, or have who waits at them do so. Call after the process is reaped."""
        self._unwanted = True
        if self._waiting.acquire(blocking=False):
            try:
                self._release()
            finally:
                self._waiting.release()

    def _release(self) -> None:
        try:
            self.lines.close()
            open_lines.discard(self.lines)
        finally:
            close_fds(self, "pidfd")

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self._release()


def _wait(pidfd: int, timeout_ms: int | None = None) -> bool:
    """Whether a process has ended, within some time."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_ms))


@contextlib.contextmanager
def children_kept() -> Iterator[bool]:
    """Have the kernel keep how children ended; yields whether SIGCHLD was ignored, which forbids it.

    Only the main thread can change that: in others it stays as it is, and False is yielded.
    """
    ignored = signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
    if not ignored or threading.current_thread() is not threading.main_thread():
        yield False
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield True
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def reap_own(pidfd: int) -> int | None:
    """Reap a child of this process that has ended; its return code, or None if somebody else took it."""
    try:
        status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:  # SIGCHLD is ignored in this process, or another part of it waits for any child
        return None
    assert status is not None
    return returncode(status)


def returncode(status: os.waitid_result) -> int:
    """The return code of a process that has ended, as in subprocess."""
    return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
