"""A cell's process and the lines to it. `launch` makes the lines; who starts the process is its argument."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from crumplezone.reports.schema import Step
from crumplezone.sandbox.arena import Arena

POLL_MAX = 86400.0
"""Seconds of one poll: it takes no more milliseconds than an int holds."""


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


class Ends(NamedTuple):
    """The child's ends, in the order in which it is given them."""

    sock: int
    log: int
    fault: int
    parent: int
    arena: int
    output: int  # its stdout and stderr


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

    @property
    def ended(self) -> bool:
        """Whether it has come to its end, reaped or not."""
        return self._reaped or _wait(self.pidfd, 0)

    def signal(self, signum: int) -> None:
        """Signal the cell if it has not been reaped."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if not self._reaped:
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

    def close(self) -> None:
        """Release every descriptor. Call after the process is reaped."""
        self.lines.close()
        _open_lines.discard(self.lines)
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


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


class Starter:
    """Starts processes until it is stopped; one that is not ready by then is killed, and its start fails.

    Args:
        start: Starts one, given what is added to its environment.
    """

    def __init__(self, start: Callable[[Mapping[str, str]], Process]) -> None:
        self._start = start
        self._lock = threading.RLock()  # the collector may call `stop` in the middle of anything
        self._starting: Process | None = None
        self._stopped = False

    def __call__(self, env: Mapping[str, str]) -> Process:
        """Start one."""
        process = self._start(env)
        with self._lock:
            self._starting = process
            if self._stopped:
                process.signal(signal.SIGKILL)
        return process

    def ready(self) -> None:
        """The latest one is ready: `stop` leaves it alone."""
        with self._lock:
            self._starting = None

    def stop(self) -> None:
        """Start no more. Idempotent, and thread-safe."""
        with self._lock:
            self._stopped = True
            if self._starting:
                self._starting.signal(signal.SIGKILL)


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


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a cell."""
    # A thread that waits for another spins so often before it sleeps; libgomp's 300,000 times are 3 ms. Where
    # something else computes as well, most of a decode's thousand waits last that long (docs/performance.md).
    spins = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": "2000"}
    return {
        **spins,
        **os.environ,
        "PYTHONPATH": import_path(),
        "GGML_NO_BACKTRACE": "1",  # an abort would fork gdb and flood stderr
        "OPENBLAS_NUM_THREADS": "1",  # numpy's threads are not wanted in a cell
        "PYTHONUNBUFFERED": "1",
        **extra,
    }


@contextlib.contextmanager
def stdio_taken() -> Iterator[None]:
    """Have no descriptor made in here be 0, 1 or 2, in a process that has closed some of these.

    A child's stdio would overwrite them, and whoever prints in this process would write into them.
    """
    with contextlib.ExitStack() as taken:
        while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
            taken.callback(os.close, fd)
        os.close(fd)
        yield


def launch(start: Callable[[Ends], Child]) -> Process:
    """Make the lines to a new process, and have it started with its ends of them.

    Args:
        start: Starts it. The ends are closed here when it returns; what it raises closes everything.

    Raises:
        OSError: The process or one of its descriptors could not be made.
    """
    with stdio_taken(), contextlib.ExitStack() as child_ends, contextlib.ExitStack() as ours:
        # Each is registered before the next is made: there may be no descriptor left for that.
        sock, child_sock = _sockets(ours, child_ends)
        log, child_log = _sockets(ours, child_ends)
        fault_read, fault_write, refused = _fault_pipe()
        ours.callback(os.close, fault_read)
        child_ends.callback(os.close, fault_write)
        parent_read, parent_write = os.pipe2(os.O_CLOEXEC)
        ours.callback(os.close, parent_write)
        child_ends.callback(os.close, parent_read)
        err_read, err_write = os.pipe2(os.O_CLOEXEC)
        ours.callback(os.close, err_read)
        child_ends.callback(os.close, err_write)
        arena = Arena()
        ours.callback(arena.close)
        ends = Ends(child_sock.fileno(), child_log.fileno(), fault_write, parent_read, arena.fd, err_write)
        child = start(ends)
        lines = Lines(sock, log, fault_read, parent_write, err_read, arena)
        _open_lines.add(lines)
        ours.pop_all()
        return Process(child.pid, child.pidfd, child.reap, lines, child.leads, refused)


def _sockets(
    ours: contextlib.ExitStack, child_ends: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.callback(pair[0].close)
    child_ends.callback(pair[1].close)
    return pair


def spawn(env: Mapping[str, str]) -> Process:
    """Start a new interpreter that runs `crumplezone.sandbox.child`.

    Args:
        env: Added to its environment.

    Raises:
        OSError: The process or one of its descriptors could not be made.
    """
    return launch(functools.partial(_execute, env))


def _execute(env: Mapping[str, str], ends: Ends) -> Child:
    *fds, output = ends
    popen = subprocess.Popen(
        [sys.executable, "-P", "-m", "crumplezone.sandbox.child", *map(str, fds)],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=output,  # native code that prints must not write into the caller's output
        stderr=output,
        env=environment(env),
        process_group=0,  # the terminal's ctrl-C is the supervisor's to handle
    )
    return child_of(popen)


def child_of(popen: subprocess.Popen[bytes], *, leads: bool = True) -> Child:
    """A process that was just started, from now on in other hands than Popen's.

    Args:
        popen: Its handle.
        leads: As in `Child`.

    Raises:
        OSError: There is no descriptor left; it has been ended.
    """
    try:
        pidfd = os.pidfd_open(popen.pid)
    except BaseException:
        popen.kill()
        popen.wait()
        raise

    def reap() -> int | None:
        code = reap_own(pidfd)
        popen.returncode = code or 0  # Popen must not wait for it again
        return code

    return Child(popen.pid, pidfd, reap, leads)
