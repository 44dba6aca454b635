"""Child side: a zygote. It has loaded what all cells need, and forks them; it never computes.

After the fork of a process with several threads, locks that the others held stay locked for ever, and OpenMP
waits for a team that is not there. So only a process with a single thread forks (fork(2), pthread_atfork(3)).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import traceback
from pathlib import Path
from typing import Annotated, Any

import msgspec

from crumplezone.sandbox.child.loop import ForkedChild, Room, find
from crumplezone.sandbox.process.lines import Ends
from crumplezone.sandbox.process.process import returncode

TARGET = f"{__name__}:ForkServer"


class ForkServerConfig(msgspec.Struct, frozen=True):
    """What to load.

    Attributes:
        seed: ``"package.module:callable"``, called with the config and the room. What it returns is given to
            the target of every cell; its ``info()`` describes it.
        config: Given to the seed.
    """

    seed: str
    config: msgspec.Raw


class Fork(msgspec.Struct, tag="fork", frozen=True):
    """Fork a cell; its ends of the lines follow in a packet of their own.

    Attributes:
        env: Variables that differ from the zygote's environment.
        unset: Variables that only the zygote has.
    """

    env: dict[bytes, bytes]
    unset: list[bytes]


class Forked(msgspec.Struct, frozen=True):
    """The cell's process id (PID_MAX_LIMIT: proc_sys_kernel(5))."""

    pid: Annotated[int, msgspec.Meta(gt=0, le=2**22)]


class Reap(msgspec.Struct, tag="reap", frozen=True):
    """Reap a cell that has ended. None is reaped before: its process id must stay its own until then."""

    pid: int


class Reaped(msgspec.Struct, frozen=True):
    """Its return code as in subprocess; None: there is no such child, or it has not ended."""

    returncode: Annotated[int, msgspec.Meta(ge=-64, le=255)] | None


class UnforkableError(Exception):
    """What was loaded does not survive a fork."""


class ForkServer:
    """The service of a zygote.

    Args:
        config: An encoded `ForkServerConfig`.
        room: The zygote's.
    """

    request_type: Any = Fork | Reap

    def __init__(self, config: msgspec.Raw, room: Room, _: None = None) -> None:
        asked = msgspec.msgpack.decode(config, type=ForkServerConfig)
        self._sock = room.sock
        self._preloaded = find(asked.seed)(asked.config, room)
        # The collector writes into what it looks at: a cell would get a copy of every page.
        gc.collect()
        gc.freeze()

    def info(self) -> msgspec.Struct:
        """What was loaded."""
        described: msgspec.Struct = self._preloaded.info()
        return described

    def handle(self, request: Fork | Reap) -> Forked | Reaped:
        """Answer one request."""
        return self._fork(request) if isinstance(request, Fork) else _reap(request.pid)

    def _fork(self, request: Fork) -> Forked:
        _, fds, _, _ = socket.recv_fds(self._sock, 16, len(Ends._fields), socket.MSG_CMSG_CLOEXEC)
        pid = -1
        try:
            ends = Ends(*fds)
            if (n_threads := len(list(Path("/proc/self/task").iterdir()))) > 1:
                raise UnforkableError(f"{n_threads} threads run in the zygote")
            if (pid := os.fork()) == 0:
                _settle(ends, request)
                raise ForkedChild(ends[:-1], self._preloaded)
            os.setpgid(pid, pid)  # both do so: it is a group before anybody hears of it, and before it works
            return Forked(pid)
        finally:
            for fd in fds if pid else ():
                os.close(fd)


def _settle(ends: Ends, request: Fork) -> None:
    """In the child: give up all that is the zygote's, but its memory."""
    try:
        os.setpgid(0, 0)
        # When the zygote ends, this group is orphaned. To one that is stopped, to be looked at, the kernel
        # sends SIGHUP and SIGCONT then (setpgid(2)). It stays held all the same: it waits to write.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.dup2(ends.output, 1)
        os.dup2(ends.output, 2)
        logging.shutdown()  # its handler has a socket of the zygote's
        kept = {0, 1, 2, *ends[:-1]}
        for fd in {int(each.name) for each in Path("/proc/self/fd").iterdir()} - kept:
            with contextlib.suppress(OSError):  # the one that listed them is closed
                os.close(fd)
        os.environb.update(request.env)
        for name in request.unset:
            os.environb.pop(name, None)
    except BaseException:  # noqa: BLE001 - whatever it is: nothing may return into the zygote's loop
        traceback.print_exc()
        os._exit(1)


def _reap(pid: int) -> Reaped:
    try:
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        status = None
    return Reaped(status and returncode(status))
