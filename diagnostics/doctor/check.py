"""What `doctor` says of one thing that it looked at."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import msgspec


class State(StrEnum):
    """How it stands with one thing."""

    OK = "ok"
    LACK = "lack"
    UNKNOWN = "unknown"  # it could not be tried


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    name: str
    state: State
    found: str  # in words
    costs: str = ""  # of a lack: evidence, work or speed; empty if it costs nothing today
    remedy: str = ""


def attempt(name: str, look: Callable[[], Check]) -> Check:
    """What was found, or that it could not be looked at."""
    try:
        return look()
    except (OSError, ValueError) as error:  # /proc or a cgroup that is hidden, or not as it should be
        return Check(name, State.UNKNOWN, f"{type(error).__name__}: {error}")


def in_words(size: int) -> str:
    """Bytes in decimal units: "170 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.0f} MB"
