"""What the cell of a test tells: lines of JSON in a file in memory that its supervisor made.

A file, not the socket: what a test reports can be long, nobody has to read it while the test runs, and what
was written before a crash is there after it. The supervisor trusts none of it.
"""

from __future__ import annotations

import json
import os
from typing import Any, Literal

import msgspec

from crumplezone.reports.records.report import Frame

# As they are before a test puts others in their place, and until it has taken them back.
_dumps, _getpid, _write = json.dumps, os.getpid, os.write

MAX_BYTES = 64 << 20
"""Of the notes of one test. Longer ones are not read."""


class Reported(msgspec.Struct, tag="report", frozen=True):
    """A report of setup, call or teardown, as pytest serialises it."""

    report: dict[str, Any]


class Warned(msgspec.Struct, tag="warning", frozen=True):
    """A warning that was raised."""

    text: str
    module: str  # of its category
    category: str
    file: str
    line: int


class Left(msgspec.Struct, tag="left", frozen=True):
    """Python code calls os._exit, here."""

    stack: list[Frame]


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """The test came to its end.

    By pytest.exit() or KeyboardInterrupt, the session is to end too; "error" is an exception of a plugin.
    """

    by: Literal["", "exit", "interrupt", "error"] = ""
    why: str = ""
    status: int | None = None


Note = Reported | Warned | Left | Ended


class Notes:
    """The file. Made before the fork; the cell writes, the supervisor reads.

    Raises:
        OSError: There is no descriptor left.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("notes")
        self._writer = 0

    def begin(self) -> None:
        """Let this process write, and none that it forks: such a one may come back through all of pytest."""
        self._writer = _getpid()

    def write(self, note: Note) -> None:
        """Append a note, with strings in the place of what JSON has not."""
        if _getpid() == self._writer:
            plain = msgspec.to_builtins(note, str_keys=True, enc_hook=str)
            rest = memoryview(f"{_dumps(plain)}\n".encode())  # unlike msgspec, with half of a surrogate pair
            while rest:
                rest = rest[_write(self._fd, rest) :]

    def read(self) -> list[Note]:
        """What was written whole.

        Raises:
            ValueError: It is too much, or is not notes.
        """
        size = os.fstat(self._fd).st_size
        if size > MAX_BYTES:
            raise ValueError(f"reports, with what they captured, of {size} bytes: at most {MAX_BYTES}")
        lines = os.pread(self._fd, size, 0).split(b"\n")[:-1]
        try:
            return [msgspec.convert(json.loads(line), Note) for line in lines]
        except (RecursionError, msgspec.ValidationError) as error:
            raise ValueError(f"notes that are none ({error})") from error

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)
