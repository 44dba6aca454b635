"""What became of a request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from crumplezone.errors import CrumplezoneError
from crumplezone.workers.batch.results import Rung
from crumplezone.workers.generate.requests.request import Prompt
from crumplezone.workers.protocol.generate.messages import Logprob


@dataclass(frozen=True)
class Completion:
    """One finished request.

    Two are equal if the same came of them: seed and cached tokens are not compared.

    Attributes:
        index: Its place among the prompts.
        prompt: The prompt itself: a text, or a tuple of token ids and texts.
        text: What the model added, up to the stop string; with ``echo``, behind the prompt.
        tokens: What it added as token ids, those of the stop string too.
        finish_reason: ``"stop"`` (end of generation, a stop string or token), ``"length"``, ``"error"``,
            ``"cancelled"`` or ``"timeout"``; ``""`` where it is not finished.
        rung: The rung that finished it.
        error: Why it failed, or None.
        reports: Crash reports of the jobs it took part in.
        stop: The stop string that ended it, or None.
        logprobs: Of each of ``tokens``, if they were asked for.
        prompt_logprobs: Of each token of the prompt, if they were asked for: of the first, None.
        prompt_tokens: How many tokens the prompt has; 0 if it was not tokenised.
        cached_tokens: How many of these were in memory, and not computed.
        seed: With which it can be had again.
        others: The other choices, where ``n`` is more than 1.
    """

    index: int
    prompt: Prompt
    text: str
    tokens: list[int]
    finish_reason: str
    rung: Rung
    error: CrumplezoneError | None = None
    reports: tuple[str, ...] = ()
    stop: str | None = None
    logprobs: list[Logprob] | None = None
    prompt_logprobs: list[Logprob | None] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = field(default=0, compare=False)
    seed: int = field(default=0, compare=False)
    others: tuple[Completion, ...] = ()

    @property
    def choices(self) -> tuple[Completion, ...]:
        """All ``n`` of them; the first is this one itself."""
        return (self, *self.others)


def failed(index: int, prompt: Prompt, error: CrumplezoneError) -> Completion:
    """The completion of a prompt that never began."""
    return Completion(index, prompt, "", [], "error", Rung.NATIVE, error)


def best(made: Sequence[tuple[Completion, Sequence[Logprob]]], n: int) -> list[Completion]:
    """So many of these: whose tokens are the likeliest in the mean comes first, who failed comes last."""
    return [completion for completion, _ in sorted(made, key=_merit, reverse=True)[:n]]


def chosen(made: Sequence[Completion]) -> Completion:
    """Several completions of one request as one."""
    first, *others = made
    return dataclasses.replace(first, others=tuple(others))


def _merit(made: tuple[Completion, Sequence[Logprob]]) -> tuple[bool, float]:
    completion, logprobs = made
    mean = math.fsum(each.logprob for each in logprobs) / len(logprobs) if logprobs else -math.inf
    return completion.error is None, mean
