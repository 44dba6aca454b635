"""A prompt in flight, and what it has produced so far."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from crumplezone.errors import CrumplezoneError, InputError
from crumplezone.workers.batch.results import Rung
from crumplezone.workers.generate.requests.completion import Completion, failed
from crumplezone.workers.generate.requests.jobs import PromptJob, deliver
from crumplezone.workers.protocol.generate.messages import Join, Progress
from crumplezone.workers.protocol.generate.sampling import SEEDS

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
    produced: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    falls: int = 0
    reports: list[str] = field(default_factory=list)
    problem: str = ""  # why the cell refused it

    def take(self, progress: Progress) -> None:
        """Add what came back."""
        self.produced += progress.tokens
        self.text += progress.text
        self.problem = progress.problem
        self.job.future.feed(progress.text)

    def done(self, reason: str, rung: Rung, error: CrumplezoneError | None = None) -> None:
        """Give the caller what there is."""
        job, text = self.job, self.text.decode("utf-8", "replace")
        reports = tuple(self.reports)
        if reason == "refused":
            reason, error = "error", InputError("grammar", job.sampling.grammar, self.problem)
        elif reason == "word":
            reason = "stop"
        completion = Completion(job.index, job.prompt, text, self.produced, reason, rung, error, reports)
        deliver(job.future, completion)

    def join(self) -> Joining:
        """Ask to continue from the last token that was delivered."""
        tokens = np.concatenate([self.prompt_tokens, np.array(self.produced, np.int32)])
        sampling = dataclasses.replace(
            self.job.sampling,
            max_tokens=self.max_tokens,
            seed=(self.job.sampling.seed + self.job.index) % SEEDS,
        )
        return Join(self.seq_id, len(tokens), len(self.prompt_tokens), sampling), tokens


def refuse(job: PromptJob, error: CrumplezoneError, *reports: str) -> None:
    """End a prompt that took no place."""
    deliver(job.future, failed(job.index, job.prompt, error, reports))
