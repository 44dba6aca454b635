"""What waits to be done in a lane: prompts and batches, with the futures of their results."""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import queue
import threading
from collections.abc import Container, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from crumplezone.errors import UsageError
from crumplezone.sandbox.host.errands import BesideLog
from crumplezone.workers.batch.call import DecodeOptions
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.results import Result
from crumplezone.workers.generate.requests.completion import Completion
from crumplezone.workers.protocol.generate.sampling import Sampling

_T = TypeVar("_T")

_log = BesideLog(logging.getLogger(__name__))


def check_waiting(servers: Container[int]) -> None:
    """Raise `UsageError` if this thread is one of those that are to do what it waits for."""
    if threading.get_ident() in servers:
        raise UsageError(
            "a callback of a future waits for the thread that it is called on: have another thread wait"
        )


class Awaited(Future[_T]):
    """A future that refuses to have somebody wait for it for ever.

    That is the thread that is to do its job, and a fork of its process: there is nobody to do it.

    Attributes:
        served_by: The threads that may do it.
    """

    served_by: Container[int] = ()

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()

    def result(self, timeout: float | None = None) -> _T:
        """See `Future`."""
        self.check()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See `Future`."""
        self.check()
        return super().exception(timeout)

    def check(self) -> None:
        """Raise `UsageError` where a wait would have no end."""
        forked = os.getpid() != self._pid
        # Asked first: `done` takes a lock, and a signal handler may come between taking and releasing it.
        if (forked or threading.get_ident() in self.served_by) and not self.done():
            if forked:
                raise UsageError("this was asked for before a fork: ask for it in this process")
            check_waiting(self.served_by)


class Stream(Awaited[Completion]):
    """A prompt on its way: the future of its `Completion`, and an iterator over its text.

    It can be cancelled at any time before it is done: the place of its sequence is then given to another.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.add_done_callback(lambda _: self._end())

    def feed(self, text: bytes, *, final: bool = False) -> None:
        """For the lane: more text, which may end inside a character."""
        if piece := self._decoder.decode(text, final):
            self._pieces.put(piece)

    def __iter__(self) -> Iterator[str]:
        """The text, piece by piece as it comes: the first token at once, then small groups.

        Raises:
            CrumplezoneError: The prompt failed, after what was yielded.
            CancelledError: It was cancelled.
        """
        while True:
            self.check()
            if (piece := self._pieces.get()) is None:
                break
            yield piece
        self._pieces.put(None)  # for whoever iterates again
        if error := self.result().error:
            raise error

    def _end(self) -> None:
        self.feed(b"", final=True)
        self._pieces.put(None)


@dataclass(frozen=True)
class PromptJob:
    """A prompt to be completed.

    Attributes:
        index: Its number for the caller.
    """

    index: int
    prompt: str
    sampling: Sampling
    future: Stream = field(default_factory=Stream)


@dataclass(frozen=True)
class BatchJob:
    """A valid batch to be decoded from empty memory."""

    columns: Columns
    ask: DecodeOptions
    future: Awaited[Result] = field(default_factory=Awaited)


Job = PromptJob | BatchJob


def drop(job: Job) -> bool:
    """Whether nobody wants it any more; those who wait for that are told."""
    return job.future.cancelled() and not job.future.set_running_or_notify_cancel()


def deliver(future: Future[_T], result: _T) -> None:
    """Give a result to whoever still wants it. Until then the future is pending, and can be cancelled."""
    if future.set_running_or_notify_cancel():
        with _callbacks():
            future.set_result(result)


def fail(job: Job, error: BaseException) -> None:
    """Tell whoever still waits that there will be no result."""
    if job.future.set_running_or_notify_cancel():
        with _callbacks():
            job.future.set_exception(error)


@contextlib.contextmanager
def _callbacks() -> Iterator[None]:
    """Run the callbacks of a future. It logs their exceptions; what else they raise must not end a lane."""
    try:
        yield
    except BaseException:  # noqa: BLE001 - SystemExit, for one
        _log.exception("a callback of a future wanted to end the thread")
