"""What became of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from crumplezone.errors import CrumplezoneError
from crumplezone.workers.batch.results import Rung


@dataclass(frozen=True)
class Completion:
    """One finished prompt.

    Attributes:
        index: Its place among the prompts.
        prompt: The prompt itself.
        text: What the model added.
        tokens: The same as token ids.
        finish_reason: ``"stop"`` (end of generation), ``"length"``, or ``"error"``.
        rung: The rung that finished it.
        error: Why it failed, or None.
        reports: Crash reports of the jobs it took part in.
    """

    index: int
    prompt: str
    text: str
    tokens: list[int]
    finish_reason: str
    rung: Rung
    error: CrumplezoneError | None = None
    reports: tuple[str, ...] = ()


def failed(index: int, prompt: str, error: CrumplezoneError, reports: tuple[str, ...] = ()) -> Completion:
    """The completion of a prompt that never began."""
    return Completion(index, prompt, "", [], "error", Rung.NATIVE, error, reports)
