"""Child side: arm a Python that runs a program of its own, and each fork of it.

Loaded by `startup/sitecustomize.py`, in any Python from 3.10 on, so this, `arm` and `exit_marks` import
nothing but its library. A process asks its supervisor for its lines, over an abstract socket that its
environment names.
"""

from __future__ import annotations

import atexit
import faulthandler
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from crumplezone.sandbox.child.arm import die_with, hold_on_fault, stand_down
from crumplezone.sandbox.ipc.exit_marks import ExitMarks

VARIABLE = "CRUMPLEZONE_EXEC"
HELLO = struct.Struct("=ii")
"""What comes with the lines: the supervisor's process id, and how many lines there are.

One that gets three is the program itself: fault pipe, arena, parent pipe. Its forks and children get the
first two: they may outlive their supervisor, and die of their true signal, which their parent will see.
"""
LINES_MAX = 3

_HIGH = 500
_PATIENCE = 10.0  # seconds for a supervisor to answer that has a hundred others to start


class _Armed:
    """What armed this process."""

    def __init__(self, address: str) -> None:
        self._address = address  # the program may change its environment
        lines = _ask(address)
        self._lines: _ProgramLines | None = lines
        self._marks = ExitMarks(lines.arena)
        lines.hold()

    def again(self) -> None:
        """In a fork: its lines are those of its parent, and its supervisor would take it for that."""
        if self._lines:
            self._lines.close()
        try:
            self._lines = lines = _ask(self._address)
            self._marks.move(lines.arena)
            lines.hold()
        except OSError:  # the supervisor has ended, or can have no more
            self._lines = None
            stand_down()

    def end(self) -> None:
        """The interpreter ends. What crashes after it, in destructors of libraries, shall not be parked."""
        if self._lines:
            self._marks.finished()
            hold_on_fault(self._lines.fault, self._lines.supervisor, park=False)


class _ProgramLines(NamedTuple):
    supervisor: int  # its process id
    fault: int
    arena: int
    parent: int | None = None

    def hold(self) -> None:
        hold_on_fault(self.fault, self.supervisor, park=self.parent is not None)
        if self.parent is not None:
            die_with(self.parent)

    def close(self) -> None:
        for fd in self[1:]:
            if fd is not None:
                os.close(fd)


def begin() -> None:
    """Arm this process, unless it is not under `crumplezone exec` or its supervisor has ended.

    Raises:
        OSError: The supervisor refused, or something else did.
    """
    address = os.environ.get(VARIABLE)
    if not address:
        return
    try:
        armed = _Armed(address)
    except ConnectionRefusedError:  # its supervisor has ended
        return
    # pytest would have faulthandler write to stderr, and so would nothing be held; its text is in the report.
    faulthandler.enable = _nothing(faulthandler.enable)
    faulthandler.disable = _nothing(faulthandler.disable)
    os.register_at_fork(after_in_child=armed.again)
    atexit.register(armed.end)  # the first to be registered is the last to be called


def _ask(address: str) -> _ProgramLines:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(_PATIENCE)
        sock.connect(f"\0{address}")
        hello, fds, _, _ = socket.recv_fds(sock, HELLO.size, LINES_MAX, socket.MSG_CMSG_CLOEXEC)
    if not hello:
        raise OSError("the supervisor has no process, thread or descriptor left for another guest")
    supervisor, count = HELLO.unpack(hello)
    if len(fds) != count:
        raise OSError("this process has no descriptor left")
    return _ProgramLines(supervisor, *map(_out_of_the_way, fds))


def _out_of_the_way(fd: int) -> int:
    """Give it a high number: the next free one is what it would be without us."""
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    except OSError:  # a limit is lower (RLIMIT_NOFILE)
        return fd
    os.close(fd)
    return high


def _nothing(replaced: Callable[..., Any]) -> Callable[..., None]:
    @wraps(replaced)
    def nothing(*_arguments: Any, **_keywords: Any) -> None:
        """Do nothing, as `crumplezone exec` needs faulthandler for itself."""

    return nothing
