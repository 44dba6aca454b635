"""Child side: the main loop of a cell. Run as ``python -m crumplezone.sandbox.child`` with descriptors."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import sys
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from crumplezone.sandbox.arena import Arena
from crumplezone.sandbox.arm import die_with, hold_on_fault
from crumplezone.sandbox.channel import (
    MAX_FRAME,
    Call,
    Channel,
    ChannelClosed,
    Failure,
    FromSupervisor,
    LogLine,
    Ready,
    Reply,
    Start,
)
from crumplezone.sandbox.recorder import Recorder

_MESSAGE_MAX = 8192


class Service(Protocol):
    """What a cell serves. A target is a callable ``(config: msgspec.Raw, room: Room) -> Service``."""

    request_type: Any  # union of tagged structs

    def info(self) -> msgspec.Struct:
        """Describe the service to the supervisor."""

    def handle(self, request: Any) -> msgspec.Struct:
        """Answer one request; an exception becomes a `Failure` frame."""


@dataclass(frozen=True)
class Room:
    """What the child loop hands to a target."""

    arena: Arena
    sock: socket.socket
    recorder: Recorder


class _SocketHandler(logging.Handler):
    """Send each log record as one frame; a record cut by a kill is simply absent."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        self._encode = msgspec.msgpack.Encoder().encode

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        line = LogLine(
            name=record.name,
            level=record.levelno,
            message=message[:_MESSAGE_MAX],
            created=record.created,
            thread=record.threadName or "",
            path=record.pathname,
            line=record.lineno,
        )
        data = self._encode(line)
        if len(data) <= MAX_FRAME:
            try:
                self._sock.send(data, socket.MSG_NOSIGNAL)
            except OSError:  # the supervisor stopped listening: logging must not end the work
                self.handleError(record)


def _failure(call_id: int, error: Exception) -> Failure:
    return Failure(id=call_id, kind=type(error).__name__, message=str(error)[:_MESSAGE_MAX])


def _load(start: Start, room: Room) -> Service:
    module, _, name = start.target.partition(":")
    service: Service = getattr(importlib.import_module(module), name)(start.config, room)
    return service


def serve(channel: Channel, arena: Arena) -> None:
    """Build the target, then answer calls until the supervisor closes its end."""
    start = channel.receive()
    assert isinstance(start, Start)
    recorder = arena.recorder()
    try:
        with recorder.phase("start"):
            service = _load(start, Room(arena, channel.sock, recorder))
        channel.send(Ready(msgspec.Raw(msgspec.msgpack.encode(service.info()))))
    except Exception as error:
        logging.getLogger(__name__).debug("start failed", exc_info=True)
        channel.send(_failure(0, error))
        return
    decode = msgspec.msgpack.Decoder(service.request_type).decode
    encode = msgspec.msgpack.Encoder().encode
    while True:
        call = channel.receive()
        assert isinstance(call, Call)
        try:
            with recorder.phase("validate", len(bytes(call.body))):
                request = decode(call.body)
            body = encode(service.handle(request))
            channel.send(Reply(call.id, msgspec.Raw(body)))
        except ChannelClosed:
            raise
        except Exception as error:
            logging.getLogger(__name__).debug("request failed", exc_info=True)
            channel.send(_failure(call.id, error))


def main() -> None:
    """Entry point: arm first, so that even a crashing import is held."""
    sock_fd, log_fd, fault_fd, parent_fd, arena_fd = (int(n) for n in sys.argv[1:6])
    die_with(parent_fd)
    hold_on_fault(fault_fd)
    threading.current_thread().name = "cell"
    handler = _SocketHandler(socket.socket(fileno=log_fd))
    logging.basicConfig(level=logging.DEBUG, handlers=[handler])
    channel = Channel(socket.socket(fileno=sock_fd), FromSupervisor)
    with contextlib.suppress(ChannelClosed):
        serve(channel, Arena(arena_fd))
    # Native libraries' destructors and atexit handlers can crash or hang: there is nothing left to save.
    os._exit(0)


if __name__ == "__main__":
    main()
