"""Whose call an engine is at, which thread that is, and that there will be no more."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from crumplezone.errors import UsageError
from crumplezone.sandbox.host.threads import Task, caller, serves

_LOOK = 0.05  # seconds between looks whether a call of another thread was broken off
_P = ParamSpec("_P")
_T = TypeVar("_T")
_OWN = 5.0  # seconds that a signal handler waits: what it has interrupted may hold what closing needs


class Turn:
    """The turn of one call: threads wait for each other, but nobody for himself.

    Whoever calls again in the middle of a call of his own (a signal handler, a callback, an iterator) is told
    so; if he closes, that call ends.

    Args:
        what: What its user calls the thing.

    Attributes:
        closed: There are no more.
        broken: It was closed by the thread that had it.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._thread = 0  # that has it
        self._passing: list[int] = []  # threads
        self.broken = False
        self._closing = Task[None]()
        self.closed = False

    def run(self, work: Callable[[], _T]) -> _T:
        """Take it for the length of a call, and make that.

        All of it is in one function: between a context manager's methods and its block, a signal handler may
        raise, and whoever keeps that error would keep the turn.

        Raises:
            UsageError: It is closed, or this thread has it.
        """
        self.check()
        me = caller()
        with self._lock:  # itself: no signal handler runs between taking it and the block
            self._thread = me
            try:
                self.check_open()
                done = work()
            except Exception as error:
                if self.broken:
                    raise self._ended() from error
                raise
            finally:
                self._thread = 0
        if self.broken:
            raise self._ended()
        return done

    def check(self) -> None:
        """Raise `UsageError` unless this thread may take it, or wait for it."""
        self.check_open()
        if self.mine():
            raise UsageError(
                f"this {self._what} is in the middle of another call of this thread, from which a signal "
                "handler or a callback has called it: call it from another thread, or after that call"
            )

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """What this thread does at the thing without the turn: it takes locks that closing needs, too."""
        me = caller()
        try:
            self._passing.append(me)
            yield
        finally:
            with contextlib.suppress(ValueError):  # interrupted before
                self._passing.remove(me)

    def mine(self) -> bool:
        """Whether this thread is in the middle of a call."""
        return self._thread == caller() and self._lock.locked()

    def close(self, release: Callable[[], None]) -> None:
        """Let there be no more calls, wait for the one of another thread, and release what calls need.

        From the middle of a call of this thread, that call ends; from there, and in the middle of what is
        `passing`, it is not waited for long. From a thread of this package, which is waited for, it is only
        begun. If the waiting is interrupted, it goes on, and can be waited for again.

        Args:
            release: Releases it. It is not interrupted, and called once.
        """
        if os.getpid() != self._pid:
            return
        self.closed = True
        self.broken |= self.mine()

        def work() -> None:
            self._wait()
            release()

        self._closing.begin(work, f"close-{self._what}")
        if self.mine() or caller() in self._passing:
            self._closing.wait(_OWN)
        elif not serves():
            self._closing.result()

    def _wait(self) -> None:
        """Until the call that is under way has ended, or is to."""
        while not self.broken:
            if self._lock.acquire(timeout=_LOOK):
                self._lock.release()
                return

    def check_open(self) -> None:
        """Raise `UsageError` if it is closed, or was made by another process."""
        if os.getpid() != self._pid:
            raise UsageError(f"this {self._what} was made before a fork: make a new one in this process")
        if self.closed:
            raise UsageError(f"this {self._what} is closed: make a new one")

    def _ended(self) -> UsageError:
        return UsageError(f"this {self._what} was closed in the middle of this call")


class _TakesTurns(Protocol):
    @property
    def _turn(self) -> Turn: ...


_Self = TypeVar("_Self", bound=_TakesTurns)


def in_turn(method: Callable[Concatenate[_Self, _P], _T]) -> Callable[Concatenate[_Self, _P], _T]:
    """A method that has the turn while it runs."""

    @functools.wraps(method)
    def call(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._turn.run(lambda: method(self, *args, **kwargs))

    return call
