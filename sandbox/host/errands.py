"""What is done beside whoever asked for it: in order, until the process ends, and waited for by who must.

An executor of concurrent.futures takes nothing more once the main thread has ended, be others at work or not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from crumplezone.sandbox.host.threads import serve

Task = Callable[[], object]

_LINGER = 0.2  # seconds
_GRACE = 1.0  # seconds for what was logged last
_LINES_MAX = 4096  # log records of cells that wait for a slow handler; our own may be as many more


class Errands:
    """Does tasks in order, on a thread that is there while there are some.

    Where no thread can be had (there are too many, or the interpreter shuts down), who gives a task does it.

    Args:
        name: Of the thread.
        linger: Seconds that it waits for more to do.
    """

    def __init__(self, name: str, linger: float = 0.0) -> None:
        self._name, self._linger = name, linger
        self.reset()
        _everybody.add(self)

    def reset(self) -> None:
        """Forget all of it: in a fork, where the thread does not run."""
        # The collector may give a task in the middle of this. Taken itself, not by the condition: between
        # that and the block a signal handler could raise, and nobody would ever release it.
        self._lock = threading.RLock()
        self._change = threading.Condition(self._lock)
        self._tasks: deque[tuple[int, Task]] = deque()
        self._kept: deque[tuple[float, Task]] = deque()  # and when they are due
        self._given = self.done = 0
        self._left: set[int] = set()  # numbers of the tasks that are not done
        self._doer: threading.Thread | None = None
        self._latest: threading.Thread | None = None  # of its own, which may be about to end

    @property
    def waiting(self) -> int:
        """Tasks that nobody has begun."""
        return len(self._tasks)

    @property
    def mine(self) -> bool:
        """Whether the calling thread does the tasks: it must not wait for them."""
        return self._doer is threading.current_thread()

    def put(self, task: Task) -> None:
        """Have it done. What it raises is dropped."""
        with self._lock:
            self._append(task)
        self._see_to_it()

    def keep(self, task: Task, seconds: float) -> None:
        """From a task: have another done in so long, always the same; by `hurry` at once."""
        with self._lock:
            self._kept.append((time.monotonic() + seconds, task))
            self._change.notify_all()

    def hurry(self) -> None:
        """What is kept is done now."""
        with self._lock:
            while self._kept:
                self._append(self._kept.popleft()[1])
        self._see_to_it()

    def drop(self) -> None:
        """What is kept is not done any more."""
        with self._lock:
            self._kept.clear()
            self._change.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until what was given is done (not what is kept); False if that takes longer.

        In the thread that does it this returns at once.
        """
        if self.mine:
            return False
        self._see_to_it()
        with self._lock:
            last = self._given
            return self._change.wait_for(lambda: all(number > last for number in self._left), seconds)

    def end(self) -> None:
        """Wait until all is done but for what is kept, which is dropped, and for the end of the thread."""
        self.drop()
        self.wait()
        self.drop()
        if (last := self._latest) and last is not threading.current_thread():
            last.join()

    def _append(self, task: Task) -> None:
        self._given += 1
        self._tasks.append((self._given, task))
        self._left.add(self._given)  # an interrupt between them: nobody waits for no task
        self._change.notify_all()

    def _see_to_it(self) -> None:
        """Have somebody do what there is: a thread, or else the calling one."""
        mine = False
        try:
            with self._lock:
                if self._doer or not self._tasks:
                    return
                me = threading.current_thread()
                # A daemon: nobody waits for it for ever when the interpreter ends.
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._doer = thread
                try:
                    if sys.is_finalizing():  # it would end before it could say that it has begun
                        raise RuntimeError
                    thread.start()
                except (RuntimeError, MemoryError):
                    self._doer, mine = me, True
                except BaseException:  # an interrupt: if it has begun, it sees that it is not to
                    self._doer = None
                    raise
                else:
                    self._latest = thread
                    return
            self._work(None)
        except BaseException:
            if mine:
                self._doer = None
            raise

    def _run(self) -> None:
        serve()
        with contextlib.suppress(BaseException):  # a task may want to end its thread
            with self._lock:
                wanted = self._doer is threading.current_thread()
            if wanted:
                self._work(self._linger)
        self._see_to_it()

    def _work(self, linger: float | None) -> None:
        """Do what there is. ``linger``: as of the thread; None: somebody waits."""
        try:
            while task := self._next(linger):
                try:
                    task[1]()
                except Exception:  # noqa: BLE001, S110 - it told of it; the next one is another matter
                    pass
                finally:
                    with self._lock:
                        self.done += 1
                        self._left.discard(task[0])
                        self._change.notify_all()
        except BaseException:  # an interrupt
            self._doer = None
            raise

    def _next(self, linger: float | None) -> tuple[int, Task] | None:
        """The next task; None: there is none, and the calling thread does them no more."""
        with self._lock:
            if not self.mine:  # it began late, and another one was taken for it
                return None
            idle = time.monotonic() + (linger or 0.0)
            while not self._tasks:
                now = time.monotonic()
                if self._kept and self._kept[0][0] <= now:
                    self._append(self._kept.popleft()[1])
                    break
                end = self._kept[0][0] if self._kept and linger is not None else idle
                if now >= end:
                    self._doer = None
                    return None
                self._change.wait(end - now)
            return self._tasks.popleft()


