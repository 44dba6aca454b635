"""Log records of a test's cell, brought to the handlers of pytest's own process.

Those write to its terminal and its files: in a fork, two processes would.
"""

from __future__ import annotations

import copy
import logging
import queue
import select
import socket
import threading
from collections import deque
from typing import Annotated

import msgspec
from multiprocessing_logging import MultiProcessingHandler

from crumplezone.sandbox.ipc.channel import MAX_FRAME

_TAIL = 200
_TEXT_MAX = 8192  # characters
_FARTHEST = 2.0**37  # seconds since 1970, as in sandbox/drain.py
_PLAIN_FORMAT = logging.Formatter("%(levelname)s %(name)s: %(message)s")  # as in sandbox/drain.py
_Plain = str | int | float | bool | None


def _plain(value: object) -> _Plain:
    if value is None or isinstance(value, int | float):
        return value
    return str(value)[:_TEXT_MAX].encode(errors="replace").decode()


class _Needed(msgspec.Struct):
    """What handlers compute with."""

    name: str
    msg: str
    levelno: int
    levelname: str
    created: Annotated[float, msgspec.Meta(ge=0, le=_FARTHEST)]
    msecs: float
    lineno: int
    args: None = None
    exc_info: None = None


class _Line:
    """What `MultiProcessingHandler` needs of a queue, over a socket of one cell: a packet is a record.

    multiprocessing's queue sends from a thread of its own, and so would lose what was logged last before a
    crash. Its lock can die with its holder, and it unpickles what it receives.
    """

    def __init__(self) -> None:
        self._reading, self._writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def put_nowait(self, record: logging.LogRecord) -> None:
        """Send all that formatters might ask of a record; objects as text."""
        told = {**vars(record), "args": None, "exc_info": None}  # both are in its text
        fields = {name: _plain(value) for name, value in told.items()}
        self._writing.send(msgspec.msgpack.encode(fields), socket.MSG_NOSIGNAL)

    def get(self, timeout: float) -> logging.LogRecord:
        """Receive; the end of the cell is the end of file, and so is what no cell sends."""
        self._reading.settimeout(timeout)
        try:
            data = self._reading.recv(MAX_FRAME)
            fields = msgspec.msgpack.decode(data, type=dict[str, _Plain])
            return logging.makeLogRecord(fields | msgspec.structs.asdict(msgspec.convert(fields, _Needed)))
        except TimeoutError:
            raise queue.Empty from None
        except msgspec.MsgspecError as error:  # also of no data
            raise EOFError from error

    def qsize(self) -> int:
        """Whether something has come."""
        poller = select.poll()
        poller.register(self._reading, select.POLLIN)
        return len(poller.poll(0))

    def sent(self) -> None:
        """Leave the sending end to the cell."""
        self._writing.close()

    def close(self) -> None:
        """Close both ends."""
        self._writing.close()
        self._reading.close()

    def join_thread(self) -> None:
        """Nothing: no thread sends."""


class _Relay(logging.Handler):
    """Hands records to the handlers that the root logger has now, and remembers the last ones."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.tail: deque[tuple[float, str, str]] = deque(maxlen=_TAIL)
        self._handlers = list(logging.root.handlers)

    def emit(self, record: logging.LogRecord) -> None:
        shown, plain = self.format(record)[:_TEXT_MAX], _PLAIN_FORMAT.format(record)[:_TEXT_MAX]
        self.tail.append((record.created, shown, plain))
        for handler in self._handlers:
            if record.levelno >= handler.level:
                handler.handle(record)


class Wire(MultiProcessingHandler):  # type: ignore[misc]
    """The handler of one cell: made before the fork, so that its thread receives in the supervisor.

    Args:
        formatter: Of what is remembered.

    Raises:
        OSError: There is no descriptor left.
    """

    def __init__(self, formatter: logging.Formatter) -> None:
        # Not the base class's: the queue that it makes sets the start method of the whole process, and a test
        # that chose one would be told that it comes too late.
        logging.Handler.__init__(self)
        self.queue = _Line()
        self.sub_handler = _Relay(formatter)
        self._is_closed = False
        self._receive_thread = threading.Thread(target=self._receive, name="crumple-log", daemon=True)
        self._receive_thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a copy: the base class changes what it sends, and other handlers want it as it was."""
        super().emit(copy.copy(record))

    def leave_sending(self) -> None:
        """In the supervisor, after the fork: so that the end of the cell ends the thread that receives."""
        self.queue.sent()

    def take_over(self) -> None:
        """In the cell: be the only handler of the root logger."""
        logging.root.handlers[:] = [self]

    def since(self, moment: float) -> list[str]:
        """What was logged last, as pytest shows it, from some moment on (seconds since 1970)."""
        return [shown for created, shown, _ in list(self.sub_handler.tail) if created >= moment]

    def plain(self) -> list[str]:
        """What was logged last, as reports have it."""
        return [plain for *_, plain in list(self.sub_handler.tail)]
