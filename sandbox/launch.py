"""Start a cell's process. `spawn` is the seam for other ways to start one (a zygote)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crumplezone.reports.schema import Step
from crumplezone.sandbox.arena import Arena


@dataclass(eq=False)
class Lines:
    """The supervisor's ends of everything that connects it to one cell."""

    sock: socket.socket
    log: socket.socket
    fault_fd: int  # read end of the fault pipe
    parent_fd: int  # write end; closing it kills the cell
    stderr_fd: int
    arena: Arena

    def close(self) -> None:
        """Close every descriptor, once."""
        self.sock.close()
        self.log.close()
        self.arena.close()
        for name in ("fault_fd", "parent_fd", "stderr_fd"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)


_open_lines: weakref.WeakSet[Lines] = weakref.WeakSet()


def _close_in_fork() -> None:
    # A forked copy of the supervisor would keep the parent pipe open and the cells alive after its death.
    for lines in list(_open_lines):
        with contextlib.suppress(OSError):
            lines.close()


os.register_at_fork(after_in_child=_close_in_fork)


@dataclass
class Process:
    """A started cell: its process, the lines to it, and what the system refused on the way."""

    popen: subprocess.Popen[bytes]
    pidfd: int
    lines: Lines
    refused: list[Step] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """Process id; the cell also leads a process group of this id."""
        return self.popen.pid

    def signal(self, signum: int) -> None:
        """Signal the cell if it has not been reaped."""
        if self.popen.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                # Popen.send_signal would reap a dead leader, and its group could no longer be killed.
                signal.pidfd_send_signal(self.pidfd, signum)

    def kill(self) -> int:
        """SIGKILL the whole process group, reap the cell, and return its returncode."""
        if self.popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        return self.popen.wait()

    def close(self) -> None:
        """Release every descriptor. Call after the process is reaped."""
        self.lines.close()
        _open_lines.discard(self.lines)
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _fault_pipe() -> tuple[int, int, list[Step]]:
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


def import_path() -> str:
    """This process's import path as PYTHONPATH: what imports here must import in a child."""
    return os.pathsep.join(path or str(Path.cwd()) for path in sys.path)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": import_path(),
        "GGML_NO_BACKTRACE": "1",  # an abort would fork gdb and flood stderr
        "OPENBLAS_NUM_THREADS": "1",  # numpy's threads are not wanted in a cell
        "PYTHONUNBUFFERED": "1",
        **extra,
    }


def spawn(env: Mapping[str, str]) -> Process:
    """Start a child that runs `crumplezone.sandbox.child`.

    Raises:
        OSError: The process or one of its descriptors could not be made.
    """
    with contextlib.ExitStack() as child_ends, contextlib.ExitStack() as ours:
        sock, child_sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log, child_log = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (sock, log):
            ours.callback(each.close)
        for each in (child_sock, child_log):
            child_ends.callback(each.close)
        fault_read, fault_write, refused = _fault_pipe()
        parent_read, parent_write = os.pipe2(os.O_CLOEXEC)
        err_read, err_write = os.pipe2(os.O_CLOEXEC)
        arena = Arena()
        lines = Lines(sock, log, fault_read, parent_write, err_read, arena)
        ours.callback(lines.close)
        for fd in (fault_write, parent_read, err_write):
            child_ends.callback(os.close, fd)
        fds = (child_sock.fileno(), child_log.fileno(), fault_write, parent_read, arena.fd)
        popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "crumplezone.sandbox.child", *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=err_write,  # native code that prints must not write into the caller's output
            stderr=err_write,
            env=_environment(env),
            process_group=0,  # the terminal's ctrl-C is the supervisor's to handle
        )
        _open_lines.add(lines)
        process = Process(popen, os.pidfd_open(popen.pid), lines, refused)
        ours.pop_all()
        return process
