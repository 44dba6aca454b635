"""Frames between a supervisor and a cell: msgspec structs over a SOCK_SEQPACKET socket.

One packet is one frame, so a cell killed in the middle of a send leaves no half frame behind. Frames are
small (bulk data goes through the arena); one that is larger or does not decode is a `ProtocolError`.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from crumplezone.errors import InputError

_T = TypeVar("_T")
_INT = struct.Struct("i")

MAX_FRAME = 128 * 1024  # below Linux's default SO_SNDBUF (net.core.wmem_default, 212992)
CREATED_MAX = 2.0**37  # of a log record, seconds since 1970: in the year 6325; formatters can show up to 9999


class Start(msgspec.Struct, tag="start", frozen=True):
    """Supervisor to child, first: what to serve. ``config`` is decoded by the target."""

    target: str  # "package.module:callable"
    config: msgspec.Raw


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """Child to supervisor: the target is built; ``info`` is its description of itself."""

    info: msgspec.Raw


class Call(msgspec.Struct, tag="call", frozen=True):
    """Supervisor to child: one request."""

    id: int
    body: msgspec.Raw


class Reply(msgspec.Struct, tag="reply", frozen=True):
    """Child to supervisor: the answer to the call of the same id."""

    id: int
    body: msgspec.Raw


class Failure(msgspec.Struct, tag="failure", frozen=True):
    """Child to supervisor: an exception was raised. ``id`` 0 means that the start failed."""

    id: int
    kind: str
    message: str


class Ask(msgspec.Struct, tag="ask", frozen=True):
    """Child to supervisor, in the middle of the call of this id: a question. The child waits."""

    id: int
    body: msgspec.Raw


class Answer(msgspec.Struct, tag="answer", frozen=True, omit_defaults=True):
    """Supervisor to child: the answer to the latest question. Without a body: give the call up."""

    body: msgspec.Raw = msgspec.Raw()  # empty where it is left out


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Supervisor to child, between two calls or in the middle of a question: are you there?"""


class Pong(msgspec.Struct, tag="pong", frozen=True):
    """Child to supervisor: yes."""


class LogLine(msgspec.Struct, frozen=True):
    """Child to supervisor, on the log socket: one log record."""

    name: str
    level: int
    message: str
    created: float
    thread: str = ""
    path: str = ""
    line: int = 0


FromChild = Ready | Reply | Failure | Ask | Pong
FromSupervisor = Start | Call | Answer | Ping


class ProtocolError(Exception):
    """The peer sent what is not a frame."""


class ChannelClosed(Exception):
    """The peer's end is closed."""


def decoded(decode: Callable[[Any], _T], data: bytes | msgspec.Raw) -> _T:
    """Decode what another process has sent: whatever is wrong with it is that process's fault.

    Args:
        decode: Of a msgspec decoder.
        data: What was sent.

    Raises:
        ProtocolError: It is cut short, of another type, nested too deep, no UTF-8, or has too large a number.
    """
    try:
        return decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise ProtocolError(str(error) or type(error).__name__) from error


class Channel:
    """One end of a cell's socket.

    Args:
        sock: A connected SOCK_SEQPACKET socket.
        frame_type: Union of the structs that this end receives.
    """

    def __init__(self, sock: socket.socket, frame_type: object) -> None:
        self.sock = sock
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(frame_type).decode
        self._room = memoryview(bytearray(MAX_FRAME))

    def send(self, frame: msgspec.Struct) -> None:
        """Send one frame (blocks).

        Raises:
            InputError: The frame is too large.
            ChannelClosed: The peer is gone.
        """
        self._send(self._bytes(frame), (), 0)

    def post(self, frame: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """Send one frame to a child that has read all before it, as one does that is asked. Never waits.

        Args:
            frame: The frame.
            fds: Descriptors whose copies follow in a packet of their own. Only a child that asks for them
                receives any: `receive` has no room for them, and the kernel then closes what was sent
                (recvmsg(2)). A supervisor never asks.

        Raises:
            InputError: The frame is too large.
            ProtocolError: The child has not read.
            ChannelClosed: The peer is gone.
        """
        data = self._bytes(frame)
        if _INT.unpack(fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(_INT.size)))[0]:
            raise ProtocolError("it has not read what it was sent before")
        try:
            self._send(data, (), socket.MSG_DONTWAIT)
            if fds:
                self._send(b"fds", fds, socket.MSG_DONTWAIT)
        except BlockingIOError as error:
            raise ProtocolError("it has no room for a frame") from error

    def _bytes(self, frame: msgspec.Struct) -> bytes:
        data = self._encode(frame)
        if len(data) > MAX_FRAME:
            raise InputError("request", f"{len(data)} bytes", f"must be at most {MAX_FRAME} bytes")
        return data

    def _send(self, data: bytes, fds: Sequence[int], flags: int) -> None:
        try:
            if fds:
                socket.send_fds(self.sock, [data], fds, socket.MSG_NOSIGNAL | flags)
            else:
                self.sock.send(data, socket.MSG_NOSIGNAL | flags)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed from error

    def receive(self) -> object:
        """Receive one frame (blocks).

        Raises:
            ProtocolError: Too large, or not a frame of the expected type.
            ChannelClosed: The peer is gone.
        """
        try:
            n, _, flags, _ = self.sock.recvmsg_into([self._room])
        except ConnectionResetError as error:
            raise ChannelClosed from error
        if flags & socket.MSG_TRUNC:
            raise ProtocolError(f"frame larger than {MAX_FRAME} bytes")
        if not n:
            raise ChannelClosed
        return decoded(self._decode, bytes(self._room[:n]))  # a copy: what is Raw in a frame refers to it
