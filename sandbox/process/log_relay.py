"""Log records of another process, with all that they hold, brought to a handler of this one.

Handlers write to terminals and files: with a fork, two processes would. What cells log takes a shorter way
(see drain.py): their loggers are this process's business, and of a record only the message counts.
"""

from __future__ import annotations

import logging
import socket
import threading
from typing import Annotated

import msgspec

from crumplezone.sandbox.ipc.channel import CREATED_MAX, MAX_FRAME, ProtocolError, decoded

_TEXT_MAX = 8192  # characters of a field
_GRACE = 5.0  # seconds for a handler to take what was sent before the end
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
    created: Annotated[float, msgspec.Meta(ge=0, le=CREATED_MAX)]
    msecs: float
    lineno: int
    args: None = None
    exc_info: None = None


class LogSender(logging.Handler):
    """In the other process. Each record is sent at once: what was logged last before a crash arrives.

    Args:
        sock: A `LogRelay` has the other end. It is closed with this handler.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        self._formatter = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        """Send all that formatters might ask of a record; objects as text."""
        try:
            told = {**vars(record), "msg": record.getMessage(), "args": None, "exc_info": None}
            if record.exc_info:
                told["exc_text"] = record.exc_text or self._formatter.formatException(record.exc_info)
            data = msgspec.msgpack.encode({name: _plain(value) for name, value in told.items()})
            if len(data) > MAX_FRAME:
                raise ValueError(f"a log record of {len(data)} bytes: at most {MAX_FRAME}")
            self._sock.send(data, socket.MSG_NOSIGNAL)
        except Exception:  # noqa: BLE001 - as every handler of logging
            self.handleError(record)

    def fileno(self) -> int:
        """Of the socket."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket, too."""
        self._sock.close()
        super().close()


class LogRelay:
    """Hands on what another process logs. Make it before that process: a fork has its threads then.

    Args:
        name: Of the thread that receives.
        handler: Is given the records, whatever its level. It is not closed here.

    Attributes:
        sender: The handler for the other process.

    Raises:
        OSError, RuntimeError: There is no descriptor left, or no thread.
    """

    def __init__(self, name: str, handler: logging.Handler) -> None:
        self._handler = handler
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sender = LogSender(theirs)
        self._thread = threading.Thread(target=self._receive, name=name, daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self.sender.close()
            self._sock.close()
            raise

    def take_over(self) -> None:
        """In a fork: send what any logger logs, and have no other handler."""
        logging.root.handlers[:] = [self.sender]

    def leave_sending(self) -> None:
        """Once the other process has its end: so that its death ends the thread, and no later fork has it."""
        self.sender.close()

    def close(self) -> None:
        """Take what was sent until now, and no more: others may have the sending end yet. Idempotent."""
        if self._sock.fileno() >= 0:
            self.sender.close()
            self._sock.shutdown(socket.SHUT_RD)  # what lies in there is received before the end of file
            self._thread.join(_GRACE)
            if not self._thread.is_alive():
                self._sock.close()

    def _receive(self) -> None:
        decode = msgspec.msgpack.Decoder(dict[str, _Plain]).decode
        while data := self._sock.recv(MAX_FRAME):
            try:
                fields = decoded(decode, data)
                fields |= msgspec.structs.asdict(msgspec.convert(fields, _Needed))
            except (ProtocolError, msgspec.MsgspecError):
                told = "a log record came that does not decode"
                fields = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": told}
            record = logging.makeLogRecord(fields)
            try:
                self._handler.handle(record)
            except Exception:  # noqa: BLE001 - a formatter raised: the next record may be another matter
                self._handler.handleError(record)
        self._sock.shutdown(socket.SHUT_RD)  # an empty packet looks like the end: who sends on is not to wait
