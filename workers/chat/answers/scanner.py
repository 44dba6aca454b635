"""A text that comes in pieces, read by a coroutine that waits for more of it. Linear in time."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

_T = TypeVar("_T")
Reading = Generator[None, None, _T]
"""Yields where it needs more text."""

_SPACES = re.compile(r"\s*")
_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')
_SCALAR = re.compile(r"[^\s,}\]]*")


class EndError(Exception):
    """The text ended in the middle of a value."""


class Scanner:
    """What is left of a text, and what of it was taken.

    Every decision waits until no further piece can change it, so how the text is cut changes nothing.
    """

    def __init__(self) -> None:
        self._text, self._at, self._final = "", 0, False
        self._taken: list[str] | None = None

    def feed(self, piece: str, *, final: bool) -> None:
        """There is more; or no more."""
        self._text, self._at, self._final = self._text[self._at :] + piece, 0, final

    def record(self) -> None:
        """Keep what is taken from now on."""
        self._taken = []

    def recorded(self) -> str:
        """What was kept, which ends."""
        taken, self._taken = self._taken or [], None
        return "".join(taken)

    def take(self, n: int) -> str:
        """The next characters."""
        taken = self._text[self._at : self._at + n]
        self._at += n
        if self._taken is not None:
            self._taken.append(taken)
        return taken

    def peek(self) -> Reading[str]:
        """The next character; empty at the end."""
        while self._at == len(self._text) and not self._final:
            yield
        return self._text[self._at : self._at + 1]

    def match(self, mark: str) -> Reading[bool]:
        """Take this text, if it comes next."""
        while True:
            here = self._text[self._at : self._at + len(mark)]
            if here == mark:
                self.take(len(mark))
                return True
            if self._final or not mark.startswith(here):
                return False
            yield

    def spaces(self) -> Reading[None]:
        """Take all white space that comes next."""
        yield from self.every(_SPACES, lambda _: None)

    def every(self, pattern: re.Pattern[str], sink: Callable[[str], None], most: int = 2**62) -> Reading[int]:
        """Take what matches, a pattern of single characters, to the end; how many they are.

        Args:
            pattern: Matches any number of some characters.
            sink: Given each piece.
            most: Stop beyond so many.
        """
        n = 0
        while True:
            found = pattern.match(self._text, self._at)
            assert found is not None
            if found.end() > self._at:
                n += found.end() - self._at
                sink(self.take(found.end() - self._at))
            if self._at < len(self._text) or self._final or n > most:
                return n
            yield

    def until(self, mark: str, sink: Callable[[str], None]) -> Reading[bool]:
        """Take all before a mark, and the mark; False if there is none.

        Args:
            mark: Not empty.
            sink: Given what comes before, piece by piece.
        """
        while True:
            found = self._text.find(mark, self._at)
            end = found if found >= 0 else len(self._text) - (0 if self._final else self._begun(mark))
            if end > self._at:
                sink(self.take(end - self._at))
            if found >= 0:
                self.take(len(mark))
                return True
            if self._final:
                return False
            yield

    def _begun(self, mark: str) -> int:
        """How many of the last characters may be the beginning of a mark."""
        most = min(len(mark) - 1, len(self._text) - self._at)
        return next((n for n in range(most, 0, -1) if self._text.endswith(mark[:n])), 0)

    def string(self) -> Reading[str]:
        """Take a JSON string, with its quotes.

        Raises:
            EndError: It has no end.
        """
        parts = [self.take(1)]
        escaped = False
        while True:
            if escaped and self._at < len(self._text):
                parts.append(self.take(1))
                escaped = False
            elif found := _INSIDE.search(self._text, self._at):
                parts.append(self.take(found.end() - self._at))
                if found[0] == '"':
                    return "".join(parts)
                escaped = True
            else:
                parts.append(self.take(len(self._text) - self._at))
                yield from self._more()

    def value(self, sink: Callable[[str], None]) -> Reading[None]:
        """Take a JSON value, piece by piece. Brackets are counted, not compared.

        Raises:
            EndError: It has no end.
        """
        first = yield from self.peek()
        if first == '"':
            sink((yield from self.string()))
        elif first and first in "{[":
            yield from self._bracketed(sink)
        else:
            yield from self.every(_SCALAR, sink)

    def _bracketed(self, sink: Callable[[str], None]) -> Reading[None]:
        depth, quoted, escaped = 0, False, False
        while True:
            at = self._at
            while at < len(self._text):
                if escaped:
                    at, escaped = at + 1, False
                    continue
                found = (_INSIDE if quoted else _OUTSIDE).search(self._text, at)
                if found is None:
                    at = len(self._text)
                    break
                at = found.end()
                escaped = found[0] == "\\"
                quoted ^= found[0] == '"'
                depth += (found[0] in "{[") - (found[0] in "}]")
                if not depth:
                    sink(self.take(at - self._at))
                    return
            if at > self._at:
                sink(self.take(at - self._at))
            yield from self._more()

    def _more(self) -> Reading[None]:
        if self._final:
            raise EndError
        yield
