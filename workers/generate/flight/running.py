"""A prompt in flight, and what it has produced so far."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from crumplezone.errors import CrumplezoneError, InputError
from crumplezone.workers.batch.results import Rung
from crumplezone.workers.generate.requests.jobs import PromptJob
from crumplezone.workers.protocol.generate.messages import Join, Progress

Joining = tuple[Join, npt.NDArray[np.int32]]


@dataclass
class Running:
    """A prompt in flight and everything it has produced so far.

    Attributes:
        reports: Of the crashes among these.
    """

    job: PromptJob
    seq_id: int
    prompt_tokens: npt.NDArray[np.int32]
    max_tokens: int
    reports: list[str] = field(init=False)
    problem: str = ""  # why the cell refused it

    def __post_init__(self) -> None:
        self.reports = self.job.made.reports
        self.job.trace.admit(len(self.prompt_tokens))

    @property
    def produced(self) -> list[int]:
        """The tokens that were delivered."""
        return self.job.made.tokens

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """All of them, int32, shape (n,)."""
        return np.concatenate([self.prompt_tokens, np.array(self.produced, np.int32)])

    def take(self, progress: Progress) -> None:
        """Add what came back."""
        self.problem = progress.problem
        self.job.made.take(progress)
        self.job.trace.progress(progress)

    def done(self, reason: str, rung: Rung, error: CrumplezoneError | None = None) -> None:
        """Give the caller what there is."""
        if reason == "refused":
            reason, error = "error", InputError("grammar", self.job.sampling.grammar, self.problem)
        self.job.end("stop" if reason == "word" else reason, rung, error)

    def join(self) -> Joining:
        """Ask to continue from the last token that was delivered."""
        tokens = self.tokens
        request, made = self.job.request, self.job.made
        told = request.logprobs is not None
        chosen = 0 if request.made > request.n else -1  # by these the best are chosen
        unread = 1 + len(made.prompt_logprobs) < len(self.prompt_tokens)
        join = Join(
            self.seq_id,
            len(tokens),
            len(self.prompt_tokens),
            dataclasses.replace(self.job.sampling, max_tokens=self.max_tokens),
            stops=[stop.encode() for stop in request.stop],
            stop_tokens=list(request.stop_token_ids),
            logprobs=chosen if request.logprobs is None else request.logprobs,
            prompt_logprobs=told and request.echo and unread,
        )
        return join, tokens


def refuse(job: PromptJob, error: CrumplezoneError, *reports: str) -> None:
    """End a prompt that took no place."""
    job.end("error", error=error, reports=reports)
