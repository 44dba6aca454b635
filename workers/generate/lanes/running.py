"""A prompt in flight, and what it has produced so far."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from crumplezone.errors import CrumplezoneError
from crumplezone.workers.batch.results import Rung
from crumplezone.workers.generate.requests.jobs import PromptJob
from crumplezone.workers.protocol.generate.messages import Join, Progress

Joining = tuple[Join, npt.NDArray[np.int32]]


@dataclass
class Running:
    """A prompt in flight and everything it has produced so far.

    Attributes:
        falls: How often the native rung failed while it was in flight.
        reports: Of the crashes among these.
    """

    job: PromptJob
    seq_id: int
    prompt_tokens: npt.NDArray[np.int32]
    max_tokens: int
    falls: int = 0
    reports: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.reports = self.job.made.reports

    @property
    def produced(self) -> list[int]:
        """The tokens that were delivered."""
        return self.job.made.tokens

    def take(self, progress: Progress) -> None:
        """Add what came back."""
        self.job.made.take(progress)

    def done(self, reason: str, rung: Rung, error: CrumplezoneError | None = None) -> None:
        """Give the caller what there is."""
        self.job.end("stop" if reason == "word" else reason, rung, error)

    def join(self) -> Joining:
        """Ask to continue from the last token that was delivered."""
        tokens = np.concatenate([self.prompt_tokens, np.array(self.produced, np.int32)])
        request, made = self.job.request, self.job.made
        told = request.logprobs is not None
        chosen = 0 if request.made > request.n else -1  # by these the best are chosen
        unread = 1 + len(made.prompt_logprobs) < len(self.prompt_tokens)
        join = Join(
            self.seq_id,
            len(tokens),
            len(self.prompt_tokens),
            dataclasses.replace(self.job.sampling, max_tokens=self.max_tokens - len(self.produced)),
            stops=[stop.encode() for stop in request.stop],
            stop_tokens=list(request.stop_token_ids),
            logprobs=chosen if request.logprobs is None else request.logprobs,
            prompt_logprobs=told and request.echo and unread,
        )
        return join, tokens


def refuse(job: PromptJob, error: CrumplezoneError, *reports: str) -> None:
    """End a prompt that took no place."""
    job.end("error", error=error, reports=reports)
