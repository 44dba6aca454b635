"""What listeners are told. Times are seconds of `time.monotonic`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class _OfRequest:
    """What all events of a request have: see `RequestQueued`."""

    request: int
    choice: int
    index: int
    at: float


@dataclass(frozen=True)
class RequestQueued(_OfRequest):
    """A request came, and waits for a place.

    Attributes:
        request: Its number in this decoder, from 1: `Stream.id`.
        choice: Which of its choices, from 0; each has events of its own.
        index: The number that its caller gave it, as in `Completion`.
        at: When.
    """


@dataclass(frozen=True)
class RequestAdmitted(_OfRequest):
    """It was tokenised, and has a place.

    Attributes:
        request, choice, index, at: As of `RequestQueued`.
        prompt_tokens: How many tokens its prompt has.
        waited: Seconds since it came.
    """

    prompt_tokens: int
    waited: float


@dataclass(frozen=True)
class FirstToken(_OfRequest):
    """Its first token is there. `NewTokens` follows.

    Attributes:
        request, choice, index, at: As of `RequestQueued`.
        waited: Seconds since it came.
    """

    waited: float


@dataclass(frozen=True)
class NewTokens(_OfRequest):
    """It has more tokens: one, or those of some steps.

    Attributes:
        request, choice, index, at: As of `RequestQueued`.
        tokens: How many came.
        total: How many it has.
    """

    tokens: int
    total: int


@dataclass(frozen=True)
class RequestResumed(_OfRequest):
    """It goes on after a crash: what comes next is from another cell.

    Attributes:
        request, choice, index, at: As of `RequestQueued`.
        stood: Seconds since the crash.
    """

    stood: float


@dataclass(frozen=True)
class RequestFinished(_OfRequest):
    """There will be no more of it.

    Attributes:
        request, choice, index, at: As of `RequestQueued`.
        reason: The ``finish_reason`` of its `Completion`; or "refused": the queue was full, say.
        prompt_tokens: How many tokens its prompt has; 0 if it was not tokenised.
        cached_tokens: How many of them were not computed.
        tokens: How many it got.
        reports: Of the crashes that it took part in.
    """

    reason: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    reports: tuple[str, ...]


@dataclass(frozen=True)
class CellLost:
    """A cell crashed, hung or was killed. Which, `ReportWritten` tells.

    Attributes:
        at: When that was noticed.
        requests: Those that were in flight in it.
        report: Directory of the report that is being written.
    """

    at: float
    requests: tuple[int, ...]
    report: str


@dataclass(frozen=True)
class ReportWritten:
    """The report of a crash is complete.

    Attributes:
        at: When.
        report: Its directory.
        exit: How the cell ended: "signal", "abort", "hang", "oom", "killed", ...
        signature: The same of two crashes that are the same: SHA-256, hexadecimal.
        title: Of the signature, for people.
        verdict: "batch-only", "input", "flaky", "environment", or an empty string: nothing has shown it.
    """

    at: float
    report: str
    exit: str
    signature: str
    title: str
    verdict: str


Event = (
    RequestQueued
    | RequestAdmitted
    | FirstToken
    | NewTokens
    | RequestResumed
    | RequestFinished
    | CellLost
    | ReportWritten
)


class Listener(Protocol):
    """Something to call with each event. It need not know all kinds of them; there may be more one day."""

    def __call__(self, event: Event, /) -> object:
        """On a thread of its own: it may take its time, and what it raises is logged."""
