"""Child side: the main loop of a cell. ``python -m crumplezone.sandbox.child.loop`` with descriptors."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import msgspec

from crumplezone.sandbox.child.arm import die_with, hold_on_fault
from crumplezone.sandbox.ipc.arena import Arena
from crumplezone.sandbox.ipc.channel import (
    MAX_FRAME,
    Answer,
    Ask,
    Call,
    Channel,
    ChannelClosed,
    Failure,
    FromSupervisor,
    LogLine,
    Ping,
    Pong,
    Ready,
    Reply,
    Start,
)
from crumplezone.sandbox.ipc.flight_recorder import Recorder

_MESSAGE_MAX = 8192


class AbandonedError(Exception):
    """The supervisor did not answer a question: the call is to end; its caller knows why."""


class ForkedChild(BaseException):
    """Raised in a fork: to be a cell, from where it is caught on, with all closed that a `with` is to close.

    A service raises it to the bottom of the stack, so the stacks of a forked cell are those of a spawned one.
    The traceback keeps what the old stack referred to: its descriptors are closed, and collected objects
    would close their numbers once more.

    Args:
        ends: The descriptors of `crumplezone.sandbox.process.lines.Ends`, or as for `live`.
        preloaded: Given to the target.
    """

    def __init__(self, ends: Sequence[int], preloaded: Any = None) -> None:
        super().__init__()
        self.ends, self.preloaded = ends, preloaded


class Service(Protocol):
    """What a cell serves.

    A target is a callable ``(config: msgspec.Raw, room: Room, preloaded: Any = None) -> Service``. In a cell
    that a zygote forked, ``preloaded`` is what the zygote's seed returned.
    """

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
    ask: Callable[[msgspec.Struct], msgspec.Raw]  # see `_Loop.ask`


class _SocketHandler(logging.Handler):
    """Send each log record as one frame; a record cut by a kill is simply absent."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        self._encode = msgspec.msgpack.Encoder().encode

    def close(self) -> None:
        """Close the socket too: a forked cell has another one."""
        self._sock.close()
        super().close()

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


def find(target: str) -> Any:
    """What ``"package.module:name"`` names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


class _Loop:
    """Calls and their replies; inside a call, questions and their answers."""

    def __init__(self, channel: Channel, arena: Arena, preloaded: Any) -> None:
        self._channel, self._arena, self._preloaded = channel, arena, preloaded
        self._recorder = arena.recorder()
        self._encode = msgspec.msgpack.Encoder().encode
        self._calls: list[int] = []  # being handled; more than one while a question is open

    def serve(self) -> None:
        """Build the target, then answer calls until the supervisor closes its end."""
        start = self._channel.receive()
        assert isinstance(start, Start)
        try:
            with self._recorder.phase("start"):
                room = Room(self._arena, self._channel.sock, self._recorder, self.ask)
                self._service: Service = find(start.target)(start.config, room, self._preloaded)
            self._channel.send(Ready(msgspec.Raw(self._encode(self._service.info()))))
        except Exception as error:
            logging.getLogger(__name__).debug("start failed", exc_info=True)
            self._channel.send(_failure(0, error))
            return
        self._decode = msgspec.msgpack.Decoder(self._service.request_type).decode
        while True:
            self._handle(self._received())

    def ask(self, question: msgspec.Struct) -> msgspec.Raw:
        """Ask the supervisor something in the middle of a call; other calls may come before the answer.

        Raises:
            AbandonedError: There is no answer: the call is to end.
        """
        self._channel.send(Ask(self._calls[-1], msgspec.Raw(self._encode(question))))
        while not isinstance(frame := self._received(), Answer):
            self._handle(frame)
        if not bytes(frame.body):
            raise AbandonedError
        return frame.body

    def _received(self) -> object:
        """The next frame that asks for more than a sign of life."""
        while isinstance(frame := self._channel.receive(), Ping):
            self._channel.send(Pong())
        return frame

    def _handle(self, call: object) -> None:
        assert isinstance(call, Call)
        self._calls.append(call.id)
        try:
            with self._recorder.phase("validate", len(bytes(call.body))):
                request = self._decode(call.body)
            body = self._encode(self._service.handle(request))
            self._channel.send(Reply(call.id, msgspec.Raw(body)))
        except ChannelClosed:
            raise
        except Exception as error:
            logging.getLogger(__name__).debug("request failed", exc_info=True)
            self._channel.send(_failure(call.id, error))
        finally:
            self._calls.pop()


def live(ends: Sequence[int], supervisor: int, preloaded: Any = None) -> NoReturn:
    """Be a cell. Armed first, so that even a crashing import is held.

    Args:
        ends: The descriptors of `crumplezone.sandbox.process.lines.Ends`, but for the last.
        supervisor: Its process id.
        preloaded: Given to the target.
    """
    sock_fd, log_fd, fault_fd, parent_fd, arena_fd = ends
    die_with(parent_fd)
    hold_on_fault(fault_fd, supervisor)
    threading.current_thread().name = "cell"
    handler = _SocketHandler(socket.socket(fileno=log_fd))
    logging.basicConfig(level=logging.DEBUG, handlers=[handler], force=True)
    channel = Channel(socket.socket(fileno=sock_fd), FromSupervisor)
    with contextlib.suppress(ChannelClosed):
        _Loop(channel, Arena(arena_fd), preloaded).serve()
    # Native libraries' destructors and atexit handlers can crash or hang: there is nothing left to save.
    os._exit(0)


def main() -> NoReturn:
    """Entry point."""
    supervisor = os.getppid()
    ends, preloaded, lives = [int(fd) for fd in sys.argv[1:6]], None, []
    while True:
        try:
            live(ends, supervisor, preloaded)
        except ForkedChild as forked:
            lives.append(forked)
            ends, preloaded = list(forked.ends), forked.preloaded


if __name__ == "__main__":
    # In the module that services import: `ForkedChild` of the module `__main__` would be another class.
    find("crumplezone.sandbox.child.loop:main")()
