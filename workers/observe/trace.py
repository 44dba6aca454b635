"""One choice of a request, or a batch, on its way: what is counted and told of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Protocol

from crumplezone.workers.observe.events import (
    Event,
    FirstToken,
    NewTokens,
    RequestAdmitted,
    RequestFinished,
    RequestQueued,
    RequestResumed,
)
from crumplezone.workers.protocol.generate.messages import Progress


class Book(Protocol):
    """Where it is noted.

    Attributes:
        lock: Held while something is changed; never while anybody is waited for.
    """

    lock: threading.RLock

    def came(self, trace: Trace) -> None:
        """It is on its way."""

    def left(self, trace: Trace, reason: str) -> bool:
        """It is done; False if it was not on its way."""

    def count(self, name: str, n: int = 1) -> None:
        """So many more."""

    def emit(self, event: Event) -> None:
        """Have an event told after the next `poke`."""

    def poke(self) -> None:
        """Tell what there is, beside. Without the lock."""


class Trace:
    """One choice of a request, or a batch, on its way. Before and after that, nothing is told of it.

    Args:
        index: The number that its caller gave it; None: it is a batch, of which nothing is told.

    Attributes:
        request: The number of its request; 0: it has not begun.
        choice: Its number among the request's.
        admitted: Whether it has a place.
        thread: Of its lane; 0: it has none.
        lost_at: When its cell was lost, where it has not gone on since; 0: it was not.
    """

    def __init__(self, index: int | None) -> None:
        self.index, self.request, self.choice = index, 0, 0
        self.thread, self.lost_at = 0, 0.0
        self._book: Book | None = None
        self._came = 0.0
        self._prompt = self._cached = self._tokens = 0

    @property
    def counted(self) -> bool:
        """Whether it is one of those that are counted and told of."""
        return self.index is not None

    @property
    def admitted(self) -> bool:
        """Whether it has a place."""
        return self.thread != 0

    def begin(self, book: Book, request: int, choice: int) -> None:
        """It comes. Under the lock."""
        self._book, self.request, self.choice, self._came = book, request, choice, time.monotonic()
        book.came(self)
        if self.counted:
            book.count("submitted")
            book.emit(RequestQueued(*self._named(self._came)))

    def admit(self, n_tokens: int) -> None:
        """It has a place, in the lane whose thread this is, and its prompt so many tokens."""
        if (book := self._book) is None:
            return
        with book.lock:
            if self._book is None:  # it ended meanwhile: its time was over, say
                return
            self.thread, self._prompt, now = threading.get_ident(), n_tokens, time.monotonic()
            book.emit(RequestAdmitted(*self._named(now), n_tokens, now - self._came))
        book.poke()

    def progress(self, progress: Progress) -> None:
        """Its cell told of it."""
        if (book := self._book) is None:
            return
        with book.lock:
            if self._book is None:
                return
            now, n = time.monotonic(), len(progress.tokens)
            if self.lost_at:
                book.count("recoveries")
                book.emit(RequestResumed(*self._named(now), now - self.lost_at))
                self.lost_at = 0.0
            if not self._tokens:
                self._cached = max(self._cached, min(progress.cached, self._prompt))
            if n:
                self._add(book, n, now)
        book.poke()

    def _add(self, book: Book, n: int, now: float) -> None:
        if not self._tokens:
            book.count("prompt_tokens", self._prompt)
            book.count("cached_tokens", self._cached)
            book.emit(FirstToken(*self._named(now), now - self._came))
        self._tokens += n
        book.count("generated_tokens", n)
        book.emit(NewTokens(*self._named(now), n, self._tokens))

    def finish(self, reason: str, reports: Sequence[str] = ()) -> None:
        """There will be no more of it; only the first time counts."""
        if (book := self._book) is None:
            return
        with book.lock:
            self._book = None
            if book.left(self, reason) and self.counted:
                counts = self._prompt, self._cached, self._tokens
                named = self._named(time.monotonic())
                book.emit(RequestFinished(*named, reason, *counts, tuple(reports)))
        book.poke()

    def _named(self, now: float) -> tuple[int, int, int, float]:
        assert self.index is not None
        return self.request, self.choice, self.index, now
