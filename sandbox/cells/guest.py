"""A guest: a process that runs a program of its own. It answers nothing; it ends, or an incident ends it."""

from __future__ import annotations

import datetime as dt
import functools
import math
import os
import select
import signal
import time
import weakref
from collections.abc import Callable, Mapping
from enum import Enum, auto
from types import MappingProxyType

from crumplezone.errors import UsageError
from crumplezone.reports.records.report import Exit
from crumplezone.sandbox.autopsy import autopsy
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.autopsy.release import parked
from crumplezone.sandbox.host.threads import Task, apart
from crumplezone.sandbox.process.cgroup import oom_kills
from crumplezone.sandbox.process.drain import OutputTail, abandon, drained
from crumplezone.sandbox.process.process import POLL_MAX, Process

_LOOK = 1.0  # seconds between looks at a process that cannot call
_PHASE = "run"
_NO_ENV: Mapping[str, str] = MappingProxyType({})
# Which no program asks for itself. Others, such as SIGTERM, SIGINT and SIGPIPE, are how programs are ended.
_FATAL = {
    signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT,
    signal.SIGTRAP, signal.SIGSYS, signal.SIGKILL,
}  # fmt: skip


class _Event(Enum):
    CLOSED = auto()
    HELD = auto()
    ENDED = auto()


class _Events:
    """What happens to a process."""

    def __init__(self, process: Process, wake: int) -> None:
        self._process, self._wake = process, wake
        self._fault, self._pidfd = process.lines.fault_fd, process.pidfd
        self._can_call = True
        self._poller = select.poll()
        for fd in (wake, self._pidfd, self._fault):
            self._poller.register(fd, select.POLLIN)

    def next(self, seconds: float) -> _Event | None:
        """The next of them, or None if nothing has happened yet.

        Args:
            seconds: To wait at most, or a day; fewer if it closed its end of the fault pipe. A fault then
                parks it unheard, or another program (execve) has the lines by now: it is looked at now and
                then.
        """
        seconds = max(min(seconds, POLL_MAX if self._can_call else _LOOK), 0.0)
        ready = dict(self._poller.poll(seconds * 1000))
        if self._wake in ready:
            return _Event.CLOSED
        if ready.get(self._fault, 0) & select.POLLIN:
            return _Event.HELD
        if self._pidfd in ready:
            return _Event.ENDED
        if self._fault in ready:
            self._poller.unregister(self._fault)
            self._can_call = False
        elif not self._can_call:
            if parked(self._process.pid):
                return _Event.HELD
            self._poller.register(self._fault, select.POLLIN)
            self._can_call = True
        return None


class Guest:
    """A running program.

    Args:
        start: Starts its process, given ``env``.
        env: Added to its environment, as `start` understands that.
        memory_limit: Bytes of resident memory above which it is killed, or None.
        stderr: What it says, if somebody else reads that; None: the output end of its lines.

    Raises:
        OSError: No process, thread or descriptor could be had.
    """

    def __init__(
        self,
        start: Callable[[Mapping[str, str]], Process],
        *,
        env: Mapping[str, str] = _NO_ENV,
        memory_limit: int | None = None,
        stderr: OutputTail | None = None,
    ) -> None:
        self._owner = os.getpid()
        self._oom_kills = oom_kills()
        self._outcome: int | Incident | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)  # readable once another thread has closed this guest
        weakref.finalize(self, os.close, self._wake)
        self._process = start(env)
        self._drain = drained(self._process, memory_limit, stderr)
        self._closing = Task[None]()
        self._end = functools.partial(abandon, self._process, self._drain, self._owner)
        weakref.finalize(self, self._closing.begin, self._end, f"close-{self.pid}")

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def wait(self, timeout: float | None = None) -> int | Incident:
        """Wait until it ends, in the calling thread.

        Args:
            timeout: Seconds until it counts as hung, or None to wait for ever.

        Returns:
            Its return code, as in subprocess, if it exited or was asked to end (SIGTERM, SIGINT, ...).
            Else how it was lost: a fault, a fatal signal, its memory limit, the timeout, or native code that
            called exit().

        Raises:
            UsageError: It was closed, or let go, by another thread.
        """
        if self._outcome is not None:
            return self._outcome
        if self._closing.begun:
            raise UsageError("this guest is closed")
        events = _Events(self._process, self._wake)
        end = math.inf if timeout is None else time.monotonic() + timeout
        while (event := events.next(end - time.monotonic())) is None:
            if time.monotonic() >= end:
                return self._lost(condemned=(Exit.HANG, f"it had not ended after {timeout:g} s"))
        if event is _Event.CLOSED:
            raise UsageError("this guest was closed by another thread")
        return self._lost(held=True) if event is _Event.HELD else self._ended()

    def signal(self, signum: int) -> None:
        """Signal it, if it has not ended."""
        self._process.signal(signum)

    def close(self) -> None:
        """End it and release everything. Idempotent; if it is interrupted, it goes on by itself."""
        self._close(self._end)

    def leave(self) -> None:
        """Release everything, and let it run on. Idempotent, as `close`."""

        def release() -> None:
            try:
                self._drain.stop()
            finally:
                self._process.close()

        self._close(release)

    def _close(self, release: Callable[[], None]) -> None:
        if os.getpid() == self._owner:
            if not self._closing.begun:
                os.eventfd_write(self._wake, 1)
            self._closing.begin(release, f"close-{self.pid}")
            self._closing.result()

    def _ended(self) -> int | Incident:
        code = self._process.kill()  # nobody: this reaps it, and ends what is left of its group
        native_exit = code is not None and code >= 0 and self._process.lines.arena.native_exit()
        if code is None or -code in _FATAL or native_exit or self._drain.over_memory or self._drain.condemned:
            return self._lost()
        self._outcome = code
        self._closing.begin(self._end, f"close-{self.pid}")
        self._closing.result()
        return code

    def _lost(self, *, held: bool = False, condemned: tuple[Exit, str] | None = None) -> Incident:
        """Hand the process to the autopsy."""
        now = dt.datetime.now(dt.UTC)

        def hand_over() -> Incident:
            if not self._closing.take_over():
                raise UsageError("this guest was closed by another thread")
            why = condemned or self._drain.condemned
            death = autopsy.Death(self._process, self._drain, _PHASE, self._oom_kills, held, why)
            self._outcome = incident = Incident(_PHASE, now, autopsy.begin(death), [])
            return incident

        return apart(hand_over)
