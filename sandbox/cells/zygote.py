"""Supervisor side of a zygote: the process that has loaded a model, and of which cells are forked.

It is a cell itself, so its death is held, examined and reported like any other. Its cells do not need it:
they live on when it dies, only their exit status goes with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from crumplezone.errors import CellDied, CellRefused, UsageError
from crumplezone.reports.records.report import Exit
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.child import fork_server
from crumplezone.sandbox.child.fork_server import (
    Fork,
    Forked,
    ForkServerConfig,
    Reap,
    Reaped,
    UnforkableError,
)
from crumplezone.sandbox.host.errands import BesideLog
from crumplezone.sandbox.host.scarcity import too_large
from crumplezone.sandbox.host.surroundings import Surroundings
from crumplezone.sandbox.host.threads import apart
from crumplezone.sandbox.ipc.channel import MAX_FRAME
from crumplezone.sandbox.process.launch import Starter, launch, spawn
from crumplezone.sandbox.process.lines import Ends
from crumplezone.sandbox.process.process import Child, Process, reap_own
from crumplezone.sandbox.process.procfs import stat_fields

_DEADLINE = 10.0  # seconds for one request: a fork copies page tables, some milliseconds for each GiB
_PATIENCE = 0.5  # seconds for a request that is under way when it is to be closed
_REQUEST_MAX = MAX_FRAME - 1024  # bytes; a frame has some more
_DEATHS_MAX = 3  # in a row, with no fork between them
_RETRY = 60.0  # seconds after these: whoever killed it may have gone

_log = BesideLog(logging.getLogger(__name__))
_T = TypeVar("_T", bound=msgspec.Struct)


class Zygote:
    """A zygote that is started when it is needed, and again when it has died. Thread-safe.

    Where nothing can be forked (what it loaded has threads, or it dies again and again), it spawns.

    Args:
        spec: What it loads: ``target`` names a seed, as `ForkServerConfig` has it.
        on_death: Called with the incident if it dies after it was ready. It must not refer to whoever is to
            close this zygote when it is collected: cells refer to the zygote that forked them.
    """

    def __init__(self, spec: CellSpec, on_death: Callable[[Incident], None]) -> None:
        config = ForkServerConfig(spec.target, msgspec.Raw(msgspec.msgpack.encode(spec.config)))
        self._spec = dataclasses.replace(spec, target=fork_server.TARGET, config=config)
        self._on_death = on_death
        self._starter = Starter(spawn)
        self._lock = threading.Lock()  # for its start
        self._line: _Line | None = None
        self._deaths, self._died_at = 0, 0.0  # CLOCK_MONOTONIC, seconds
        self._closed = self._unforkable = False

    @property
    def cell(self) -> Cell | None:
        """The latest one, dead or alive."""
        line = self._line
        return line.cell if line else None

    @property
    def pid(self) -> int | None:
        """Process id, if it runs."""
        line = self._line
        return line.cell.pid if line and line.cell.alive else None

    def start(self) -> None:
        """Have it running.

        Raises:
            CellRefused: The seed raised an exception.
            CellDied: It died while it started.
            OSError: No process or descriptor could be had.
            UsageError: It is closed.
        """
        apart(self._have_ready)

    def info(self, kind: type[_T]) -> _T | None:
        """What the seed says of itself, checked against a type; None where cells are spawned.

        Raises:
            CellRefused, CellDied, OSError, UsageError: As `start`.
        """
        line = apart(self._have_ready)
        return line.cell.info(kind) if line else None

    def fork(self, surroundings: Surroundings) -> Process:
        """Start a cell; as `crumplezone.sandbox.process.launch.spawn`, for `Cell`.

        Args:
            surroundings: Its environment. Its Python and directory are the zygote's.

        Raises:
            CellRefused, CellDied, OSError, UsageError: As `start`.
        """
        for _ in range(_DEATHS_MAX):  # of this caller's own: what others fork sets theirs back
            line = self._have_ready()
            if line is None:
                break
            try:
                process = line.fork(surroundings.of_cell)
            except (CellDied, _DeadError):  # it is reported, and the next one tries
                continue
            except CellRefused as refused:
                _log.warning("a cell is spawned, not forked: %s: %s", refused.kind, refused)
                self._unforkable |= refused.kind == UnforkableError.__name__
                break
            self._deaths = 0
            return process
        return spawn(surroundings)

    def watch(self) -> list[int]:
        """Have it running; new descriptors, one of which is readable once it is dead.

        Raises:
            CellRefused, CellDied, OSError, UsageError: As `start`.
        """
        line = self._have_ready()
        return line.cell.watch() if line else []

    def stop(self) -> None:
        """Fork no more, and have who waits for a fork go on. Cells are reaped until `close`. Idempotent."""
        self._closed = True
        self._starter.stop()
        line = self._line  # without the lock: who starts one holds it, until that was killed just now
        if line:
            line.hurry()

    def close(self) -> None:
        """End it, even while it starts, or does not answer. Its cells live on. Idempotent."""
        self.stop()
        if line := self._line:  # without the lock, as above: who starts one looks whether it is wanted still
            line.close()

    def _have_ready(self) -> _Line | None:
        with self._lock:
            return self._ready()

    def _ready(self) -> _Line | None:
        """A living one; None: cells are to be spawned."""
        if self._closed:
            raise UsageError("this zygote is closed: make a new one")
        if self._line and not self._line.lives():
            self._line.close()  # its cells refer to it
            self._line = None
            self._deaths, self._died_at = self._deaths + 1, time.monotonic()
            if self._deaths == _DEATHS_MAX:
                _log.warning("the zygote died %d times in a row: cells are spawned for now", self._deaths)
        if self._line is None and not self._unforkable and not self._gave_up():
            self._line = line = self._started()
            if self._closed and line:
                line.close()
                raise UsageError("this zygote was closed while it started")
        return None if self._unforkable else self._line

    def _gave_up(self) -> bool:
        """Whether it has died too often; each minute there is another trial."""
        if self._deaths >= _DEATHS_MAX and time.monotonic() - self._died_at > _RETRY:
            self._deaths = _DEATHS_MAX - 1
        return self._deaths >= _DEATHS_MAX

    def _started(self) -> _Line | None:
        env = self._spec.surroundings.adding(self._spec.env).of_cell
        try:
            cell = Cell(self._spec, self._starter)
        except CellRefused as refused:
            if refused.kind != UnforkableError.__name__:
                raise
            _log.info("cells are spawned, not forked: %s", refused)
            self._unforkable = True
            return None
        except CellDied as died:
            if self._closed:
                Incident.of(died).evidence.result()  # `stop` has killed it: it is reaped now
                raise UsageError("this zygote was closed while it started") from died
            raise
        finally:
            self._starter.ready()
        return _Line(cell, env, self._on_death)


class _DeadError(Exception):
    """A zygote has died, and somebody else has told of it."""


class _Line:
    """Requests to one zygote process, one at a time.

    Args:
        cell: That is the zygote.
        env: The environment it was started with.
        on_death: Called once with the incident of its death.
    """

    def __init__(self, cell: Cell, env: Mapping[str, str], on_death: Callable[[Incident], None]) -> None:
        self.cell = cell
        self._env, self._on_death = env, on_death
        self._lock = threading.RLock()
        self._talking = self._stopped = self._killed = False
        self._living: set[int] = set()
        self._left: list[int] = []  # to be reaped with the next request

    def lives(self) -> bool:
        """Whether it does; if not, that has been told."""
        with self._lock:
            if died := self.cell.died_idle():
                self._tell(died)
            return self.cell.alive

    def hurry(self) -> None:
        """Fork no more; a request that is under way ends soon, be it with the zygote's death."""
        self._stopped = True
        if self._lock.acquire(timeout=_PATIENCE):
            self._lock.release()
        else:
            self._killed = True
            self.cell.kill()  # that ends one that is stopped, too

    def close(self) -> None:
        """End it."""
        with self._lock:
            self.cell.close()

    def fork(self, env: Mapping[str, str]) -> Process:
        """Start a cell with this environment.

        Raises:
            CellRefused: It cannot fork.
            CellDied: It died, or what it answered cannot be; it is told.
            OSError: There is no descriptor left.
            _DeadError: Its death is told already, or it is to fork no more.
        """
        return launch(functools.partial(self._fork, env))

    def _fork(self, env: Mapping[str, str], ends: Ends) -> Child:
        changed = {os.fsencode(k): os.fsencode(v) for k, v in env.items() if self._env.get(k) != v}
        request = Fork(changed, [os.fsencode(name) for name in self._env if name not in env])
        if len(msgspec.msgpack.encode(request)) > _REQUEST_MAX:
            raise too_large(env)
        with self._lock:
            if self._stopped:
                raise _DeadError
            pid = self._call(request, Forked, ends).pid
            pidfd = self._opened(pid)
            self._living.add(pid)
        return Child(pid, pidfd, functools.partial(self._reap, pid, pidfd))

    def _opened(self, pid: int) -> int:
        """A pidfd of the cell that it says it has forked: it is not believed."""
        with contextlib.ExitStack() as stack:
            try:
                pidfd = os.pidfd_open(pid)
                stack.callback(os.close, pidfd)
                known = pid not in self._living and _is_child(pid, pidfd, self.cell.pid)
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
                    raise self._liar(pid) from None
                self._left.append(pid)  # that process dies with its lines
                raise
            if not known:
                raise self._liar(pid)
            stack.pop_all()
            return pidfd

    def _liar(self, pid: int) -> CellDied:
        died = self.cell.condemn(
            Exit.PROTOCOL, f"the zygote says that it forked {pid}, which is no new child"
        )
        self._tell(died)
        return died

    def _tell(self, died: CellDied) -> None:
        if self._killed:
            Incident.of(died).evidence.result()  # killed by `hurry`, which is no crash: it is reaped now
        else:
            self._on_death(Incident.of(died))

    def _reap(self, pid: int, pidfd: int) -> int | None:
        with self._lock:
            self._living.discard(pid)
            if self._talking:  # the collector has found a cell in the middle of a request
                self._left.append(pid)
                return None
            try:
                return self._call(Reap(pid), Reaped).returncode
            except (CellDied, CellRefused, UsageError, _DeadError):
                return reap_own(pidfd)  # ours only if orphans come to this process: in a container, its first

    def _call(self, request: msgspec.Struct, reply: type[_T], fds: Sequence[int] = ()) -> _T:
        with self._lock:
            self._talking = True
            try:
                if died := self.cell.died_idle():
                    raise died
                if not self.cell.alive:
                    raise _DeadError
                left, self._left = self._left, []
                deadline = _PATIENCE if self._stopped else _DEADLINE
                for pid in left:
                    if self.cell.call(Reap(pid), Reaped, deadline).returncode is None:
                        self._left.append(pid)
                return self.cell.call(request, reply, deadline, fds=fds)
            except CellDied as died:
                self._killed |= self._stopped  # it was to end, and did not answer any more
                self._tell(died)
                raise
            finally:
                self._talking = False


def _is_child(pid: int, pidfd: int, parent: int) -> bool:
    """Whether this process is a child of that one, and leads a group of its own.

    Raises:
        OSError: There is no such process, or no descriptor left to look at it.
    """
    _, *found = stat_fields(str(pid))[:3]
    signal.pidfd_send_signal(pidfd, 0)  # not reaped: /proc has told of this process, not of a later one
    return found == [str(parent), str(pid)]
