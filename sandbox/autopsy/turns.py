"""Who may have the unwind helper: recovery goes first, and what waits for a helper holds a dead process.

Everything here is of the whole process: decoders that crash together share its processors and descriptors.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from crumplezone.errors import ShortageError
from crumplezone.reports.records.report import Fault, Thread
from crumplezone.reports.store.storm import FULL_PER_HOUR
from crumplezone.sandbox.host.scarcity import SCARCE

_WAITING_PER_CORE = 4
_AUTOPSIES_PER_CORE = 7  # one with a turn, those that wait, and two that go without
_PATIENCE = 15.0  # seconds for a turn: as long as a helper may take
_ROOM = 2.0  # seconds for a dead process to be let go
_TRIES = 8  # of a start, each after one was
_HOUR = 3600.0  # seconds
_MAX_CRASHES = 1024
_FRAMES = 8  # innermost ones, by which a crash is known again

_T = TypeVar("_T")
_Key = tuple[object, ...]


class _Ticket:
    """Of one who waits for a turn."""

    def __init__(self) -> None:
        self.called = threading.Event()
        self.sent_away = False


class Turns:
    """Turns at the helper, first come, first served; and how many autopsies there are.

    Args:
        at_once: How many turns are had side by side.
        waiting: How many more may wait for one; who comes then goes without.
        autopsies: With more of them, those that come are for their callers to make.

    Attributes:
        ended: How many autopsies have.
    """

    def __init__(self, at_once: int, waiting: int, autopsies: int) -> None:
        self._at_once, self._waiting, self._autopsies = at_once, waiting, autopsies
        self.reset()

    def reset(self) -> None:
        """Forget everybody: in a fork, where nobody else runs."""
        self._lock = threading.RLock()  # a signal handler may close a cell in the middle of anything
        self._let_go = threading.Condition(self._lock)
        self._free = self._at_once
        self._line: deque[_Ticket] = deque()
        self._open = self.ended = 0

    @property
    def crowded(self) -> str:
        """Why no more autopsies are to be made beside their callers, or an empty string."""
        return f"{self._open} processes had died at once" if self._open >= self._autopsies else ""

    @contextlib.contextmanager
    def autopsy(self) -> Iterator[None]:
        """An autopsy, whether or not it has a turn, from the death on: it holds what the dead process had."""
        with self._lock:
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                self.ended += 1
                self._let_go.notify_all()

    @contextlib.contextmanager
    def turn(self) -> Iterator[str]:
        """Wait for a turn, and have it; yields why there is none, or an empty string."""
        refusal = self._take()
        try:
            yield refusal
        finally:
            if not refusal:
                with self._lock:
                    if self._line:
                        self._line.popleft().called.set()
                    else:
                        self._free += 1

    def make_room(self, ended: int) -> bool:
        """Have who waits go without, and wait for an autopsy to end; whether one has.

        What a dead process held can then be had by a new one.

        Args:
            ended: How many had, when there was no room.
        """
        with self._lock:
            if self.ended != ended:  # one has, meanwhile
                return True
            for ticket in self._line:
                ticket.sent_away = True
                ticket.called.set()
            self._line.clear()
            return self._open > 0 and self._let_go.wait_for(lambda: self.ended != ended, _ROOM)

    def _take(self) -> str:
        with self._lock:
            if self._free:
                self._free -= 1
                return ""
            if len(self._line) >= self._waiting:
                return f"those of {self._at_once} others were being taken, and {self._waiting} waited"
            self._line.append(mine := _Ticket())
        called = mine.called.wait(_PATIENCE)
        with self._lock:
            if mine.sent_away:
                return "what it held was needed to start a process"
            if called or mine.called.is_set():
                return ""
            self._line.remove(mine)
            return f"it was not its turn for {_PATIENCE:.0f} s"


class Familiar:
    """Crashes for whose stacks a helper was started often enough. A storm of them teaches nothing new.

    Args:
        clock: Seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.forget()

    def refusal(self, key: _Key | None) -> str:
        """Why the stacks of such a crash need not be taken, or an empty string."""
        with self._lock:
            times = self._seen.get(key, deque()) if key else deque[float]()
            known = len(times) == FULL_PER_HOUR and self._clock() - times[0] < _HOUR
        return f"it was started for {FULL_PER_HOUR} crashes at this place within the hour" if known else ""

    def count(self, key: _Key | None) -> None:
        """One is started once more."""
        if key:
            with self._lock:
                times = self._seen.pop(key, deque(maxlen=FULL_PER_HOUR))  # drops the oldest one
                times.append(self._clock())
                self._seen[key] = times
                if len(self._seen) > _MAX_CRASHES:
                    del self._seen[next(iter(self._seen))]

    def forget(self) -> None:
        """Know none of them any more: also in a fork, where who held the lock does not run."""
        self._lock = threading.Lock()
        self._seen: dict[_Key, deque[float]] = {}  # when it was started; least recently first


def crash_key(fault: Fault | None, threads: Sequence[Thread]) -> _Key | None:
    """What tells a crash from others without the helper: its signal, and where its thread was called from.

    None if that is not known. The place alone does not tell: every abort() is in the same function of libc.
    """
    native = next((thread.native for thread in threads if thread.crashed), [])
    places = [(frame.build_id or frame.module, frame.offset) for frame in native if frame.module][:_FRAMES]
    return (fault.signal, *places) if fault and len(places) > 1 else None


def with_room(start: Callable[[], _T]) -> _T:
    """Start a process, or have what it needs.

    If the system has no descriptor or process left, what holds dead ones gives them up.

    Raises:
        OSError, RuntimeError, ShortageError: There is none for all that; RuntimeError is of threads.
    """
    for _ in range(_TRIES):
        ended = TURNS.ended
        try:
            return start()
        except (OSError, RuntimeError, ShortageError) as error:
            if not (_is_scarcity(error) and TURNS.make_room(ended)):
                raise
    return start()


def _is_scarcity(error: BaseException) -> bool:
    why = error.__cause__ if isinstance(error, ShortageError) else error
    return isinstance(why, RuntimeError) or (isinstance(why, OSError) and why.errno in SCARCE)


_CORES = len(os.sched_getaffinity(0))
TURNS = Turns(_CORES, _WAITING_PER_CORE * _CORES, _AUTOPSIES_PER_CORE * _CORES)
FAMILIAR = Familiar()
for _forget in (TURNS.reset, FAMILIAR.forget):
    os.register_at_fork(after_in_child=_forget)
