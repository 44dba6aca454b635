"""A cell's process and the lines to it. `launch` makes the lines; who starts the process is its argument."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from crumplezone.sandbox.host.scarcity import too_large
from crumplezone.sandbox.host.surroundings import Surroundings
from crumplezone.sandbox.host.unpatched import refuse_patched
from crumplezone.sandbox.ipc.arena import Arena
from crumplezone.sandbox.process.lines import Ends, Lines, fault_pipe, forks_wait, open_lines, socket_pair
from crumplezone.sandbox.process.process import Child, Process, reap_own

Launcher = Callable[[Surroundings], Process]
"""Starts a process, somewhere."""


class Starter:
    """Starts processes until it is stopped; one that is not ready by then is killed, and its start fails.

    Args:
        start: Starts one.
    """

    def __init__(self, start: Launcher) -> None:
        self._start = start
        self._lock = threading.RLock()  # the collector may call `stop` in the middle of anything
        self._starting: dict[int, Process] = {}  # of each thread the latest
        self._stopped = False

    def __call__(self, surroundings: Surroundings) -> Process:
        """Start one."""
        process = self._start(surroundings)
        with self._lock:
            self._starting[threading.get_ident()] = process
            if self._stopped:
                process.signal(signal.SIGKILL)
        return process

    def ready(self) -> None:
        """The latest one of this thread is ready, or has failed: `stop` leaves it alone."""
        with self._lock:
            self._starting.pop(threading.get_ident(), None)

    def stop(self) -> None:
        """Start no more. Idempotent, and thread-safe."""
        with self._lock:
            self._stopped = True
            for process in self._starting.values():
                process.signal(signal.SIGKILL)


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
    refuse_patched()  # since its owner was made
    with stdio_taken(), contextlib.ExitStack() as child_ends, contextlib.ExitStack() as ours:
        with forks_wait():
            open_lines.update((child_ends, ours))
            # Each is registered before the next is made: there may be no descriptor left for that.
            sock, child_sock = socket_pair(ours, child_ends)
            log, child_log = socket_pair(ours, child_ends)
            fault_read, fault_write, refused = fault_pipe()
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
        open_lines.add(lines)
        ours.pop_all()
        return Process(child.pid, child.pidfd, child.reap, lines, child.leads, refused)


def spawn(surroundings: Surroundings) -> Process:
    """Start a new interpreter that runs `crumplezone.sandbox.child.loop`.

    Args:
        surroundings: Its Python, its environment.

    Raises:
        OSError: The process or one of its descriptors could not be made.
    """
    return launch(functools.partial(_execute, surroundings))


def _execute(surroundings: Surroundings, ends: Ends) -> Child:
    *fds, output = ends
    popen = run_python(
        surroundings,
        ["-m", "crumplezone.sandbox.child.loop", *map(str, fds)],
        surroundings.of_cell,
        pass_fds=fds,
        stdout=output,  # native code that prints must not write into the caller's output
        stderr=output,
        process_group=0,  # the terminal's ctrl-C is the supervisor's to handle
    )
    return child_of(popen)


def run_python(
    surroundings: Surroundings, arguments: Sequence[str], env: Mapping[str, str], **options: Any
) -> subprocess.Popen[bytes]:
    """Start this Python once more.

    Args:
        surroundings: Where.
        arguments: Behind those that hold for each.
        env: Of the two environments in there.
        options: Of `subprocess.Popen`.

    Raises:
        OSError: No process or descriptor could be had.
    """
    # A directory that is gone, or that may be used but not be entered (after a setuid), is inherited.
    directory = surroundings.directory if os.access(surroundings.directory, os.X_OK) else None
    command = [surroundings.python, "-P", *arguments]
    try:
        with forks_wait():
            return subprocess.Popen(command, cwd=directory, stdin=subprocess.DEVNULL, env=env, **options)
    except OSError as error:
        if error.errno == errno.E2BIG:
            raise too_large(env) from error
        raise


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
