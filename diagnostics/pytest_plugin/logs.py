"""Log records of a test's cell, as pytest's own process shows and remembers them."""

from __future__ import annotations

import logging
from collections import deque

_TAIL = 200  # records
_TEXT_MAX = 8192  # characters
_PLAIN_FORMAT = logging.Formatter("%(levelname)s %(name)s: %(message)s")  # of the log tail in other reports


class LogTail(logging.Handler):
    """Hands records to the handlers that the root logger has now, and remembers the last ones.

    Args:
        formatter: Of what is remembered.
    """

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._tail: deque[tuple[float, str, str]] = deque(maxlen=_TAIL)
        self._handlers = list(logging.root.handlers)

    def emit(self, record: logging.LogRecord) -> None:
        """Take one record."""
        shown, plain = self.format(record)[:_TEXT_MAX], _PLAIN_FORMAT.format(record)[:_TEXT_MAX]
        self._tail.append((record.created, shown, plain))
        for handler in self._handlers:
            if record.levelno >= handler.level:
                handler.handle(record)

    def since(self, moment: float) -> list[str]:
        """What was logged last, as pytest shows it, from some moment on (seconds since 1970)."""
        return [shown for created, shown, _ in list(self._tail) if created >= moment]

    def plain(self) -> list[str]:
        """What was logged last, as reports have it."""
        return [plain for *_, plain in list(self._tail)]
