"""One thread per cell that keeps its stderr and log socket empty, and samples its memory and processor time.

An undrained stderr pipe stops llama.cpp in the middle of a load; an undrained log socket likewise. So it only
hands on the log records to the caller's logging, whose handlers may take their time (see errands.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from collections import deque

import msgspec
import psutil

from crumplezone.reports.records.report import Exit, Sample
from crumplezone.sandbox.host.errands import DELIVERY
from crumplezone.sandbox.ipc.channel import CREATED_MAX, MAX_FRAME, LogLine, ProtocolError, decoded
from crumplezone.sandbox.process.lines import close_fds
from crumplezone.sandbox.process.process import Process
from crumplezone.sandbox.process.procfs import sizes

_STDERR_TAIL = 64 * 1024
_LOG_TAIL = 200
_NAMES_MAX = 1024  # of loggers that all cells of this process may add
_LEVEL_MAX = 100  # a logger keeps something for each level that it was ever asked about
_SAMPLES = 64
_STOPPED_MAX = 2.0  # seconds that somebody else may have a cell stopped: until it goes on it is of no use
_PERIOD, _PERIOD_WITH_LIMIT = 0.1, 0.02  # seconds between samples, of some 0.06 ms of processor time each
_MESSAGE_MAX, _TAIL_MESSAGE_MAX, _NAME_MAX, _PATH_MAX = 8192, 2048, 200, 1024

_log = logging.getLogger(__name__)


def _bounded(line: LogLine) -> LogLine:
    """The child keeps these bounds too, but a child is not to be trusted."""
    return LogLine(
        line.name[:_NAME_MAX],
        min(max(line.level, 0), _LEVEL_MAX),
        line.message[:_MESSAGE_MAX],
        line.created if 0 <= line.created <= CREATED_MAX else time.time(),  # not a number, either
        line.thread[:_NAME_MAX],
        line.path[:_PATH_MAX],
        line.line,
    )


class _Loggers:
    """Those that cells log by. Logging keeps each for ever, and one for each dot in its name."""

    def __init__(self) -> None:
        self._left = _NAMES_MAX
        self.renew_lock()

    def renew_lock(self) -> None:
        """In a fork, where the drain that held it does not run."""
        self._lock = threading.Lock()

    def named(self, name: str) -> logging.Logger:
        """The logger of this name; this module's if there would be too many then that only cells use."""
        if name not in {"", "root"}:
            known = logging.root.manager.loggerDict
            places = [name[:i] for i, letter in enumerate(name) if letter == "."]
            with self._lock:
                new = len([place for place in {*places, name} if place not in known])
                if new > self._left:
                    return _log
                self._left -= new
        return logging.getLogger(name)


_loggers = _Loggers()
os.register_at_fork(after_in_child=_loggers.renew_lock)


class OutputTail:
    """The last 64 KiB of what a process says."""

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self._size = 0

    def add(self, data: bytes) -> None:
        """Append what was read."""
        self._parts.append(data)
        self._size += len(data)
        while self._size - len(self._parts[0]) >= _STDERR_TAIL:
            self._size -= len(self._parts.popleft())

    def text(self) -> str:
        """What is left of it. Another thread may be adding to it."""
        return b"".join(list(self._parts))[-_STDERR_TAIL:].decode("utf-8", "replace")


