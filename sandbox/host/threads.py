"""Work that neither a signal handler nor the collector can come between, and the threads that do it.

Python runs signal handlers in the main thread, between any two of its steps, and what they raise ends what it
was doing there. The collector runs finalizers on any thread, in the middle of anything, whatever lock that
holds. So what must come to its end is done on a thread of its own. Waiting for it can be interrupted, and
begun again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")
_here = threading.local()


def serve() -> None:
    """Mark this thread as one of this package's own: a caller's code that it runs must not wait for it."""
    _here.serves = True


def serves() -> bool:
    """Whether this is one of this package's own threads."""
    return getattr(_here, "serves", False)


def caller() -> int:
    """The thread that this one does its work for (`apart`): by default itself."""
    ident: int = getattr(_here, "caller", 0) or threading.get_ident()
    return ident


class Task(Generic[_T]):
    """Something that is to be done once, on a thread of its own, however often and wherever that is asked.

    Where no thread can be had it is done by who asks first.
    """

    def __init__(self) -> None:
        self._claim = threading.Lock()  # held for good by who does it
        self._latches: list[threading.Lock] = []  # each held by one that waits; no lock is shared with them
        self._given_away = self._ended = False
        self._thread: threading.Thread | None = None
        self._value: _T | None = None
        self._error: BaseException | None = None

    @property
    def begun(self) -> bool:
        """Whether it is being done, or is done, or somebody else does it."""
        return self._claim.locked()

    @property
    def ended(self) -> bool:
        """Whether it is done, well or not."""
        return self._ended

    def take_over(self) -> bool:
        """Have it never done here; False if it is begun."""
        if not self._claim.acquire(blocking=False):
            return False
        self._given_away = True
        self._let_go()  # whoever has begun it a moment ago, and waits
        return True

    def begin(self, work: Callable[[], _T], name: str) -> None:
        """Have it done. Idempotent; also for finalizers, and for who was interrupted in here.

        Args:
            work: What there is to do.
            name: Of the thread.
        """
        if self.begun:
            return
        main_thread = threading.main_thread()
        # The main thread ends before the interpreter calls what is to be called at exit, and then that stops
        # all other threads, in the middle of anything.
        if main_thread.is_alive() or threading.current_thread() is not main_thread:
            thread = threading.Thread(target=self._serve, args=(work,), name=name, daemon=True)
            with contextlib.suppress(RuntimeError, MemoryError):  # no thread can be had
                thread.start()
                return
        self._run(work)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until what was begun has ended, well or not; False if that takes longer (seconds)."""
        latch = threading.Lock()
        latch.acquire()
        self._latches.append(latch)
        if not (self._ended or self._given_away) and not latch.acquire(
            timeout=-1 if timeout is None else timeout
        ):
            return False
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()  # it has nothing left to do
        return True

    def result(self) -> _T | None:
        """Wait, and give what came of it; None if somebody else does it.

        Raises:
            BaseException: What it has raised, once.
        """
        self.wait()
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._value
        finally:
            del error  # or its traceback would refer to itself, and keep all that the work has left

    def _serve(self, work: Callable[[], _T]) -> None:
        serve()
        self._run(work, threading.current_thread())

    def _run(self, work: Callable[[], _T], own: threading.Thread | None = None) -> None:
        if not self._claim.acquire(blocking=False):
            return
        self._thread = own
        try:
            self._value = work()
        except BaseException as error:  # noqa: BLE001 - it is for who waits
            self._error = error
        finally:
            self._ended = True
            self._let_go()

    def _let_go(self) -> None:
        """Have nobody wait any more."""
        with contextlib.suppress(IndexError):
            while True:
                self._latches.pop().release()


def apart(work: Callable[[], _T]) -> _T:
    """Do something that no signal handler may come between, and wait for it.

    If the waiting is interrupted, it is done all the same. What it returns is then dropped: let that be an
    object that the collector releases.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    me = caller()

    def acting() -> _T:
        _here.caller = me
        return work()

    task = Task[_T]()
    task.begin(acting, "apart")
    return task.result()  # type: ignore[return-value]  # nobody else does it
