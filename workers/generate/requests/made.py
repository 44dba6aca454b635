"""What has been made of one choice so far, and how much of that its reader may see."""

from __future__ import annotations

import codecs
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence

from crumplezone.workers.batch.results import Rung
from crumplezone.workers.protocol.generate.messages import Logprob, Progress
from crumplezone.workers.protocol.generate.stops import first_stop, open_end


class Made:
    """Text and tokens, from the thread that decodes to whoever reads.

    No character is shown in halves, nothing of a stop string, and nothing that may become one. What is shown
    stays, and all of it together is the text in the end.

    Args:
        stops: Stop strings.

    Attributes:
        text: What may be seen.
        tokens: All that were drawn.
        logprobs: As many, if they were asked for.
        prompt_logprobs: Of the tokens of the prompt from the second on, as far as they were read.
        prompt_tokens: How many the prompt has.
        cached_tokens: How many of them were not computed; None: not known yet.
        stop: The stop string that was found.
        finish_reason: An empty string: not ended.
        error: Why it failed.
        reports: Of the crashes that it took part in.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # A reader's signal handler may come in the middle, and end it.
        self._lock = threading.RLock()
        self._stops = [stop.encode() for stop in stops]
        self._longest = max(map(len, self._stops), default=1)
        self._raw = bytearray()
        self._shown = self._read = 0  # bytes of that; characters of the text
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._bells = deque[Callable[[], object]]()
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[Logprob] = []
        self.prompt_logprobs: list[Logprob] = []
        self.prompt_tokens = 0
        self.cached_tokens: int | None = None
        self.stop: str | None = None
        self.finish_reason = ""
        self.rung = Rung.NATIVE
        self.error: Exception | None = None
        self.reports: list[str] = []

    def begin(self, n_tokens: int, echo: str) -> None:
        """The prompt has been tokenised.

        Args:
            n_tokens: Of the prompt.
            echo: What the text begins with.
        """
        with self._lock:
            self.prompt_tokens = n_tokens
            if not self.finish_reason:
                self.text = echo
        self.ring()

    def take(self, progress: Progress) -> None:
        """Add what came from the cell, whose text may end inside a character."""
        with self._lock:
            if self.finish_reason:
                return
            self.tokens += progress.tokens
            self.logprobs += progress.logprobs
            if told := progress.prompt_logprobs:  # after a crash from the first on again
                end = min(progress.read, self.prompt_tokens - 1)  # logits are about the token behind
                self.prompt_logprobs[max(end - len(told), 0) :] = told
            if self.cached_tokens is None and progress.read:
                self.cached_tokens = min(progress.cached, self.prompt_tokens)
            self._add(progress.text)
        self.ring()

    def end(
        self,
        reason: str,
        rung: Rung = Rung.NATIVE,
        error: Exception | None = None,
        reports: Sequence[str] = (),
    ) -> None:
        """There will be no more. The first call counts."""
        with self._lock:
            if not self.finish_reason:
                if self.stop is None:
                    self._show(len(self._raw), final=True)
                self.rung, self.error = rung, error
                self.reports += [path for path in reports if path not in self.reports]
                self.finish_reason = "stop" if self.stop is not None and error is None else reason
        self.ring()

    def show(self, text: str, reason: str, error: Exception | None) -> None:
        """Have what was made of another choice in the place of this one, all at once."""
        with self._lock:
            if not self.finish_reason:
                self.text, self.error, self.finish_reason = text, error, reason
        self.ring()

    @property
    def has_news(self) -> bool:
        """Whether there is text that nobody has read."""
        return len(self.text) > self._read

    def unread(self) -> str:
        """Of the text, what nobody has read so far; with this it is read."""
        with self._lock:
            begin, self._read = self._read, len(self.text)
            return self.text[begin:]

    def on_news(self, bell: Callable[[], object]) -> None:
        """Call something, once and from any thread, when there is more to read, or it has ended.

        At once, if that is so now.
        """
        self._bells.append(bell)
        if self.finish_reason or self.has_news:
            self.ring()

    def forget(self, bell: Callable[[], object]) -> None:
        """Do not call it."""
        with contextlib.suppress(ValueError):
            self._bells.remove(bell)

    def ring(self) -> None:
        """Have all who wait look again."""
        with contextlib.suppress(IndexError):
            while True:
                self._bells.popleft()()

    def _add(self, text: bytes) -> None:
        if self.stop is not None:
            return
        begin = max(len(self._raw) - self._longest + 1, 0)
        self._raw += text
        if not self._stops:
            self._show(len(self._raw))
        elif (at := first_stop(self._raw, self._stops, begin)) < 0:
            self._show(len(self._raw) - open_end(self._raw[-self._longest :], self._stops))
        else:
            self._show(at, final=True)
            found = [stop for stop in self._stops if self._raw.startswith(stop, at)]
            self.stop = min(found, key=len).decode()

    def _show(self, end: int, *, final: bool = False) -> None:
        """Let so many bytes be seen."""
        self.text += self._decode(bytes(self._raw[self._shown : end]), final)
        self._shown = max(end, self._shown)
