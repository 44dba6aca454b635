"""Child side: a sequence that runs, and what came of it since the latest reply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crumplezone.workers.native.engine.prefix import CachedSequence
from crumplezone.workers.native.engine.sampler import Sampler
from crumplezone.workers.protocol.generate.messages import Join, Logprob, Progress
from crumplezone.workers.protocol.generate.stops import first_stop


class StopStrings:
    """Looks for stop strings in a text that comes piece by piece.

    Args:
        stops: None of them empty.
        text: What came before, without any of them.
    """

    def __init__(self, stops: list[bytes], text: bytes = b"") -> None:
        self._stops = stops
        self._keep = max(map(len, stops), default=1) - 1  # a stop string may have begun so far back
        self._tail = text[len(text) - self._keep :] if 0 < self._keep < len(text) else text * bool(self._keep)

    def found(self, piece: bytes) -> bool:
        """Whether one is complete with this piece."""
        if not self._stops:
            return False
        text = self._tail + piece
        self._tail = text[max(len(text) - self._keep, 0) :]
        return first_stop(text, self._stops) >= 0


@dataclass(eq=False, kw_only=True)
class RunningSequence(CachedSequence):
    """A prompt that took a sequence.

    Attributes:
        join: What was asked for.
        sampler: Draws its tokens; None: each is the likeliest, which `Engine` finds faster.
        left: Tokens still to draw.
        stops: Looks for what ends its text.
        begun: The first was drawn.
        drawn: Since the latest reply; the next four likewise.
    """

    join: Join
    sampler: Sampler | None
    left: int
    stops: StopStrings
    begun: bool = False
    drawn: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    finished: Literal["", "stop", "word", "length"] = ""

    @property
    def numbers(self) -> int:
        """How many probabilities come with a token for which they are asked."""
        asked = self.join.logprobs >= 0 or self.join.prompt_logprobs
        return asked * (1 + max(self.join.logprobs, 0))

    def told(self) -> Progress:
        """What is to be told, which is then forgotten."""
        progress = Progress(
            self.seq_id,
            self.drawn,
            bytes(self.text),
            self.finished,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            read=self.position,
            cached=self.cached,
        )
        self.drawn, self.text, self.logprobs, self.prompt_logprobs = [], bytearray(), [], []
        return progress
