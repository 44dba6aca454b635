"""Counts what an engine does, knows what is on its way, and tells listeners.

Who tells it (a lane, the reporter's thread, a caller) waits for no listener, and for no other lane.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from types import MappingProxyType

from crumplezone.errors import InputError, UsageError
from crumplezone.reports.records.report import Exit, Report
from crumplezone.sandbox.host.threads import serves
from crumplezone.workers.observe.ear import Ear
from crumplezone.workers.observe.events import CellLost, Event, Listener, ReportWritten
from crumplezone.workers.observe.stats import Stats
from crumplezone.workers.observe.trace import Trace

_GRACE = 1.0  # seconds for what was told last


class Observer:
    """What is counted and told of one engine. Thread-safe; also for signal handlers and callbacks.

    Attributes:
        lock: Held while something is changed; never while anybody is waited for.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        # Taken itself, not by the condition: a signal handler could come between that and the block.
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._traces: dict[Trace, None] = {}  # of what is on its way
        self._counts = Counter[str]()
        self._finished = Counter[str]()
        self._native_seconds = 0.0
        self._ears: tuple[Ear, ...] = ()
        self._unheard = self._requests = 0
        self._draining = False

    def add(self, listener: Listener) -> None:
        """Tell a listener of what happens from now on.

        Raises:
            InputError: It cannot be called, or is told already.
        """
        if not callable(listener):
            raise InputError("listener", listener, "must be something to call with an event")
        with self.lock:
            if any(ear.listener == listener for ear in self._ears):
                raise InputError("listener", listener, "is one already")
            self._ears = (*self._ears, Ear(listener))

    def remove(self, listener: Listener) -> None:
        """Tell it no more; events that wait for it still come.

        Raises:
            InputError: It is none.
        """
        with self.lock:
            gone = [ear for ear in self._ears if ear.listener == listener]
            if not gone:
                raise InputError("listener", listener, "is none: add it first")
            self._ears = tuple(ear for ear in self._ears if ear not in gone)
            self._unheard += sum(ear.dropped for ear in gone)

    def stats(self, places: int) -> Stats:
        """What was counted so far.

        Raises:
            UsageError: This is a fork of the process that counts.
        """
        if os.getpid() != self._pid:
            raise UsageError("this decoder was made before a fork: make a new one in this process")
        with self.lock:
            counts, traces = self._counts, [trace for trace in self._traces if trace.counted]
            running = sum(trace.admitted for trace in traces)
            return Stats(
                submitted=counts["submitted"],
                queued=len(traces) - running,
                running=running,
                places=places,
                finished=MappingProxyType(dict(self._finished)),
                prompt_tokens=counts["prompt_tokens"],
                cached_tokens=counts["cached_tokens"],
                generated_tokens=counts["generated_tokens"],
                native_calls=counts["native_calls"],
                native_seconds=self._native_seconds,
                crashes=counts["crashes"],
                kills=counts["kills"],
                recoveries=counts["recoveries"],
                reports=counts["reports"],
                unheard=self._unheard + sum(ear.dropped for ear in self._ears),
            )

    def drain(self, timeout: float | None) -> bool:
        """Let nothing new come, and wait until what came is done; False if that takes longer (seconds).

        On a thread that others wait for, it does not wait.
        """
        with self.lock:
            self._draining = True
            return self._changed.wait_for(lambda: not self._traces, 0 if serves() else timeout)

    @contextlib.contextmanager
    def taking(self, traces: Sequence[Trace]) -> Iterator[None]:
        """Something to do comes: the choices of one request, or a batch. If the block raises, it is refused.

        Raises:
            UsageError: Nothing new may come.
        """
        try:
            with self.lock:
                if self._draining:
                    raise UsageError("this decoder is draining: it takes no new work; make another one")
                self._requests += 1
                for choice, trace in enumerate(traces):
                    trace.begin(self, self._requests, choice)
            self.poke()
            yield
        except BaseException:
            for trace in traces:
                trace.finish("refused")
            raise

    # Of those who tell.

    def count(self, name: str, n: int = 1) -> None:
        """So many more. Under the lock."""
        self._counts[name] += n

    def emit(self, event: Event) -> None:
        """Have an event told after the next `poke`. Under the lock."""
        for ear in self._ears:
            ear.hear(event)

    def poke(self) -> None:
        """Tell what there is, beside."""
        for ear in self._ears:
            ear.poke()

    def came(self, trace: Trace) -> None:
        """It is on its way. Under the lock."""
        self._traces[trace] = None

    def left(self, trace: Trace, reason: str = "") -> bool:
        """It is done, if it was on its way. Under the lock."""
        if trace not in self._traces:
            return False
        del self._traces[trace]
        if trace.counted:
            self._finished[reason] += 1
        if not self._traces:
            self._changed.notify_all()
        return True

    def called(self, n: int, seconds: float) -> None:
        """So many native calls came back, after so many seconds."""
        with self.lock:
            self._counts["native_calls"] += n
            self._native_seconds += seconds

    def lost(self, report: str) -> None:
        """A cell was lost: by the lane whose thread this is, if it is one."""
        now, thread = time.monotonic(), threading.get_ident()
        with self.lock:
            fallen = [trace for trace in self._traces if trace.thread == thread]
            for trace in fallen:
                trace.lost_at = trace.lost_at or now
            requests = tuple(dict.fromkeys(trace.request for trace in fallen))
            self.emit(CellLost(now, requests, report))
        self.poke()

    def explained(self, how: Exit) -> None:
        """It is known how a cell was lost."""
        with self.lock:
            self._counts["kills" if how is Exit.KILLED else "crashes"] += 1

    def written(self, report: Report, path: str) -> None:
        """The report of it is complete."""
        signature = report.signature
        event = ReportWritten(
            at=time.monotonic(),
            report=path,
            exit=str(report.evidence.exit),
            signature=signature.id if signature else "",
            title=signature.title if signature else "",
            verdict=str(report.verdict.kind) if report.verdict else "",
        )
        with self.lock:
            self._counts["reports"] += 1
            self.emit(event)
        self.poke()

    def close(self) -> None:
        """Wait until all was told, but not for long, and once for listeners that do not return."""
        end = time.monotonic() + _GRACE
        for ear in self._ears:
            ear.wait(max(0.0, end - time.monotonic()))
