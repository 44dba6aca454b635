"""A request as its caller holds it: a future of what comes of it, and the text as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, Self

from crumplezone.workers.generate.requests.completion import Completion
from crumplezone.workers.generate.requests.jobs import Awaited, deliver
from crumplezone.workers.generate.requests.made import Made
from crumplezone.workers.generate.requests.order import Order, Told


class Stream(Awaited[Completion]):
    """A request on its way: the future of its `Completion`, and an iterator over its text.

    It can be awaited, and iterated over with ``async for``. It can be cancelled at any time before it is
    done: the place of its sequence is then given to another. So it is at the end of an ``async with``, and
    when nobody holds it any more, unless it has a callback.
    """

    def __init__(self, order: Order) -> None:
        self._order = order  # first: `__del__` is called wherever this is interrupted
        super().__init__()
        self._kept = _Kept()
        order.tell = _Tell(weakref.ref(self), self._kept)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The text of each of the ``n`` choices, to iterate over; that of the stream is the first."""
        return tuple(Choice(self, made) for made in self._order.shown)

    @property
    def completion(self) -> Completion:
        """What has been made so far; of a request that was cancelled, all that will be."""
        return self._order.completion()

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt has; 0 as long as that is not known."""
        return self._order.jobs[0].made.prompt_tokens

    def cancel(self) -> bool:
        """Give it up, if it is not done. `completion` has what was made."""
        cancelled = super().cancel()
        if cancelled:
            self._order.cancel()
        return cancelled

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """See `Future`. From now on it is held until it is done."""
        self._kept.stream = self
        super().add_done_callback(fn)
        if self.done():
            self._kept.stream = None

    def check(self) -> None:
        """Raise `UsageError` where a wait would have no end."""
        self.served_by = self._order.servers
        super().check()

    def __iter__(self) -> Iterator[str]:
        """The text, piece by piece as it comes: the first token at once, then small groups.

        Raises:
            CrumplezoneError: The request failed, after what was yielded.
            CancelledError: It was cancelled.
        """
        return iter(self.choices[0])

    def __aiter__(self) -> Choice:
        """As iterating."""
        return self.choices[0]

    def __await__(self) -> Generator[Any, None, Completion]:
        """The completion. A task that is cancelled while it waits cancels the request."""
        return asyncio.wrap_future(self).__await__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        self._order.drop()


class Choice:
    """The text of one choice of a `Stream`, piece by piece as it comes; also with ``async for``.

    What is unread comes in one piece, so that a reader who is late is not late for long.
    """

    def __init__(self, stream: Stream, made: Made) -> None:
        self._stream, self._made = stream, made

    def __iter__(self) -> Iterator[str]:
        """As `Stream` does."""
        while True:
            self._stream.check()
            if piece := self._made.unread():
                yield piece
            elif self._ended():
                return
            else:
                bell = queue.SimpleQueue[None]()
                self._made.on_news(lambda bell=bell: bell.put(None))  # type: ignore[misc]
                bell.get()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """The next piece."""
        loop = asyncio.get_running_loop()
        while True:
            self._stream.check()
            if piece := self._made.unread():
                return piece
            if self._ended():
                raise StopAsyncIteration
            news = asyncio.Event()

            def bell(news: asyncio.Event = news) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                    loop.call_soon_threadsafe(news.set)

            self._made.on_news(bell)
            try:
                await news.wait()
            finally:
                self._made.forget(bell)

    def _ended(self) -> bool:
        """Whether there will be no more.

        Raises:
            CrumplezoneError: The request failed.
            CancelledError: It was cancelled.
        """
        if not self._made.finish_reason or self._made.has_news:
            return False
        if self._made.error:
            raise self._made.error
        if self._made.finish_reason == "cancelled":
            raise CancelledError
        return True


class _Kept:
    """Holds a stream that has callbacks, as long as they are to be called."""

    stream: Stream | None = None


class _Tell:
    """Tells a stream what came of its request, if it is still there."""

    def __init__(self, stream: weakref.ref[Stream], kept: _Kept) -> None:
        self._stream, self._kept = stream, kept

    def __call__(self, told: Told) -> None:
        stream, self._kept.stream = self._stream(), None
        if stream is not None:
            deliver(stream, told)
