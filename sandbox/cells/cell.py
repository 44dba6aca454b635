"""A cell: one supervised child process that answers typed requests, or dies with an incident."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import os
import select
import signal
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy.typing as npt

from crumplezone.errors import CellDied, CellRefused, ShortageError, UsageError
from crumplezone.reports.records.report import Evidence, Exit, Frame
from crumplezone.sandbox.autopsy import autopsy
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.autopsy.turns import with_room
from crumplezone.sandbox.host.surroundings import Surroundings
from crumplezone.sandbox.host.threads import Task, apart
from crumplezone.sandbox.ipc.arena import Arena, Shape
from crumplezone.sandbox.ipc.channel import (
    Answer,
    Ask,
    Call,
    Channel,
    ChannelClosed,
    Failure,
    FromChild,
    Ping,
    Pong,
    ProtocolError,
    Ready,
    Reply,
    Start,
    decoded,
)
from crumplezone.sandbox.process.cgroup import oom_kills
from crumplezone.sandbox.process.drain import Drain, abandon, drained
from crumplezone.sandbox.process.launch import Launcher, spawn
from crumplezone.sandbox.process.process import Process
from crumplezone.sandbox.process.procfs import sizes

_CLOSE_GRACE_MS = 500
_LOOK = 1.0  # seconds: a signal just before a poll does not wake it, and its handler runs behind that
_CLOSED = "this cell was closed in the middle of a call"
_T = TypeVar("_T", bound=msgspec.Struct)


@dataclass(frozen=True)
class CellSpec:
    """What a cell runs, and its limits.

    Attributes:
        target: ``"package.module:callable"``, imported in the child.
        config: Given to the target there.
        start_deadline: Seconds until it must be ready.
        memory_limit: Bytes of resident memory above which it is killed, or None. A page counts in every cell
            that has it mapped, shared or not, so the limit is the same for a spawned and for a forked cell.
        env: Added to the child's environment.
        surroundings: Where it runs; as they are when this is made.
    """

    target: str
    config: msgspec.Struct
    start_deadline: float = 120.0
    memory_limit: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    surroundings: Surroundings = field(default_factory=Surroundings.here)


def _caller_stack() -> list[Frame]:
    here = [f for f in traceback.extract_stack(limit=48) if f.filename != __file__]
    return [Frame(symbol=f.name, file=f.filename, line=f.lineno or 0) for f in reversed(here)]


def _started(spec: CellSpec, start: Launcher) -> tuple[Process, Drain]:
    process = start(spec.surroundings.adding(spec.env))
    return process, drained(process, spec.memory_limit, stoppable=False)


class Cell:
    """A running cell. Use it from one thread at a time, but for what is said to be for any thread.

    Args:
        spec: What to run.
        start: Starts its process.

    Raises:
        CellRefused: The target raised an exception while it was built.
        CellDied: It died while it started.
        OSError: No process or descriptor could be had.

    Attributes:
        heard: When it sent its latest frame, by `time.monotonic`.
    """

    def __init__(self, spec: CellSpec, start: Launcher = spawn) -> None:
        self._owner = os.getpid()
        self._next_id = 1
        self._oom_kills = oom_kills()
        self._phase = "start"
        self.heard = 0.0
        self._quiet = threading.RLock()  # held while it is asked for a sign of life
        self._calls = 0  # under way: more than one while a question is open
        self._unanswered, self._odd = False, ""  # of a ping: it has yet to come, and was something else
        self._process, self._drain = with_room(lambda: _started(spec, start))
        process = self._process
        self._evidence: Future[Evidence] | None = None  # of its death
        self._closing = Task[None]()
        end = functools.partial(abandon, process, self._drain, self._owner)
        self._finalizer = weakref.finalize(self, self._closing.begin, end, f"close-{process.pid}")
        self._channel = Channel(process.lines.sock, FromChild)
        self._poller, self._idle = select.poll(), select.poll()
        for fd in (process.lines.fault_fd, process.pidfd):
            self._idle.register(fd, select.POLLIN)
            self._poller.register(fd, select.POLLIN)
        self._poller.register(process.lines.sock.fileno(), select.POLLIN)
        first = Start(spec.target, msgspec.Raw(msgspec.msgpack.encode(spec.config)))
        frame = self._talk(first, spec.start_deadline)
        if isinstance(frame, Failure):
            self.close()
            raise CellRefused(frame.kind, frame.message)
        if not isinstance(frame, Ready):
            raise self._broken("sent another frame before it was ready")
        self._info = frame.info
        self._phase = "call"

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether requests can be sent."""
        return not self._closing.begun

    @property
    def arena(self) -> Arena:
        """The memory shared with the child."""
        return self._process.lines.arena

    def info(self, kind: type[_T]) -> _T:
        """The service's description of itself, checked against a type."""
        try:
            return decoded(msgspec.msgpack.Decoder(kind).decode, self._info)
        except ProtocolError as error:
            raise self._broken(f"described itself wrongly: {error}") from error

    def arrays(self, shapes: Sequence[Shape]) -> list[npt.NDArray[Any]]:
        """Views of the arena, see `Arena.arrays`.

        Raises:
            ShortageError: There is no memory for it.
            CellDied: The child has changed its size.
            UsageError: The cell was closed by another thread.
        """
        with self._using_arena():
            self.arena.held()
            return with_room(lambda: self.arena.arrays(shapes))

    def reserve(self, shapes: Sequence[Shape]) -> None:
        """Have room for these arrays.

        Raises:
            ShortageError, CellDied, UsageError: As `arrays`.
        """
        with self._using_arena():
            with_room(lambda: self.arena.reserve(shapes))

    def taken(self, size: int) -> bytes:
        """What the child has put into the arena, see `Arena.taken`.

        Raises:
            ShortageError, CellDied, UsageError: As `arrays`; also if there cannot be so much.
        """
        self.check_written(size)
        with self._using_arena():
            return self.arena.taken(size)

    def check_written(self, size: int) -> None:
        """Before so many bytes of the arena are copied: no more than there are, written by whomever.

        Raises:
            CellDied, UsageError: As `arrays`.
        """
        with self._using_arena():
            if size > min(self.arena.held(), self.arena.room):
                raise ProtocolError(f"says that it wrote {size} bytes, which it did not")

    @contextlib.contextmanager
    def _using_arena(self) -> Iterator[None]:
        try:
            yield
        except ProtocolError as error:
            raise self._broken(str(error)) from error
        except (OSError, ValueError, ShortageError) as error:
            if self.alive:
                raise
            raise UsageError(_CLOSED) from error

    def resident(self) -> int:
        """Bytes that it has in memory or in swap, by the kernel's count; 0: it has ended."""
        with contextlib.suppress(OSError):
            found = sizes(self.pid)
            return found.get("VmRSS", 0) + found.get("VmSwap", 0)
        return 0

    def call(
        self,
        request: msgspec.Struct,
        reply: type[_T],
        deadline: float | None,
        on_ask: Callable[[msgspec.Raw], msgspec.Struct] | None = None,
        fds: Sequence[int] = (),
    ) -> _T:
        """Send one request and wait for its reply in the calling thread.

        Args:
            request: A struct of the service's request type.
            reply: Type that the answer must have.
            deadline: Seconds until the cell counts as hung, or None to wait for ever. They begin anew after
                each question, and do not run while it is being answered.
            on_ask: Called with each question that the service asks meanwhile; returns the answer. It may
                make calls of its own. What it raises ends this call, and the cell lives.
            fds: Descriptors to be sent behind the request, to a service that receives them.

        Raises:
            CellRefused: The service raised an exception; the cell lives.
            CellDied: The cell was lost. Its incident holds the evidence.
            UsageError: The cell is closed, or belongs to another process.
        """
        if not self.alive or os.getpid() != self._owner:
            raise UsageError("this cell is closed, or was made before a fork: make a new one")
        with self._quiet:
            if self._process.is_waited_for:
                raise UsageError("this cell is in the middle of another call: make this one after that")
        call_id = self._next_id
        self._next_id += 1
        failed: list[BaseException] = []
        call = Call(call_id, msgspec.Raw(msgspec.msgpack.encode(request)))
        calls = self._calls
        try:
            with self._quiet:  # no ping comes in between from here
                self._calls = calls + 1
            self._await_pong(deadline)
            frame = self._talk(call, deadline, fds)
            while on_ask and isinstance(frame, Ask) and frame.id == call_id:
                frame = self._talk(self._answer(frame, on_ask, failed), deadline)
        except CellDied:
            raise
        except BaseException:  # an interrupted call would leave its reply in the socket for the next one
            self.close()
            raise
        finally:
            self._calls = calls
        if failed:
            raise failed[0]
        if isinstance(frame, Failure) and frame.id == call_id:
            raise CellRefused(frame.kind, frame.message)
        if not isinstance(frame, Reply) or frame.id != call_id:
            raise self._broken("answered another request than the one it was sent")
        try:
            return decoded(msgspec.msgpack.Decoder(reply).decode, frame.body)
        except ProtocolError as error:
            raise self._broken(f"sent a reply that does not decode: {error}") from error

    def _answer(
        self, ask: Ask, on_ask: Callable[[msgspec.Raw], msgspec.Struct], failed: list[BaseException]
    ) -> Answer:
        """The answer; none from the first exception on, which `call` raises when the service has ended."""
        answer = Answer()
        if not failed:
            try:
                answer = Answer(msgspec.Raw(msgspec.msgpack.encode(on_ask(ask.body))))
            except BaseException as error:
                if not self.alive:  # lost by a call that was made meanwhile: this is its CellDied
                    raise
                failed.append(error)
        if not self.alive:
            raise UsageError("this cell was closed while it asked a question")
        return answer

    def died_idle(self) -> CellDied | None:
        """The death of a cell while nothing was asked of it, or None: it lives, or its death is known."""
        if not self.alive or os.getpid() != self._owner:
            return None
        if not self._idle.poll(0):  # also POLLHUP: a cell without its fault pipe could not be examined
            return None
        self._phase = "idle"
        return self._gone()

    def watch(self) -> list[int]:
        """New descriptors, the caller's to close: one of them is readable once `died_idle` would tell of it.

        Raises:
            OSError: There is no descriptor left.
        """
        with contextlib.ExitStack() as stack:
            copies = []
            for fd in (self._process.pidfd, self._process.lines.fault_fd):
                copies.append(os.dup(fd))
                stack.callback(os.close, copies[-1])  # if there is none left for the next
            stack.pop_all()
        return copies

    def condemn(self, kind: Exit, why: str) -> CellDied:
        """Give up a cell that answered, but not as it should; returns the error to raise."""
        return self._lost(condemned=(kind, f"{why}; killed by the supervisor"))

    def ping(self, seconds: float) -> bool | None:
        """From any thread: whether it answers within so many seconds. None: it is in the middle of a call.

        One that does not is not given up: it may be slow, and of its death whoever works with it is told.
        """
        with self._quiet:
            if self._calls or self._process.is_waited_for:
                return None
            if not self.alive or os.getpid() != self._owner:
                return False
            with self._process.waited_for():  # its descriptors stay open
                try:
                    return self._answers(seconds)
                except (ProtocolError, ChannelClosed, OSError, ValueError):
                    return False

    def _answers(self, seconds: float) -> bool:
        if not self._unanswered:
            self._channel.post(Ping())
            self._unanswered = True
        sock, end = self._process.lines.sock.fileno(), time.monotonic() + seconds
        while (left := end - time.monotonic()) >= 0:
            ready = dict(self._poller.poll(min(left, _LOOK) * 1000))
            if ready.keys() - {sock} or ready.get(sock, select.POLLIN) != select.POLLIN:
                return False  # it has died
            if ready:
                return self._is_pong()
        return False

    def _is_pong(self) -> bool:
        try:
            frame = self._channel.receive()
        except ProtocolError as error:
            self._odd = f"sent a bad frame: {error}"
            return False
        self.heard, self._unanswered = time.monotonic(), False
        if not isinstance(frame, Pong):
            self._odd = "answered when it was not asked"
        return not self._odd

    def _await_pong(self, deadline: float | None) -> None:
        """Before it is sent a request: it has to have read what it was sent before."""
        if self._unanswered and not self._odd:
            if not isinstance(self._talk(None, deadline), Pong):
                self._odd = "answered when it was not asked"
            self._unanswered = False
        if self._odd:
            raise self._broken(self._odd)

    def kill(self) -> None:
        """SIGKILL the process, from any thread: who waits for its reply finds it dead."""
        self._process.signal(signal.SIGKILL)

    def close(self) -> None:
        """End the process and release everything. Idempotent; if it is interrupted, it goes on by itself."""
        if os.getpid() == self._owner:
            end = functools.partial(_end, self._process, self._drain, self._owner)
            self._closing.begin(end, f"close-{self._process.pid}")
            self._closing.result()
            if self._evidence:  # until that is there, the arena is read for it
                arena = self.arena
                self._evidence.add_done_callback(lambda _: arena.release())

    def _talk(self, frame: msgspec.Struct | None, deadline: float | None, fds: Sequence[int] = ()) -> object:
        """`_exchange`; a signal handler may close the cell meanwhile, and may call nothing else of it."""
        with self._process.waited_for():
            answer = self._exchange(frame, deadline, fds)
        self.heard = time.monotonic()
        return answer

    def _exchange(
        self, frame: msgspec.Struct | None, deadline: float | None, fds: Sequence[int] = ()
    ) -> object:
        self._post(frame, fds)
        sock, fault = self._process.lines.sock.fileno(), self._process.lines.fault_fd
        end = None if deadline is None else time.monotonic() + deadline
        closed = False
        while True:
            left = _LOOK if end is None else min(max(end - time.monotonic(), 0.0), _LOOK)
            ready = dict(self._poller.poll(left * 1000))
            if ready.get(sock, 0) & select.POLLIN:
                try:
                    return self._channel.receive()
                except ProtocolError as error:
                    raise self._broken(f"sent a bad frame: {error}") from error
                except ChannelClosed:
                    # Told of below: raised in here, it would be the context of a death that is kept, with all
                    # the frames of its traceback, and the arena in them.
                    closed = True
                if closed:
                    raise self._gone()
            if ready.get(fault, 0) & select.POLLIN:
                raise self._lost(held=True)
            if self._process.pidfd in ready or sock in ready:
                raise self._gone()
            if fault in ready:  # the child closed its end of the fault pipe, but lives
                self._poller.unregister(fault)
            if end is not None and time.monotonic() >= end:
                raise self.condemn(Exit.HANG, "no reply within the deadline")

    def _post(self, frame: msgspec.Struct | None, fds: Sequence[int]) -> None:
        if frame is None:  # an answer is awaited already
            return
        try:
            with contextlib.suppress(ChannelClosed):  # it died between two calls: who waits finds out how
                self._channel.post(frame, fds)
        except ProtocolError as error:
            raise self._broken(f"takes no answer: {error}") from error
        except (OSError, ValueError) as error:
            if self.alive:
                raise
            raise UsageError(_CLOSED) from error

    def _gone(self) -> CellDied:
        """End of file: dead, held (its fault is in the pipe), or alive and silent."""
        if not self.alive:
            raise UsageError(_CLOSED)
        fault, pidfd = self._process.lines.fault_fd, self._process.pidfd
        poller = select.poll()
        poller.register(fault, select.POLLIN)
        poller.register(pidfd, select.POLLIN)
        ready = dict(poller.poll(_CLOSE_GRACE_MS))
        if ready.get(fault, 0) & select.POLLIN:
            return self._lost(held=True)
        # A dying process closes its descriptors a moment before its pidfd tells of its end.
        poller.unregister(fault)
        if pidfd in ready or poller.poll(_CLOSE_GRACE_MS):
            return self._lost()
        return self._broken("closed its lines but lives")

    def _broken(self, what: str) -> CellDied:
        return self.condemn(Exit.PROTOCOL, f"the cell {what}")

    def _lost(self, *, held: bool = False, condemned: tuple[Exit, str] | None = None) -> CellDied:
        """Hand the process to the autopsy and return the error to raise."""
        process, now, caller = self._process, dt.datetime.now(dt.UTC), _caller_stack()

        def hand_over() -> Future[Evidence]:
            if not self._closing.take_over():
                raise UsageError(_CLOSED)
            why = condemned or self._drain.condemned
            death = autopsy.Death(process, self._drain, self._phase, self._oom_kills, held, why)
            self._evidence = autopsy.begin(death)
            return self._evidence

        if held:  # at once: a second thread that faults would end it
            process.signal(signal.SIGSTOP)
        incident = Incident(self._phase, now, apart(hand_over), caller)
        how = "crashed" if held else condemned[1] if condemned else "died"
        return CellDied(f"cell {process.pid}: {how}", incident)


def _end(process: Process, drain: Drain, owner: int) -> None:
    """As `abandon`, but let it end by itself, if it does so soon."""
    with contextlib.suppress(OSError):
        process.lines.sock.shutdown(socket.SHUT_RDWR)  # not closed: somebody may wait for a reply there
    poller = select.poll()
    poller.register(process.pidfd, select.POLLIN)
    poller.poll(_CLOSE_GRACE_MS)
    abandon(process, drain, owner)
