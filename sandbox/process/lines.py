"""The lines between a supervisor and a process: sockets, pipes, the arena."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from crumplezone.reports.records.report import Step
from crumplezone.sandbox.ipc.arena import Arena


@dataclass(eq=False)
class Lines:
    """The supervisor's ends of everything that connects it to one cell."""

    sock: socket.socket
    log: socket.socket
    fault_fd: int  # read end of the fault pipe
    parent_fd: int  # write end; closing it kills the cell
    stderr_fd: int
    arena: Arena

    def silence(self) -> None:
        """Close what nothing more is to be heard or had of; what was mapped of the arena stays.

        Not the socket: at its end, a process that goes on for a moment would exit.
        """
        self.log.close()
        self.arena.close()
        close_fds(self, "stderr_fd")

    def close(self) -> None:
        """Close every descriptor, once."""
        self.silence()
        self.sock.close()
        close_fds(self, "fault_fd", "parent_fd")


def close_fds(owner: object, *names: str) -> None:
    """Close the descriptors in these attributes, once: they are -1 then."""
    for name in names:
        fd = getattr(owner, name)
        setattr(owner, name, -1)
        if fd >= 0:
            os.close(fd)


open_lines: weakref.WeakSet[Lines | contextlib.ExitStack] = weakref.WeakSet()
"""What a fork of this process closes: a copy of the parent pipe would keep cells alive after our death."""

_PATIENCE = 1.0  # seconds: whoever cannot have the lock goes on without, a deadlock would be worse
_making = threading.RLock()  # the handler of a signal may fork in the middle of anything


@contextlib.contextmanager
def forks_wait() -> Iterator[None]:
    """Have no other thread fork this process (os.fork, multiprocessing) in here: be short, it has to wait.

    So no fork has a copy of what is made in here and entered into `open_lines`. Nor of the pipe that
    `subprocess.Popen` reads to its end: a start would last as long as the fork lives that has it open.
    """
    lock = _making
    try:
        lock.acquire(timeout=_PATIENCE)
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # it is not ours
            lock.release()


def _before_fork() -> None:
    _making.acquire(timeout=_PATIENCE)


def _forked() -> None:
    with contextlib.suppress(RuntimeError):  # likewise
        _making.release()


def _close_in_fork() -> None:
    global _making
    _making = threading.RLock()  # the thread that held it may not be here to release it
    for lines in list(open_lines):
        with contextlib.suppress(OSError):
            lines.close()


os.register_at_fork(before=_before_fork, after_in_parent=_forked, after_in_child=_close_in_fork)


class Ends(NamedTuple):
    """The child's ends, in the order in which it is given them."""

    sock: int
    log: int
    fault: int
    parent: int
    arena: int
    output: int  # its stdout and stderr


def fault_pipe() -> tuple[int, int, list[Step]]:
    """A pipe that holds its writer at the second write, or else one that only carries faulthandler's text."""
    try:
        # A packet pipe gives each write() a slot of its own; one page is one slot (pipe(2), O_DIRECT).
        read, write = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        read, write = os.pipe2(os.O_CLOEXEC)
        remedy = "a kernel and a seccomp profile that allow pipe2 with O_DIRECT (Linux >= 3.4)"
        return read, write, [Step("hold (packet pipe)", False, detail=str(error), remedy=remedy)]
    try:
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    except OSError as error:
        remedy = "a seccomp profile that allows fcntl with F_SETPIPE_SZ"
        return read, write, [Step("hold (one slot)", False, detail=str(error), remedy=remedy)]
    return read, write, []


def socket_pair(
    ours: contextlib.ExitStack, child_ends: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    """Ours and the child's, each closed by a stack of its own."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.callback(pair[0].close)
    child_ends.callback(pair[1].close)
    return pair
