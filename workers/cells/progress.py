"""The sequences in flight in one cell, and what a reply to `Generate` may say of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crumplezone.workers.protocol.generate.messages import (
    PROBLEM_MAX,
    Generated,
    Join,
    Progress,
)

_TEXT_MAX = 4096  # bytes of a token; one that is cut inside a character comes with the next


@dataclass
class _Flight:
    """A sequence in flight.

    Attributes:
        join: What was asked for.
        left: Tokens that it may still produce.
        produced: Those that it did.
        prompt: Tokens of its prompt whose probabilities are still to be told.
        read: Tokens that its memory was said to hold.
        cached: Of these, those that were not computed; None until some are read.
    """

    join: Join
    left: int
    prompt: int
    produced: int = 0
    read: int = 0
    cached: int | None = None


class ProgressChecker:
    """Bookkeeping against a cell that invents progress, or claims it for ever without making any.

    Args:
        n_vocab: Token ids are below this.
    """

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab = n_vocab
        self._flights: dict[int, _Flight] = {}

    def join(self, join: Join) -> None:
        """A prompt takes a sequence."""
        told = join.n_prompt - 1 if join.prompt_logprobs else 0
        self._flights[join.seq_id] = _Flight(join, join.sampling.max_tokens - join.drawn, told)

    def leave(self, seq_id: int) -> None:
        """A sequence is given up."""
        self._flights.pop(seq_id, None)

    def land(self, generated: Generated) -> str:
        """Account for a reply.

        Args:
            generated: The reply.

        Returns:
            What no honest cell would have said, or an empty string.
        """
        seq_ids = [progress.seq_id for progress in generated.progress]
        if not self._flights and not seq_ids:  # all that were in flight have left
            return ""
        if not seq_ids or len(set(seq_ids)) < len(seq_ids) or not self._flights.keys() >= set(seq_ids):
            return f"told of the sequences {seq_ids[:8]}, {sorted(self._flights)[:8]} are in flight"
        read = self._read
        for progress in generated.progress:
            if problem := self._advance(progress):
                return problem
        if not any(progress.tokens or progress.finished for progress in generated.progress):
            # Those that generate come first, and prompts that wait for another's prefix wait for one that is
            # being read. How much may be read is bounded: see `_memory`.
            if any(map(_owes, self._flights.values())):
                return "told of no token although every prompt has been read"
            if self._read <= read:
                return "told of no token, and nothing that was read"
        return ""

    def _advance(self, progress: Progress) -> str:
        flight, seq_id = self._flights[progress.seq_id], progress.seq_id
        flight.left -= len(progress.tokens)
        flight.produced += len(progress.tokens)
        if flight.left < 0 or (flight.left == 0 and not progress.finished):
            return f"went on with sequence {seq_id} after its last token"
        if len(progress.text) > _TEXT_MAX * (1 + len(progress.tokens)):
            return f"made {len(progress.text)} bytes of {len(progress.tokens)} tokens"
        if max(progress.tokens, default=0) >= self._n_vocab:
            return f"made up a token for sequence {seq_id}: the model has {self._n_vocab}"
        problem = _refusal(flight, progress) or _memory(flight, progress) or self._likely(flight, progress)
        if problem:
            return f"told of sequence {seq_id} {problem}"
        if progress.finished:
            del self._flights[seq_id]
        return ""

    def _likely(self, flight: _Flight, progress: Progress) -> str:
        """Probabilities: as many as were asked for."""
        asked = flight.join.logprobs
        if len(progress.logprobs) != (len(progress.tokens) if asked >= 0 else 0):
            return f"{len(progress.logprobs)} probabilities for {len(progress.tokens)} tokens"
        flight.prompt -= len(progress.prompt_logprobs)
        over = flight.produced or progress.finished in ("stop", "word")
        if flight.prompt < 0 or (flight.prompt and over):
            return (
                f"{len(progress.prompt_logprobs)} probabilities of the prompt, where {flight.prompt} remain"
            )
        for each in (*progress.logprobs, *progress.prompt_logprobs):
            numbers = [each.logprob, *(value for _, value in each.top)]
            if not all(-math.inf < value <= 0 for value in numbers):
                return f"a probability that there cannot be: {numbers[:4]}"
            if len(each.top) != min(max(asked, 0), self._n_vocab):
                return f"{len(each.top)} likely tokens, where {asked} were asked for"
            if max((token for token, _ in each.top), default=0) >= self._n_vocab:
                return f"a likely token that is none: the model has {self._n_vocab}"
        return ""

    @property
    def _read(self) -> int:
        """Tokens that the memory holds of all that are in flight."""
        return sum(flight.read for flight in self._flights.values())


def _refusal(flight: _Flight, progress: Progress) -> str:
    if (progress.finished == "refused") != bool(progress.problem) or len(progress.problem) > PROBLEM_MAX:
        return f"a reason of {len(progress.problem)} characters, as {progress.finished!a}"
    if progress.problem and (not flight.join.sampling.grammar or flight.produced):
        return "that it has no grammar that would do"
    return ""


def _owes(flight: _Flight) -> bool:
    """Whether it generates, or all of its prompt was read: each call gives a token then."""
    return flight.produced > 0 or flight.read >= flight.join.n_tokens


def _memory(flight: _Flight, progress: Progress) -> str:
    """What the memory holds."""
    most = flight.join.n_tokens + flight.produced
    if not flight.read <= progress.read <= most:
        return f"{progress.read} tokens read, after {flight.read} of {most}"
    flight.read = progress.read
    if flight.cached is None and progress.read:
        flight.cached = progress.cached
    if progress.cached != (flight.cached or 0) or progress.cached > min(flight.read, flight.join.wanted):
        return f"{progress.cached} tokens that need not be computed"
    return ""
