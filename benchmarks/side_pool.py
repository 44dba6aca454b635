"""One pool of one worker under the same chores as every other. ``side_pool KIND``."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, Protocol

import psutil

from benchmarks import chores
from benchmarks.peer import serve
from crumplezone.errors import CellDied
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.cells.spares import SparePool
from crumplezone.sandbox.cells.zygote import Zygote

JOBS, BAD_JOB = 100, 20
LIMIT = 1.0  # seconds


class Pool(Protocol):
    """What the measurements need of a pool."""

    def call(self, chore: str) -> Any:
        """Do a chore and wait; raises if the worker died."""

    def limited(self, chore: str, limit: float) -> None:
        """Do a chore; raises when the limit is over."""

    def recover(self) -> None:
        """Whatever its user must do after a crash, before the next call."""

    def many(self, jobs: list[str]) -> list[bool]:
        """Hand in all jobs at once; whether each got its result."""

    def close(self) -> None:
        """End it."""


class _Cells:
    """This package: a cell and a spare, forked of a zygote."""

    def __init__(self) -> None:
        config = chores.Config()
        self._zygote = Zygote(CellSpec(chores.SEED, config), _untold)
        self._supply = SparePool(CellSpec(chores.TARGET, config), self._zygote, 1, _cold, _untold)
        self._cell = self._supply.take()

    def call(self, chore: str) -> Any:
        return self._call(chore, None)

    def limited(self, chore: str, limit: float) -> None:
        self._call(chore, limit)

    def _call(self, chore: str, limit: float | None) -> Any:
        if self._cell.died_idle():
            self.recover()
        (large,) = self._cell.arena.arrays([("f4", chores.FLOATS if chore == "payload" else 0)])
        done = self._cell.call(chores.Chore(chore), chores.Done, limit)
        return large.copy() if chore == "payload" else done

    def recover(self) -> None:
        self._cell = self._supply.take()

    def many(self, jobs: list[str]) -> list[bool]:
        results = []
        for job in jobs:
            try:
                self.call(job)
                results.append(True)
            except CellDied:
                results.append(False)
                self.recover()
        return results

    def close(self) -> None:
        self._cell.close()
        self._supply.close()
        self._zygote.close()


def _cold(_spare: Cell) -> None:
    """These cells have nothing to warm up."""


def _untold(_incident: Incident) -> None:
    """Nobody reads of the deaths here."""


class _Executors:
    """`ProcessPoolExecutor`, and loky's of the same interface. A crash breaks it: its user makes another."""

    def __init__(self, make: Callable[[], Executor]) -> None:
        self._make = make
        self._executor = make()

    def call(self, chore: str) -> Any:
        return self._executor.submit(getattr(chores, chore)).result()

    def limited(self, chore: str, limit: float) -> None:
        self._executor.submit(getattr(chores, chore)).result(limit)

    def recover(self) -> None:
        self.close()
        self._executor = self._make()

    def many(self, jobs: list[str]) -> list[bool]:
        return _outcomes([self._executor.submit(getattr(chores, job)) for job in jobs])

    def close(self) -> None:
        self._executor.shutdown(wait=False)


class _Pebbles:
    """pebble's pool, which replaces a worker that died at work; the death of an idle one breaks it."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._pool = self._made()

    def _made(self) -> Any:
        from pebble import ProcessPool

        return ProcessPool(max_workers=1, context=multiprocessing.get_context(self._method))

    def call(self, chore: str) -> Any:
        return self._pool.submit(getattr(chores, chore), None).result()

    def limited(self, chore: str, limit: float) -> None:
        self._pool.submit(getattr(chores, chore), limit).result()

    def recover(self) -> None:
        if not self._pool.active:
            self.close()
            self._pool = self._made()

    def many(self, jobs: list[str]) -> list[bool]:
        return _outcomes([self._pool.submit(getattr(chores, job), None) for job in jobs])

    def close(self) -> None:
        self._pool.stop()
        self._pool.join(5)


def _outcomes(futures: list[Future[Any]]) -> list[bool]:
    results = []
    for future in futures:
        try:
            future.result(30)
            results.append(True)
        except Exception:  # noqa: BLE001 - each library has its own; a lost job is a lost job
            results.append(False)
    return results


def _loky() -> Executor:
    from loky import ProcessPoolExecutor as Loky

    executor: Executor = Loky(max_workers=1)
    return executor


KINDS: dict[str, Callable[[], Pool]] = {
    "cells": _Cells,
    "executor fork": lambda: _Executors(lambda: _executor("fork")),
    "executor forkserver": lambda: _Executors(lambda: _executor("forkserver")),
    "loky": lambda: _Executors(_loky),
    "pebble fork": lambda: _Pebbles("fork"),
    "pebble forkserver": lambda: _Pebbles("forkserver"),
}


def _executor(method: str) -> Executor:
    return ProcessPoolExecutor(1, multiprocessing.get_context(method))


class Measurements:
    """What the driver asks for."""

    def __init__(self, make: Callable[[], Pool]) -> None:
        self._pool = make()
        self._pool.call("nothing")

    def calls(self, chore: str, count: int) -> float:
        """Median seconds of a call."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self._pool.call(chore)
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[count // 2]

    def crash(self) -> tuple[float, float]:
        """Seconds from the call that crashes to its exception, and to the result of the next call."""
        start = time.perf_counter()
        with contextlib.suppress(Exception):
            self._pool.call("crash")
        raised = time.perf_counter()
        self._pool.recover()
        self._pool.call("nothing")
        return raised - start, time.perf_counter() - start

    def innocents(self) -> int:
        """How many of 100 jobs are lost with one that crashes."""
        jobs = ["nothing"] * JOBS
        jobs[BAD_JOB - 1] = "crash"
        lost = self._pool.many(jobs).count(False) - 1
        self._pool.recover()
        self._pool.call("nothing")
        return lost

    def idle_killed(self) -> str:
        """What the next call says when the idle worker has been killed; empty: it got its result."""
        worker = psutil.Process(int(_pid(self._pool.call("nothing"))))
        worker.send_signal(signal.SIGKILL)
        _gone(worker)
        try:
            self._pool.call("nothing")
        except Exception as error:  # noqa: BLE001 - each library has its own
            self._pool.recover()
            return type(error).__name__
        return ""

    def hang(self) -> tuple[float, bool]:
        """Seconds until a call that hangs raises, and whether its worker was ended by then."""
        worker = psutil.Process(int(_pid(self._pool.call("nothing"))))
        start = time.perf_counter()
        with contextlib.suppress(Exception):
            self._pool.limited("hang", LIMIT)
        seconds = time.perf_counter() - start
        ended = not worker.is_running() or worker.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
        if not ended:
            worker.kill()
        with contextlib.suppress(Exception):
            self._pool.recover()
        return seconds, ended

    def descendants(self) -> list[int]:
        """Everything that runs below this process, with a worker that has just answered."""
        self._pool.call("nothing")
        return [process.pid for process in psutil.Process().children(recursive=True)]


def _pid(result: Any) -> int:
    return result.number if isinstance(result, chores.Done) else int(result)


def _gone(worker: psutil.Process) -> None:
    """Wait until a killed process is dead; whoever started it may not have reaped it yet."""
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)


def main() -> None:
    """Start the pool, and answer."""

    def build() -> dict[str, Any]:
        measurements = Measurements(KINDS[sys.argv[1]])
        names = ("calls", "crash", "innocents", "idle_killed", "hang", "descendants")
        return {name: getattr(measurements, name) for name in names}

    serve(build)


if __name__ == "__main__":
    main()
