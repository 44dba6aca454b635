"""A program's stderr: handed on as it comes, and its end kept for a report."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import termios
from threading import Thread

from crumplezone.sandbox.process.drain import OutputTail

_STDERR = 2
_PIPE = 64 * 1024  # bytes: what a pipe holds (pipe(7)), a terminal holds less


class Copy:
    """A pipe into this process's stderr; a terminal, if that is one.

    Attributes:
        tail: The end of what came through.
        end: The program's end, until `begin`.
    """

    def __init__(self) -> None:
        self.tail = OutputTail()
        self._is_terminal = os.isatty(_STDERR)
        self._source, self.end = os.openpty() if self._is_terminal else os.pipe2(os.O_CLOEXEC)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = Thread(target=self._run, name="stderr", daemon=True)
        if self._is_terminal:
            modes = termios.tcgetattr(_STDERR)
            modes[1] &= ~termios.OPOST  # the real one will make a carriage return of each line feed
            termios.tcsetattr(self.end, termios.TCSANOW, modes)
            self.resize()

    def begin(self) -> None:
        """The program has its end: hand on what it writes there."""
        self._close_end()
        self._thread.start()

    def resize(self) -> None:
        """The terminal may have changed its size."""
        if self._is_terminal and self._source >= 0:
            with contextlib.suppress(OSError, termios.error):
                termios.tcsetwinsize(self._source, termios.tcgetwinsize(_STDERR))

    def close(self) -> None:
        """The program has ended: hand on what it has written; `cat` does so for what outlives it.

        Idempotent.
        """
        with contextlib.ExitStack() as stack:  # from the last: each is done, whatever the others raise
            stack.callback(self._close_stop)
            stack.callback(self._close_source)
            self._close_end()
            if self._thread.ident and self._stop >= 0:
                os.eventfd_write(self._stop, 1)
                self._thread.join()

    def _close_stop(self) -> None:
        stop, self._stop = self._stop, -1
        if stop >= 0:
            os.close(stop)

    def _close_end(self) -> None:
        end, self.end = self.end, -1
        if end >= 0:
            os.close(end)

    def _close_source(self) -> None:
        source, self._source = self._source, -1
        if source >= 0:
            os.close(source)

    def _run(self) -> None:
        poller = select.poll()
        for fd in (self._source, self._stop):
            poller.register(fd, select.POLLIN)
        left = _PIPE
        while left > 0:
            ready = dict(poller.poll())
            if self._source not in ready:
                break
            data = self._read()
            if not data or not self._hand_on(data):
                self._close_source()  # who writes to it now shall find out
                return
            if self._stop in ready:
                left -= len(data)
        self._leave()
        self._close_source()

    def _leave(self) -> None:
        """Somebody still has the program's end, and may write to it when this process is no more."""
        with contextlib.suppress(OSError):  # no cat, or no process: it will find nobody
            # With the signals of this thread blocked it ends when the last writer does: ctrl-C may end it
            # no sooner, for shells have their background jobs ignore that.
            cat = subprocess.Popen(
                ["cat"],  # noqa: S607 - wherever it is
                stdin=self._source,
                stdout=_STDERR,
                stderr=subprocess.DEVNULL,
                cwd="/",
            )
            cat.returncode = 0  # nobody waits for it: no warning of that

    def _read(self) -> bytes:
        try:
            data = os.read(self._source, _PIPE)
        except OSError:  # EIO: nobody has the terminal open any more (pty(7))
            return b""
        self.tail.add(data)
        return data

    @staticmethod
    def _hand_on(data: bytes) -> bool:
        """Whether it was written; if nobody reads our stderr, the program shall find nobody either."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(_STDERR, view) :]
            except BlockingIOError:  # somebody has made it so, for all who share it
                select.select([], [_STDERR], [])
            except OSError:
                return False
        return True
