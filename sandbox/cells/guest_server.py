"""Where the Pythons of a program ask for their lines: the program itself, its forks and its children.

Each process has lines of its own, so each crash is held and examined by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from functools import partial

from crumplezone.errors import UsageError
from crumplezone.reports.records.report import Step
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.guest import Guest
from crumplezone.sandbox.child.exec_hook import HELLO
from crumplezone.sandbox.process.drain import OutputTail
from crumplezone.sandbox.process.launch import launch
from crumplezone.sandbox.process.lines import Ends
from crumplezone.sandbox.process.process import Child, Process
from crumplezone.sandbox.process.procfs import read_text

_BACKLOG = 128
_UNARMED = Step(
    "arming",
    ok=False,
    detail="no Python in this process asked for its lines, so nothing could be held",
    remedy="a Python from 3.10 on, without the options -I, -E and -S, which ignore PYTHONPATH",
)
_CREDENTIALS = struct.Struct("=iii")  # struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)
# linux/pidfd.h, since Linux 6.15: struct pidfd_info begins with its mask, and the exit code is at 60.
_PIDFD_GET_INFO, _PIDFD_INFO_SIZE, _PIDFD_INFO_EXIT, _EXIT_CODE_AT = 0xC040FF0B, 64, 8, 60
_STAT_STATE, _STAT_EXIT_CODE = 0, 49  # of /proc/PID/stat, behind the name (proc_pid_stat(5))


class GuestServer:
    """Listens for Pythons.

    Args:
        lost: Called with process id and incident of each child that was lost, on a thread of its own.
        memory_limit: Of every guest, as for `Guest`.
        stderr: What all of them say.
    """

    def __init__(
        self, lost: Callable[[int, Incident], None], memory_limit: int | None, stderr: OutputTail
    ) -> None:
        self._lost, self._limit, self._stderr = lost, memory_limit, stderr
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # An abstract one leaves no file behind, and is within reach wherever the program goes to.
        self.address = f"crumplezone-{os.getpid()}-{secrets.token_hex(8)}"
        self._sock.bind(f"\0{self.address}")
        self._sock.listen(_BACKLOG)
        self._thread = threading.Thread(target=self._serve, name="guests", daemon=True)
        self._lock = threading.Lock()
        self._guests: dict[Guest, threading.Thread] = {}
        self._program: Process | None = None
        self._writer = contextlib.ExitStack()  # of the program's fault pipe, until the program has asked

    def expect(self, program: Process) -> None:
        """The program itself. It may ask for its lines again and again, as another program (execve)."""
        self._program = program
        program.refused.append(_UNARMED)
        self._writer.callback(os.close, _writer(program))

    def open(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def end(self) -> None:
        """End the children that still run."""
        for guest in self._present():
            guest.close()

    def close(self) -> None:
        """Wait until all that was lost is told, and let go of the children that still run. Idempotent."""
        with contextlib.ExitStack() as stack:  # from the last: each is done, whatever the others raise
            stack.callback(self._writer.close)
            stack.callback(self._leave)
            stack.callback(self._sock.close)
            if self._thread.ident:
                stack.callback(self._thread.join)
            with contextlib.suppress(OSError):  # it is closed
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes `accept`; closing would not

    def _leave(self) -> None:
        with contextlib.ExitStack() as stack:
            for guest, thread in self._present().items():
                stack.callback(thread.join)
                stack.callback(guest.leave)

    def _present(self) -> dict[Guest, threading.Thread]:
        with self._lock:
            return dict(self._guests)

    def _serve(self) -> None:
        while True:
            try:
                conn, _ = self._sock.accept()
            except OSError:
                return
            with conn, contextlib.suppress(OSError, RuntimeError):  # that one goes on unarmed, and says so
                self._admit(conn)

    def _admit(self, conn: socket.socket) -> None:
        size = _CREDENTIALS.size
        pid, uid, _ = _CREDENTIALS.unpack(conn.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if uid != os.getuid():
            return
        if self._program and pid == self._program.pid:
            self._arm(conn, self._program)
            return
        guest = Guest(partial(_begin, conn, pid), memory_limit=self._limit, stderr=self._stderr)
        thread = threading.Thread(target=self._watch, args=(guest,), name=f"guest-{pid}", daemon=True)
        with self._lock:
            self._guests[guest] = thread
        try:
            thread.start()
        except RuntimeError:
            self._forget(guest)
            guest.leave()
            raise

    def _arm(self, conn: socket.socket, program: Process) -> None:
        lines = program.lines
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, writer := _writer(program))
            parent = os.open(f"/proc/self/fd/{lines.parent_fd}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, parent)
            _hand_over(conn, [writer, lines.arena.fd, parent])
        self._writer.close()
        with contextlib.suppress(ValueError):
            program.refused.remove(_UNARMED)

    def _watch(self, guest: Guest) -> None:
        with contextlib.suppress(UsageError):  # let go
            outcome = guest.wait()
            if isinstance(outcome, Incident):
                self._lost(guest.pid, outcome)
        self._forget(guest)

    def _forget(self, guest: Guest) -> None:
        with self._lock:
            self._guests.pop(guest, None)


def _writer(program: Process) -> int:
    """Another write end of its fault pipe, of packets like the first."""
    fd = os.open(f"/proc/self/fd/{program.lines.fault_fd}", os.O_WRONLY | os.O_CLOEXEC)
    # O_DIRECT makes them (pipe(2)); open(2) refuses that of a pipe, fcntl(2) does not (Linux, fs/fcntl.c).
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
    return fd


def _begin(conn: socket.socket, pid: int, _: Mapping[str, str]) -> Process:
    return launch(partial(_adopt, conn, pid))


def _hand_over(conn: socket.socket, fds: list[int]) -> None:
    socket.send_fds(conn, [HELLO.pack(os.getpid(), len(fds))], fds, socket.MSG_NOSIGNAL)


def _adopt(conn: socket.socket, pid: int, ends: Ends) -> Child:
    """A process that has started itself. It waits for an answer, so this is its process id."""
    pidfd = os.pidfd_open(pid)
    try:
        _hand_over(conn, [ends.fault, ends.arena])
    except BaseException:
        os.close(pidfd)
        raise
    return Child(pid, pidfd, partial(_status, pid, pidfd), leads=False)


def _status(pid: int, pidfd: int) -> int | None:
    """How a process ended that is somebody else's child, or None if the kernel does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
        if fields[_STAT_STATE] in {"Z", "X"}:
            return os.waitstatus_to_exitcode(int(fields[_STAT_EXIT_CODE]))
    info = bytearray(_PIDFD_INFO_EXIT.to_bytes(8, "little").ljust(_PIDFD_INFO_SIZE, b"\0"))
    with contextlib.suppress(OSError, ValueError):  # its parent has reaped it
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        if info[0] & _PIDFD_INFO_EXIT:
            return os.waitstatus_to_exitcode(int.from_bytes(info[_EXIT_CODE_AT:], "little"))
    return None
