"""One thread per cell that keeps its stderr and log socket empty, and samples its memory and processor time.

An undrained stderr pipe stops llama.cpp in the middle of a load; an undrained log socket likewise.
"""

from __future__ import annotations

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

from crumplezone.reports.schema import Sample
from crumplezone.sandbox.channel import MAX_FRAME, LogLine
from crumplezone.sandbox.launch import Process

_STDERR_TAIL = 64 * 1024
_LOG_TAIL = 200
_STOP_GRACE = 5.0  # seconds
_NAMES_MAX = 256  # logging keeps every logger for ever: a hostile cell must not fill memory with names
_SAMPLES = 64
_PERIOD, _PERIOD_WITH_LIMIT = 0.1, 0.02  # seconds between samples, of some 0.06 ms of processor time each
_MESSAGE_MAX, _TAIL_MESSAGE_MAX = 8192, 2048

_log = logging.getLogger(__name__)


class Drain:
    """Bounded tails of what a cell says, and its log records handed to the caller's logging.

    Args:
        process: The cell's process.
        memory_limit: Bytes of resident memory above which the cell is killed, or None.
    """

    def __init__(self, process: Process, memory_limit: int | None) -> None:
        self.over_memory = False
        self.peak_rss: int | None = None
        self._stderr: deque[bytes] = deque()
        self._stderr_size = 0
        self._logs: deque[str] = deque(maxlen=_LOG_TAIL)
        self._names: set[str] = set()
        self._decode = msgspec.msgpack.Decoder(LogLine).decode
        self._limit = memory_limit
        self._period = _PERIOD_WITH_LIMIT if memory_limit else _PERIOD
        self._process = process
        self._usage = psutil.Process(process.pid)
        self._samples: deque[tuple[int, int, float]] = deque(maxlen=_SAMPLES)
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(process.lines.stderr_fd, False)
        process.lines.log.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"drain-{process.pid}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read what is left, then end the thread. Call once the cell is reaped."""
        if self._thread.is_alive():
            os.write(self._stop_write, b".")
            # A caller's logging handler may hold the thread: its descriptors are then left to it.
            self._thread.join(_STOP_GRACE)
            if self._thread.is_alive():
                return
        os.close(self._stop_read)
        os.close(self._stop_write)

    def stderr_tail(self) -> str:
        """The last 64 KiB of the cell's stdout and stderr."""
        return b"".join(self._stderr)[-_STDERR_TAIL:].decode("utf-8", "replace")

    def log_tail(self) -> list[str]:
        """The last log records, one line each."""
        return list(self._logs)

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
            self._stderr.append(data)
            self._stderr_size += len(data)
            while self._stderr_size - len(self._stderr[0]) >= _STDERR_TAIL:
                self._stderr_size -= len(self._stderr.popleft())
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
                self._deliver(self._decode(data))
            except msgspec.MsgspecError:
                _log.warning("cell %d sent a log record that does not decode", self._process.pid)
            except Exception:  # noqa: BLE001 - a caller's logging handler raised: keep draining
                _log.debug("a log record could not be delivered", exc_info=True)
        return True

    def _deliver(self, line: LogLine) -> None:
        # The child keeps these bounds too, but a child is not to be trusted.
        name, message = line.name[:200], line.message[:_MESSAGE_MAX]
        self._logs.append(f"{logging.getLevelName(line.level)} {name}: {message[:_TAIL_MESSAGE_MAX]}")
        if name not in self._names:
            if len(self._names) >= _NAMES_MAX:
                name = __name__
            self._names.add(name)
        logger = logging.getLogger(name)
        if logger.isEnabledFor(line.level):
            record = logging.LogRecord(name, line.level, line.path[:1024], line.line, message, (), None)
            record.created = line.created
            record.threadName = line.thread
            record.process = self._process.pid
            record.processName = "cell"
            logger.handle(record)

    def _sample(self) -> None:
        try:
            with self._usage.oneshot():
                rss, times = self._usage.memory_info().rss, self._usage.cpu_times()
        except psutil.Error:
            return
        if not rss:  # it has ended and waits to be reaped
            return
        self._samples.append((time.monotonic_ns(), rss, times.user + times.system))
        self.peak_rss = max(self.peak_rss or 0, rss)
        if self._limit and rss > self._limit and not self.over_memory:
            self.over_memory = True
            self._process.signal(signal.SIGKILL)
