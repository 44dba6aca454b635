"""Where a text ends by one of its stop strings, and what of it may still become one. In UTF-8 bytes."""

from __future__ import annotations

from collections.abc import Sequence


def first_stop(text: bytes | bytearray, stops: Sequence[bytes], begin: int = 0) -> int:
    """Where the stop string begins that is complete before all others in a text, or -1.

    So it does not matter in which pieces the text came.

    Args:
        text: All of it.
        stops: None of them empty.
        begin: Nothing before this has to be looked at.
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop, begin)) >= 0]
    return min(found)[1] if found else -1


def open_end(text: bytes | bytearray, stops: Sequence[bytes]) -> int:
    """How many bytes at the end of a text may be the beginning of a stop string that is not complete."""
    longest = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return longest
