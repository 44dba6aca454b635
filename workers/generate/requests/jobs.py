"""What waits to be done in a lane: prompts and batches, with the futures of their results."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from crumplezone.errors import CrumplezoneError, UsageError
from crumplezone.sandbox.host.errands import BesideLog
from crumplezone.workers.batch.call import DecodeOptions
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.results import Result, Rung
from crumplezone.workers.generate.requests.completion import Completion
from crumplezone.workers.generate.requests.made import Made
from crumplezone.workers.generate.requests.request import Request
from crumplezone.workers.observe.trace import Trace

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


class PromptJob:
    """One choice of a request, to be made in a lane.

    Whoever has asked holds the rest, and is not held by this: what nobody waits for any more is dropped.

    Args:
        index: The request's number for the caller.
        request: What is asked.
        seed: Of this choice.
        on_end: Called once, when there will be no more of it.

    Attributes:
        made: What there is of it.
        deadline: When it ends with what there is, by `time.monotonic`; None: never.
        dropped: Nobody wants it any more.
        nudge: Has the lane that has it look at it soon.
        failure: Why it is to be raised that there is no completion.
        trace: What is told of it.
        servers: The threads that may do it.
    """

    def __init__(self, index: int, request: Request, seed: int, on_end: Callable[[], None]) -> None:
        self.index, self.request = index, request
        self.sampling = dataclasses.replace(request.sampling, seed=seed)
        self.made = Made(request.stop)
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout
        self.dropped = False
        self.nudge = _nobody
        self.failure: Exception | None = None
        self.trace = Trace(index)
        self.servers: Container[int] = ()
        self._on_end = on_end
        self._ending = threading.Lock()  # held for good by who ends it

    @property
    def over(self) -> bool:
        """Whether it was dropped, or has ended."""
        return self.dropped or self.made.finish_reason != ""

    @property
    def unwanted(self) -> bool:
        """Whether it need not be done any more: it is over, or its time is."""
        return self.over or (self.deadline is not None and time.monotonic() >= self.deadline)

    def drop(self) -> None:
        """Nobody wants it any more. Also for finalizers: it takes no lock."""
        self.dropped = True
        self.nudge()

    def end(
        self,
        reason: str,
        rung: Rung = Rung.NATIVE,
        error: Exception | None = None,
        reports: Sequence[str] = (),
    ) -> None:
        """There will be no more of it; only the first time counts. On a thread of this package."""
        self.made.end(reason, rung, error, reports)
        if self._ending.acquire(blocking=False):
            on_end, self._on_end = self._on_end, _nobody
            self.nudge = _nobody  # neither whoever has asked nor its lane is kept
            self.trace.finish(self.made.finish_reason, self.made.reports)
            on_end()

    def expire(self) -> None:
        """Its time is over."""
        nudge = self.nudge
        self.end("timeout")
        nudge()

    def completion(self) -> Completion:
        """What there is of it."""
        made, request = self.made, self.request
        told = request.logprobs is not None
        return Completion(
            index=self.index,
            prompt=request.prompt,
            text=made.text,
            tokens=list(made.tokens),
            finish_reason=made.finish_reason or ("cancelled" if self.dropped else ""),
            rung=made.rung,
            error=made.error if isinstance(made.error, CrumplezoneError) else None,
            reports=tuple(made.reports),
            stop=made.stop,
            logprobs=list(made.logprobs) if told else None,
            prompt_logprobs=[None, *made.prompt_logprobs] if told and request.echo else None,
            prompt_tokens=made.prompt_tokens,
            cached_tokens=made.cached_tokens or 0,
            seed=self.sampling.seed,
        )


def _nobody() -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class BatchJob:
    """A valid batch to be decoded from empty memory."""

    columns: Columns
    ask: DecodeOptions
    future: Awaited[Result] = field(default_factory=Awaited)
    trace: Trace = field(default_factory=lambda: Trace(None))

    def __post_init__(self) -> None:
        trace = self.trace
        self.future.add_done_callback(lambda _: trace.finish("done"))

    @property
    def unwanted(self) -> bool:
        """Whether it need not be done any more."""
        return self.future.cancelled()


Job = PromptJob | BatchJob


def drop(job: Job) -> bool:
    """Whether it need not be done any more; those who wait for that are told."""
    if not job.unwanted:
        return False
    if isinstance(job, BatchJob):
        job.future.set_running_or_notify_cancel()
    else:
        job.end("cancelled" if job.dropped else "timeout")
    return True


def deliver(future: Future[_T], result: _T | Exception) -> None:
    """Give a result, or why there is none, to whoever still wants it.

    Until then the future is pending, and can be cancelled.
    """
    if future.set_running_or_notify_cancel():
        with _callbacks():
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


def fail(job: Job, error: Exception) -> None:
    """Tell whoever still waits that there will be no result."""
    if isinstance(job, BatchJob):
        deliver(job.future, error)
    else:
        job.failure = error
        job.end("error", error=error)


@contextlib.contextmanager
def _callbacks() -> Iterator[None]:
    """Run the callbacks of a future. It logs their exceptions; what else they raise must not end a lane."""
    try:
        yield
    except BaseException:  # noqa: BLE001 - SystemExit, for one
        _log.exception("a callback of a future wanted to end the thread")
