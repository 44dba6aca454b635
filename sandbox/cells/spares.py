"""Warm cells in reserve: a thread makes them beside the caller, and replaces those that die waiting."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
import weakref
from collections.abc import Callable

from crumplezone.errors import CellDied, UsageError
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.sandbox.host.errands import BesideLog
from crumplezone.sandbox.host.threads import Task, apart, serve
from crumplezone.sandbox.process.launch import Starter, spawn

_FAILURES_MAX = 3  # in a row
_PAUSE = 0.3  # seconds: the job that has just been given a cell has the processors for itself first
_CLOSED = "this was closed while its cell started: make a new one"
_JOIN = 1.0  # seconds for the thread's end, where it waits for a zygote that loads

_log = BesideLog(logging.getLogger(__name__))


class SparePool:
    """Where a caller takes its cells from. Without spares it just starts one.

    The first spare is made after the first cell was taken: a machine that has no room for one, or a model
    that kills its loader, is met once. After three failures in a row none is made, until a cell was had
    otherwise.

    Args:
        spec: What they run.
        zygote: What forks them; None: they are spawned.
        spares: How many are kept in reserve.
        warm: Called with each spare before it counts as one.
        on_death: Called, on any thread, with the incident of a spare, or of a zygote that died while it was
            started again. It must not refer to whoever is to close this pool when it is collected.
    """

    def __init__(
        self,
        spec: CellSpec,
        zygote: Zygote | None,
        spares: int,
        warm: Callable[[Cell], None],
        on_death: Callable[[Incident], None],
    ) -> None:
        self._keeper = _SpareKeeper(spec, zygote, spares, warm, on_death)
        self._closing = Task[None]()
        weakref.finalize(self, self._closing.begin, self._keeper.close, "close-spares")

    def take(self) -> Cell:
        """A spare, if there is one, else a new cell.

        Raises:
            CellRefused, CellDied, OSError: As `Cell`, or the zygote that was to fork it.
            UsageError: It was closed meanwhile.
        """
        return apart(self._keeper.take)

    @property
    def pids(self) -> list[int]:
        """Process ids of the spares."""
        return self._keeper.pids

    def renew(self, spec: CellSpec) -> None:
        """What all cells from now on run; the spares are replaced."""
        self._keeper.renew(spec)

    def wait_for_all(self, timeout: float) -> bool:
        """Wait until every spare is there; False if that takes longer (seconds), or none is made any more."""
        return self._keeper.wait_for_all(timeout)

    def close(self) -> None:
        """End the spares, and what starts. Cells that were taken live on. Idempotent.

        If it is interrupted, it goes on by itself.
        """
        if self._keeper.is_mine:
            self._closing.begin(self._keeper.close, "close-spares")
            self._closing.result()


class _SpareKeeper:
    """What the thread refers to: not the `SparePool`, so that one that nobody closed can be collected."""

    def __init__(
        self,
        spec: CellSpec,
        zygote: Zygote | None,
        spares: int,
        warm: Callable[[Cell], None],
        on_death: Callable[[Incident], None],
    ) -> None:
        self._spec, self._zygote, self._n_spares = spec, zygote, spares
        self._warm, self._on_death = warm, on_death
        self._starter = Starter(zygote.fork if zygote else spawn)
        self._owner = os.getpid()
        self._lock = threading.RLock()  # the collector may call `close` in the middle of anything
        self._change = threading.Condition(self._lock)
        self._shelf: list[Cell] = []
        self._stale: list[Cell] = []
        self._failures = 0
        self._due = 0.0  # CLOCK_MONOTONIC: no spare is made before
        self._closed = False
        self._bell = -1  # rung when there is something to do
        self._thread: threading.Thread | None = None

    def take(self) -> Cell:
        while True:
            with self._lock:
                spare = self._shelf.pop() if self._shelf else None
                spec = self._spec
            if spare is None:
                cell = self._started(spec)
                self._failures = min(self._failures, _FAILURES_MAX - 1)
                self._run()
                return cell
            if died := spare.died_idle():
                self._failed(died)
            else:
                self._failures = 0
                self._due = time.monotonic() + _PAUSE
                self._ring()
                return spare

    def _started(self, spec: CellSpec) -> Cell:
        try:
            cell = Cell(spec, self._starter)
        except CellDied as died:
            if not self._closed:
                raise
            Incident.of(died).evidence.result()  # `close` has killed it: it is reaped now
            raise UsageError(_CLOSED) from died
        finally:
            self._starter.ready()
        if self._closed:
            cell.close()
            raise UsageError(_CLOSED)
        return cell

    @property
    def is_mine(self) -> bool:
        """Whether this process made it; a fork inherited it, and locks that other threads hold."""
        return os.getpid() == self._owner

    @property
    def pids(self) -> list[int]:
        with self._lock:
            return [cell.pid for cell in self._shelf]

    def renew(self, spec: CellSpec) -> None:
        with self._lock:
            self._spec = spec
            self._stale += self._shelf
            self._shelf = []
        self._failures = 0
        self._ring()

    def wait_for_all(self, timeout: float) -> bool:
        with self._lock:
            self._change.wait_for(lambda: self._full() or self._failures >= _FAILURES_MAX, timeout)
            return self._full()

    def close(self) -> None:
        if not self.is_mine:
            return
        with self._lock:
            self._closed = True
            cells = self._shelf + self._stale
            self._shelf, self._stale = [], []
        with contextlib.ExitStack() as stack:  # from the last: each is done, whatever the others raise
            if self._thread and self._thread is not threading.current_thread():
                stack.callback(self._thread.join, _JOIN)
            for cell in cells:
                stack.callback(cell.close)
            stack.callback(self._ring)
            stack.callback(self._starter.stop)

    def _run(self) -> None:
        """Have the thread running, and look what there is to do."""
        self._due = time.monotonic() + _PAUSE
        with self._lock:
            if self._n_spares and not (self._thread or self._closed):
                try:
                    self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                    self._thread = threading.Thread(target=self._keep, name="spares", daemon=True)
                    self._thread.start()
                except (OSError, RuntimeError) as error:  # no descriptor, no thread: the caller has its cell
                    self._thread = None
                    self._close_bell()
                    _log.debug("no spares are kept: %s", error)
        self._ring()

    def _ring(self) -> None:
        with self._lock:
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def _close_bell(self) -> None:
        with self._lock:
            bell, self._bell = self._bell, -1
            if bell >= 0:
                os.close(bell)

    def _keep(self) -> None:
        serve()
        while not self._closed:
            for cell in self._dismissed():
                with contextlib.suppress(Exception):  # the others are to be closed, too
                    cell.close()
            while self._wanted() and time.monotonic() >= self._due:
                self._make()
            self._wait()
            self._look()
        self._close_bell()

    def _dismissed(self) -> list[Cell]:
        with self._lock:
            stale, self._stale = self._stale, []
        return stale

    def _wanted(self) -> bool:
        return not (self._full() or self._failures >= _FAILURES_MAX or self._closed)

    def _full(self) -> bool:
        return len(self._shelf) >= self._n_spares

    def _make(self) -> None:
        spec, cell = self._spec, None
        try:
            cell = Cell(spec, self._starter)
            self._warm(cell)
        except CellDied as died:
            self._failed(died)
        except Exception as error:  # noqa: BLE001 - nothing that a spare meets may end the thread
            self._count()
            _log.debug("no spare could be made: %s: %s", type(error).__name__, error)
        else:
            with self._lock:
                if not self._closed and spec is self._spec:
                    self._shelf.append(cell)
                    self._change.notify_all()
                    cell = None
        finally:
            self._starter.ready()
            if cell is not None:
                cell.close()

    def _failed(self, died: CellDied) -> None:
        if self._closed:
            Incident.of(died).evidence.result()  # `close` has killed it: it is reaped now
            return
        try:
            self._on_death(Incident.of(died))
        except Exception as error:  # noqa: BLE001 - a report that fails must not end the thread
            _log.debug("a death could not be told: %s: %s", type(error).__name__, error)
        self._count()

    def _count(self) -> None:
        with self._lock:
            self._failures += 1
            self._change.notify_all()

    def _wait(self) -> None:
        """Until the bell rings, a spare or the zygote dies, or a spare is due."""
        left = max(self._due - time.monotonic(), 0) * 1000 if self._wanted() else None
        with contextlib.ExitStack() as copies:
            poller = select.poll()
            poller.register(self._bell, select.POLLIN)
            for fd in self._watched():
                copies.callback(os.close, fd)
                poller.register(fd, select.POLLIN)
            poller.poll(left)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)

    def _watched(self) -> list[int]:
        fds: list[int] = []
        if self._zygote:
            try:
                fds += self._zygote.watch()
            except CellDied as died:
                self._failed(died)
            except Exception as error:  # noqa: BLE001 - who wants to fork will meet it too
                _log.debug("no zygote: %s: %s", type(error).__name__, error)
        with self._lock, contextlib.suppress(OSError):  # no descriptor: `take` looks before it gives one away
            for cell in self._shelf:
                fds += cell.watch()
        return fds

    def _look(self) -> None:
        """Drop the spares that have died."""
        with self._lock:
            deaths = {cell: died for cell in self._shelf if (died := cell.died_idle())}
            self._shelf = [cell for cell in self._shelf if cell not in deaths]
        for died in deaths.values():
            self._failed(died)
