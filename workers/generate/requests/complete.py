"""Many requests, side by side: completions in order, or as they come."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from crumplezone.errors import InputError, ShortageError, UsageError
from crumplezone.workers.generate.requests.completion import Completion, failed
from crumplezone.workers.generate.requests.jobs import PromptJob, check_waiting
from crumplezone.workers.generate.requests.order import Order, Told

_EARLY_MAX = 1024  # completions that wait for one before them; while there are as many, nothing more is read


class Lanes(Protocol):
    """Where jobs go.

    Attributes:
        closing: Called when they are closed.
    """

    closing: set[Callable[[], object]]

    @property
    def places(self) -> int:
        """How many prompts can be in flight."""

    def put(self, jobs: Sequence[PromptJob], *, wait: bool = False) -> None:
        """Give the jobs of one request to the lanes."""


class _Reader:
    """Reads prompts on a thread of its own, a bounded number ahead of who takes their completions.

    Args:
        lanes: Where they go.
        order: Makes a request of a number and a prompt.
        prompts: Numbers and prompts.
        ahead: How many may be read that nobody has taken.

    Attributes:
        read: How many there were; None: there may be more.
        raised: What the source has raised.
        servers: Threads that must not wait for it.
    """

    def __init__(
        self,
        lanes: Lanes,
        order: Callable[[int, object], Order],
        prompts: Iterable[tuple[int, object]],
        ahead: int,
    ) -> None:
        self._lanes, self._order, self._prompts = lanes, order, prompts
        self._stopped = False
        self._begun: dict[int, Order] = {}
        # Neither has a lock that a signal handler or the collector could find held.
        self._permits = queue.SimpleQueue[None]()
        self._done = queue.SimpleQueue[Told | None]()
        self.read: int | None = None
        self.raised: BaseException | None = None
        self.servers: Container[int] = ()
        self._pid = os.getpid()
        self._closed = partial(self._done.put, UsageError("this decoder was closed in the middle of this"))
        self.allow(ahead)

    def begin(self) -> None:
        """Begin to read."""
        self._lanes.closing.add(self._closed)
        try:
            threading.Thread(target=self._run, name="prompts", daemon=True).start()
        except RuntimeError as error:
            raise ShortageError("a thread that reads the prompts", error) from error

    def allow(self, more: int = 1) -> None:
        """Let so many more be read."""
        for _ in range(more):
            self._permits.put(None)

    def take(self) -> Completion | None:
        """The next completion, whichever it is; None: the source is at its end.

        Raises:
            Exception: There is no completion: the decoder was closed, say.
            UsageError: It would have no end to wait for it here.
        """
        if self._done.empty():
            if os.getpid() != self._pid:
                raise UsageError("this was begun before a fork: begin it in this process")
            check_waiting(self.servers)
        told = self._done.get()
        if isinstance(told, Exception):
            raise told
        if told is not None:
            self._begun.pop(told.index, None)
        return told

    def stop(self) -> None:
        """Give up what is in flight, and read no more. Also for finalizers."""
        self._stopped = True
        self._lanes.closing.discard(self._closed)
        self.allow()
        for order in list(self._begun.values()):
            order.drop()

    def _run(self) -> None:
        read = 0
        try:
            for index, prompt in self._allowed():
                self._begin(index, prompt)
                read += 1
        except BaseException as error:  # noqa: BLE001 - the caller's, to be raised in its turn
            self.raised = error
        self.read = read
        self._done.put(None)

    def _allowed(self) -> Iterator[tuple[int, Any]]:
        """Prompts, as many as there are permits."""
        source = iter(self._prompts)
        while True:
            self._permits.get()
            if self._stopped:
                return
            try:
                prompt = next(source)
            except StopIteration:
                return
            if self._stopped:
                return
            yield prompt

    def _begin(self, index: int, prompt: Any) -> None:
        try:
            order = self._order(index, prompt)
        except InputError as error:
            self._done.put(failed(index, prompt, error))
            return
        order.tell = self._done.put
        self._begun[index] = order
        if self._stopped:  # it may not have seen this one
            order.drop()
        try:
            self._lanes.put(order.jobs, wait=True)
        except UsageError:  # nothing more is taken: after what was
            del self._begun[index]
            raise
        except Exception as error:  # noqa: BLE001 - nothing more can be done
            self._done.put(error)
        self.servers = order.servers


def complete(
    lanes: Lanes,
    order: Callable[[int, object], Order],
    prompts: Iterable[tuple[int, object]],
    *,
    ordered: bool,
) -> Generator[Completion, None, None]:
    """Complete numbered prompts; twice as many as can be in flight are read ahead.

    Args:
        lanes: Where they go.
        order: Makes a request of a number and a prompt.
        prompts: Numbers and prompts.
        ordered: Yield in the order of the numbers, which begin at 0; else as they finish.
    """
    reader = _Reader(lanes, order, prompts, 2 * lanes.places)
    early: dict[int, Completion] = {}
    taken = withheld = due = 0
    try:
        reader.begin()
        while reader.read is None or taken < reader.read:
            completion = reader.take()
            if completion is None:
                continue
            taken, withheld = taken + 1, withheld + 1
            early[completion.index] = completion
            ready = [completion.index]
            if ordered:
                ready = list(_following(early, due))
                due += len(ready)
            if len(early) - len(ready) < _EARLY_MAX:
                reader.allow(withheld)
                withheld = 0
            for index in ready:
                yield early.pop(index)
    finally:
        reader.stop()
    if reader.raised:
        raise reader.raised


def _following(early: Container[int], due: int) -> Iterator[int]:
    """Those that are due, one after the other."""
    while due in early:
        yield due
        due += 1
