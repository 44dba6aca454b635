"""What an engine has done so far, as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """What a decoder has done so far. Each choice of a request counts as one.

    ``submitted`` is ``queued + running + sum(finished.values())``.

    Attributes:
        submitted: Requests that came.
        queued: Those that wait for a place.
        running: Those in flight.
        places: How many can be in flight; 0 as long as that is not known.
        finished: The others, by their ``finish_reason``, or "refused".
        prompt_tokens: Of the requests that have a token.
        cached_tokens: How many of these were not computed.
        generated_tokens: That were drawn.
        native_calls: Of llama.cpp, to generate and to decode, that came back.
        native_seconds: That was waited for them, what belongs to them in the cell included.
        crashes: Cells that crashed, hung, or were given up; counted once their reports are complete.
        kills: Cells that somebody else killed, likewise.
        recoveries: Requests that went on after the loss of their cell, once for each.
        reports: That were written.
        unheard: Events that a listener was not told, since too many waited for it.
    """

    submitted: int
    queued: int
    running: int
    places: int
    finished: Mapping[str, int]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    native_calls: int
    native_seconds: float
    crashes: int
    kills: int
    recoveries: int
    reports: int
    unheard: int