class Drain:
    """Bounded tails of what a cell says, and its log records handed to the caller's logging.

    Args:
        process: The cell's process.
        memory_limit: Bytes of resident memory above which the cell is killed, or None.
        stderr: What it says, if somebody else reads that; what comes down its own line is added.
        stoppable: Whether it may be stopped (SIGSTOP) for as long as somebody likes; else it is killed then.

    Attributes:
        over_memory: It was killed for its memory.
        condemned: Or for something else that nothing honest does.
        stopped: Or because somebody else had stopped it.
        watched: Whether to look for that; the supervisor stops what it examines.
    """

    def __init__(
        self,
        process: Process,
        memory_limit: int | None,
        stderr: OutputTail | None = None,
        *,
        stoppable: bool = True,
    ) -> None:
        self.over_memory = self.stopped = False
        self.watched = not stoppable
        self._stopped_at = 0.0  # CLOCK_MONOTONIC, seconds; 0: it was not stopped when it was last looked at
        self.condemned: tuple[Exit, str] | None = None
        self.peak_rss: int | None = None
        self._stderr = stderr or OutputTail()
        self._logs: deque[str] = deque(maxlen=_LOG_TAIL)
        self._dropped = 0
        self._decode = msgspec.msgpack.Decoder(LogLine).decode
        self._limit = memory_limit
        self._period = _PERIOD_WITH_LIMIT if memory_limit else _PERIOD
        self._process = process
        self._usage: psutil.Process | None = None
        self._samples: deque[tuple[int, int, float]] = deque(maxlen=_SAMPLES)
        os.set_blocking(process.lines.stderr_fd, False)
        process.lines.log.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"drain-{process.pid}", daemon=True)
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._thread.start()
        except BaseException:  # no thread could be had
            close_fds(self, "_stop_read", "_stop_write")
            raise

    def stop(self) -> None:
        """Read what is left, then end the thread. Call once the cell is stopped or reaped. Idempotent."""
        if self._stop_write >= 0:
            os.write(self._stop_write, b".")
            self._thread.join()
            close_fds(self, "_stop_read", "_stop_write")

    def stderr_tail(self) -> str:
        """The last 64 KiB of the cell's stdout and stderr."""
        return self._stderr.text()

    def log_tail(self) -> list[str]:
        """The last log records, one line each, and how many never reached the caller's logging."""
        dropped = (
            [f"({self._dropped} records were dropped: a logging handler is slow)"] if self._dropped else []
        )
        return [*self._logs, *dropped]

    def samples(self, end: int) -> list[Sample]:
        """Memory and processor time up to ``end`` (CLOCK_MONOTONIC, nanoseconds), oldest first."""
        return [
            Sample(round((end - at) / 1e6, 1), rss, cpu) for at, rss, cpu in list(self._samples) if at <= end
        ]

    def _run(self) -> None:
        err, log = self._process.lines.stderr_fd, self._process.lines.log
        poller = select.poll()
        for fd in (err, log.fileno(), self._stop_read):
            poller.register(fd, select.POLLIN)
        due = 0.0
        while True:
            now = time.monotonic()
            if now >= due:
                self._sample()
                due = now + self._period
            ready = {fd for fd, _ in poller.poll((due - now) * 1000)}
            if err in ready and not self._read_stderr(err):
                poller.unregister(err)
            if log.fileno() in ready and not self._read_log(log):
                poller.unregister(log)
            if self._stop_read in ready:
                # One bounded read more: a grandchild may hold the pipe open and write for ever.
                self._read_stderr(err)
                self._read_log(log)
                return

    def _read_stderr(self, fd: int) -> bool:
        for _ in range(64):
            try:
                data = os.read(fd, 65536)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._stderr.add(data)
        return True

    def _read_log(self, log: socket.socket) -> bool:
        for _ in range(256):
            try:
                data = log.recv(MAX_FRAME)
            except BlockingIOError:
                return True
            except ConnectionResetError:
                return False
            if not data:
                return False
            try:
                line = _bounded(decoded(self._decode, data))
            except ProtocolError:
                what = f"cell {self._process.pid} sent a log record that does not decode"
                line = LogLine(_log.name, logging.WARNING, what, time.time())
            level = logging.getLevelName(line.level)
            self._logs.append(f"{level} {line.name}: {line.message[:_TAIL_MESSAGE_MAX]}")
            self._log(line)
        return True

    def _log(self, line: LogLine) -> None:
        logger = _loggers.named(line.name)
        if logger.isEnabledFor(line.level):
            record = logging.LogRecord(logger.name, line.level, line.path, line.line, line.message, (), None)
            record.created = line.created
            record.msecs = line.created % 1 * 1000
            record.threadName = line.thread
            record.process = self._process.pid
            record.processName = "cell"
            if not DELIVERY.put(record):
                self._dropped += 1

    def _sample(self) -> None:
        try:
            self._usage = usage = self._usage or psutil.Process(self._process.pid)
            with usage.oneshot():
                rss, times, state = usage.memory_info().rss, usage.cpu_times(), usage.status()
        except (psutil.Error, OSError):  # it is gone, or there is no descriptor to open /proc with
            return
        if not rss:  # it has ended and waits to be reaped
            return
        self._look_stopped(stopped=state == psutil.STATUS_STOPPED)
        self._samples.append((time.monotonic_ns(), rss, times.user + times.system))
        self._judge(rss)

    def _judge(self, rss: int) -> None:
        """Kill it if it takes what it may not."""
        if self.over_memory or self.condemned:
            return
        try:
            taken = self._taken(rss)
        except ProtocolError as error:
            self.condemned = Exit.PROTOCOL, f"the cell {error}; killed by the supervisor"
        except OSError:  # it is being closed
            return
        else:
            self.peak_rss = max(self.peak_rss or 0, taken)
            self.over_memory = bool(self._limit and taken > self._limit)
        if self.over_memory or self.condemned:
            self._process.signal(signal.SIGKILL)

    def _look_stopped(self, *, stopped: bool) -> None:
        now = time.monotonic()
        self._stopped_at = (self._stopped_at or now) if stopped else 0.0
        if stopped and self.watched and now - self._stopped_at > _STOPPED_MAX:
            self.watched, self.stopped = False, True
            self._process.signal(signal.SIGKILL)

    def _taken(self, rss: int) -> int:
        """Its resident memory, and of the arena what it has not mapped, which counts for no process.

        Raises:
            ProtocolError: It has changed the size of its arena.
        """
        held = self._process.lines.arena.held()
        if not self._limit or rss + held <= self._limit:
            return rss
        return rss + max(held - sizes(self._process.pid).get("RssShmem", 0), 0)


def drained(
    process: Process, memory_limit: int | None, stderr: OutputTail | None = None, *, stoppable: bool = True
) -> Drain:
    """Drain a process that was just started; what raises has ended it.

    Raises:
        OSError, RuntimeError, MemoryError: No thread or descriptor could be had.
    """
    try:
        return Drain(process, memory_limit, stderr, stoppable=stoppable)
    except BaseException:
        process.kill()
        process.close()
        raise


def abandon(process: Process, drain: Drain, owner: int) -> None:
    """End a process that nobody needs any more, and release all that there is of it.

    Args:
        process: The process.
        drain: What drains it.
        owner: Process id of its supervisor; a fork of that has inherited the objects, but not the process.
    """
    if os.getpid() != owner:
        return
    with contextlib.ExitStack() as stack:  # from the last: each is done, whatever the others raise
        stack.callback(DELIVERY.wait)  # what was logged last
        stack.callback(process.lines.arena.release)
        stack.callback(process.close)
        stack.callback(drain.stop)
        stack.callback(process.kill)