_everybody: weakref.WeakSet[Errands] = weakref.WeakSet()


def _reset_in_fork() -> None:
    for errands in list(_everybody):
        errands.reset()


os.register_at_fork(after_in_child=_reset_in_fork)


class _Delivery:
    """Hands log records to the caller's logging, whose handlers may take their time, or never return."""

    def __init__(self) -> None:
        self._errands = Errands("logs", _LINGER)
        self._stuck_at = -1

    def put(self, record: logging.LogRecord, most: int = _LINES_MAX) -> bool:
        """Hand on a record; False if ``most`` wait already, and it is dropped."""
        if self._errands.waiting >= most:
            return False
        self._errands.put(lambda: _handle(record))
        return True

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until what was put before was handled; False if that takes longer.

        Args:
            seconds: To wait at most; None: one, and none again while the same record is being handled, so
                that who closes much waits once.
        """
        if seconds is None:
            seconds = 0.0 if self._stuck_at == self._errands.done else _GRACE
        came = self._errands.wait(seconds)
        self._stuck_at = -1 if came else self._errands.done
        return came


_log = logging.getLogger(__name__)


def _handle(record: logging.LogRecord) -> None:
    try:
        logging.getLogger(record.name).handle(record)
    except Exception:  # noqa: BLE001 - a caller's logging handler raised: keep delivering
        with contextlib.suppress(Exception):
            _log.debug("a log record could not be delivered", exc_info=True)


DELIVERY = _Delivery()


class BesideLog:
    """A logger for threads that somebody waits for: what it is told is handed on by another one.

    Args:
        logger: That is told in the end.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def log(self, level: int, message: str, *args: object, exc_info: bool = False, depth: int = 1) -> None:
        """As of a logger; ``depth`` is how many calls ago it was told."""
        logger = self._logger
        if not logger.isEnabledFor(level):
            return
        # Not the errors themselves: with their frames, the arena of a dead cell would live on.
        args = tuple(str(arg) if isinstance(arg, BaseException) else arg for arg in args)
        path, line, function, stack = logger.findCaller(stacklevel=depth + 1)
        error: Any = sys.exc_info() if exc_info else None
        record = logger.makeRecord(
            logger.name, level, path, line, message, args, error, function, None, stack
        )
        DELIVERY.put(record, 2 * _LINES_MAX)

    def debug(self, message: str, *args: object) -> None:
        """As of a logger."""
        self.log(logging.DEBUG, message, *args, depth=2)

    def info(self, message: str, *args: object) -> None:
        """As of a logger."""
        self.log(logging.INFO, message, *args, depth=2)

    def warning(self, message: str, *args: object) -> None:
        """As of a logger."""
        self.log(logging.WARNING, message, *args, depth=2)

    def exception(self, message: str, *args: object) -> None:
        """As of a logger."""
        self.log(logging.ERROR, message, *args, exc_info=True, depth=2)
